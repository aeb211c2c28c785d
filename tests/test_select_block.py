"""select_block: hard and soft selection."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from pyengine import ops, reference


def test_argmax_with_ties_to_the_lowest_index():
    scores = torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]])[..., None]
    out = ops.select_block(scores)
    assert out.index.tolist() == [1, 0]
    assert out.probability.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert out.utility.tolist() == scores[..., 0].tolist()


def test_weighted_sum_of_scores():
    scores = torch.tensor([[[1.0, 4.0], [2.0, 1.0]]])
    assert ops.select_block(scores, torch.tensor([1.0, 0.0])).index.item() == 1
    assert ops.select_block(scores, torch.tensor([1.0, 1.0])).utility.tolist() == [[5.0, 3.0]]
    assert ops.select_block(scores, torch.tensor([1.0, -1.0])).index.item() == 1


def test_zero_weight_drops_a_score_that_is_not_finite():
    scores = torch.tensor([[[1.0, math.nan], [2.0, -math.inf]]])
    assert ops.select_block(scores, torch.tensor([1.0, 0.0])).utility.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_nan_ranks_as_minus_infinity(bad):
    scores = torch.tensor([[bad, -5.0, bad]])[..., None]
    assert ops.select_block(scores).index.item() == 1
    soft = ops.select_block(scores, beta=1.0)
    assert soft.index.item() == 1
    assert soft.probability.tolist() == [[0.0, 1.0, 0.0]]
    everything = ops.select_block(torch.full((1, 4, 1), bad), beta=1.0)
    assert everything.probability.tolist() == [[0.25] * 4]
    assert ops.select_block(torch.full((1, 4, 1), bad)).index.item() == 0


def test_softmax_draw_follows_its_law():
    scores, n = torch.tensor([0.0, 0.5, 1.0, -2.0]), 50_000
    out = ops.select_block(scores[None, :, None].expand(n, -1, -1), beta=0.7, seed=torch.arange(n), position=3)
    want = (scores.double() / 0.7).softmax(-1)
    torch.testing.assert_close(out.probability[0].double(), want, atol=1e-6, rtol=0)
    assert stats.chisquare(torch.bincount(out.index), want * n).pvalue > 1e-4


def test_selection_does_not_follow_the_token_draw():
    """The same (seed, position) serves both; the streams differ."""
    n = 20_000
    seed = torch.arange(n)
    token = ops.tilt_sample(torch.zeros(n, 10), seed=seed).token
    index = ops.select_block(torch.zeros(n, 10, 1), beta=1.0, seed=seed).index
    table = torch.zeros(10, 10).index_put_((token, index), torch.ones(n), accumulate=True)
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_large_beta_is_the_base_policy_and_small_beta_the_argmax():
    scores = torch.randn(1, 6, 1)
    torch.testing.assert_close(ops.select_block(scores, beta=1e6).probability, torch.full((1, 6), 1 / 6))
    assert ops.select_block(scores, beta=1e-6).index.item() == scores.argmax().item()


def expected(scores, weights=1.0, **options):
    """The fp64 reference on the arguments of ops.select_block."""
    batch, _, heads = scores.shape
    given = {"transform": "identity", "beta": 0.0, "seed": 0, "position": 0} | options
    for name in ("seed", "position"):
        given[name] = torch.as_tensor(given[name]).expand(batch)
    weights = torch.as_tensor(weights, dtype=torch.float32).expand(heads)
    return reference.select_block(scores, weights, given.pop("reference", None), **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [1, 3, 5])
@pytest.mark.parametrize("options", [{}, {"beta": 0.3}, {"transform": "lsc"}, {"transform": "lsc", "beta": 0.2}])
def test_equals_the_reference(isa, poisoned, dtype, heads, options):
    torch.manual_seed(heads)
    scores, weights = (torch.randn(40, 7, heads) * 3).to(dtype), torch.randn(heads)
    if "transform" in options:
        options = options | {"reference": torch.randn(40, heads)}
    arguments = options | {"seed": torch.arange(40), "position": 3}
    found, want = ops.select_block(scores, weights, **arguments), expected(scores, weights, **arguments)
    assert torch.equal(found.index, want.index)
    torch.testing.assert_close(found.probability, want.probability, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.utility, want.utility, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width"), [(1, 4096), (1, 5), (2, 1000), (6, 1537)])
def test_probe_on_hidden_states(isa, poisoned, dtype, heads, width):
    torch.manual_seed(width)
    hidden, probe = torch.randn(9, 4, width + 3).to(dtype)[..., :width], torch.randn(heads, width).to(dtype)
    weights = torch.tensor([1.0, -0.5, 0.0, 2.0, 0.3, 1.0])[:heads]
    scores = hidden.double() @ probe.double().T
    found, want = ops.select_block(None, weights, hidden=hidden, probe=probe), expected(scores, weights)
    assert torch.equal(found.index, want.index)
    torch.testing.assert_close(found.utility, want.utility, atol=2e-5 * width**0.5, rtol=1e-5)
    across = hidden.transpose(0, 1)
    assert torch.equal(
        ops.select_block(hidden=across, probe=probe).index,
        ops.select_block(hidden=across.contiguous(), probe=probe).index,
    )


@pytest.mark.parametrize("heads", [1, 4, 5])
@pytest.mark.parametrize("candidates", [2, 5, 7, 8])
def test_equal_candidates_tie_to_the_bit(isa, heads, candidates):
    """Candidates go through in groups; a group's summation order must not decide."""
    one, probe = torch.randn(20, 1, 1000), torch.randn(heads, 1000)
    out = ops.select_block(hidden=one.expand(-1, candidates, -1), probe=probe)
    assert (out.index == 0).all()
    assert (out.utility == out.utility[:, :1]).all()


def test_lsc_examples_and_limits(isa):
    """§2.1, §2.3: both properties count; shift invariance; -log 2 at the reference; no overflow at 1e4."""
    p = torch.tensor([[[0.9, 0.9], [0.45, 0.99]]])
    out = ops.select_block(p.logit(), transform="lsc", beta=1.0)
    assert (out.probability[0, 0] / out.probability[0, 1]).item() == pytest.approx(20 / 11, rel=1e-5)
    scores, against = torch.randn(3, 4, 2), torch.randn(3, 2)
    a = ops.select_block(scores, transform="lsc", reference=against).utility
    b = ops.select_block(scores + 5, transform="lsc", reference=against + 5).utility
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    at = ops.select_block(torch.full((1, 1, 1), 2.0), transform="lsc", reference=torch.tensor([2.0]))
    assert at.utility.item() == pytest.approx(-math.log(2))
    far = torch.tensor([1e4, -1e4, math.inf, -math.inf]).view(1, 4, 1)
    assert ops.select_block(far, transform="lsc").utility.tolist() == [[0.0, -1e4, 0.0, -math.inf]]


def test_bad_scores_rank_last(isa):
    scores = torch.tensor([[[math.nan, 1.0], [-math.inf, 5.0], [0.0, -9.0]]])
    assert ops.select_block(scores).index.item() == 2
    assert ops.select_block(scores).utility[0, 0].item() == -math.inf
    assert ops.select_block(scores, torch.tensor([0.0, 1.0])).index.item() == 1  # a head of weight 0 is skipped
    best = ops.select_block(torch.tensor([[[math.inf], [1.0], [math.inf]]]), beta=1.0)
    assert best.probability.tolist() == [[0.5, 0.0, 0.5]]


def test_a_row_does_not_depend_on_the_batch(isa):
    hidden, probe, seed = torch.randn(30, 5, 100), torch.randn(2, 100), torch.arange(30)
    whole = ops.select_block(hidden=hidden, probe=probe, beta=0.5, seed=seed)
    order = torch.randperm(30)
    some = ops.select_block(hidden=hidden[order], probe=probe, beta=0.5, seed=seed[order])
    assert all(torch.equal(a[order], b) for a, b in zip(whole, some, strict=True))


def test_which_kernel_ran(isa):
    ops.LAUNCHES.clear()
    ops.select_block(torch.zeros(1, 2, 1))
    assert {f"select_block/{isa}": 1} == ops.LAUNCHES


def test_opcheck_and_compile():
    hidden, probe, one = torch.randn(3, 4, 20), torch.randn(2, 20), torch.zeros(3, dtype=torch.int64)
    arguments = (None, hidden, probe, torch.ones(2), torch.zeros(3, 2), True, 0.5, one, one)
    torch.library.opcheck(torch.ops.pyengine.select_block, arguments)
    torch.library.opcheck(
        torch.ops.pyengine.select_block, (hidden, None, None, torch.ones(20), None, False, 0.0, one, one)
    )

    def step(h):
        return ops.select_block(hidden=h * 2, probe=probe, beta=0.5, seed=one)

    compiled = torch.compile(step, fullgraph=True, backend="eager")(hidden)
    assert all(torch.equal(a, b) for a, b in zip(compiled, step(hidden), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either scores, or hidden and probe"),
        ({"hidden": torch.zeros(2, 3, 4)}, "either scores, or hidden and probe"),
        ({"hidden": torch.zeros(2, 3, 4), "probe": torch.zeros(1, 5)}, r"probe must have shape \[R, 4\]"),
        ({"scores": torch.zeros(2, 3, 1), "transform": "log"}, "transform must be one of"),
        ({"scores": torch.zeros(2, 3, 1), "reference": torch.zeros(1)}, "reference goes with transform='lsc'"),
        (
            {"scores": torch.zeros(2, 3, 1), "transform": "lsc", "reference": torch.zeros(3)},
            "reference must have shape",
        ),
        ({"scores": torch.zeros(2, 3, 1, dtype=torch.int64)}, "scores must be float32"),
        ({"scores": torch.zeros(2, 3)}, r"\[B, K, R\]"),
        ({"scores": torch.zeros(2, 0, 1)}, r"\[B, K, R\]"),
        ({"scores": torch.zeros(2, 3, 1), "beta": -1.0}, "beta"),
        ({"scores": torch.zeros(2, 3, 1), "beta": math.nan}, "beta"),
        ({"scores": torch.zeros(2, 3, 2), "weights": torch.ones(3)}, "weights"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.select_block(**arguments)
