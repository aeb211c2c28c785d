"""tilt_sample against its fp64 reference, against the law it must follow, and on every known pitfall."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from pyengine import ops, reference

METHODS = ["inverse", "gumbel"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "top_k+top_p": {"top_k": 8, "top_p": 0.7},
    "all": {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
}


def expected(logits, values=None, weights=None, *, mask=None, method="inverse", **parameters):
    """The fp64 reference on the same arguments as ops.tilt_sample."""
    batch = len(logits)
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0}
    columns = {k: torch.as_tensor(v).expand(batch) for k, v in (defaults | parameters).items()}
    if weights is not None:
        weights = torch.as_tensor(weights, dtype=torch.float32).expand(batch, len(values))
    return reference.tilt_sample(logits, values, weights, mask=mask, method=method, **columns)


def assert_equals_reference(logits, values=None, weights=None, **parameters):
    found = ops.tilt_sample(logits, values, weights, **parameters)
    want = expected(logits, values, weights, **parameters)
    assert torch.equal(found.token, want.token)
    assert torch.equal(found.valid, want.valid)
    for name in ("logp_base", "logp_policy", "kl"):
        torch.testing.assert_close(
            getattr(found, name), getattr(want, name), atol=1e-5, rtol=1e-5, equal_nan=True, msg=name
        )


def law(logits, values=None, weights=None, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Exact probabilities [V] of one row in fp64, written from the definition, independently of the reference."""
    t = logits.double() / temperature
    if values is not None:
        t = t + (torch.as_tensor(weights).double()[:, None] * values.double()).sum(0)
    p = t.softmax(-1)
    order = sorted(range(len(p)), key=lambda i: (-t[i].item(), i))
    if top_k:
        order = order[:top_k]
    mass, kept = 0.0, []
    total = sum(p[i].item() for i in order)
    for i in order:
        if kept and mass >= top_p * total:
            break
        kept.append(i)
        mass += p[i].item()
    kept = [i for i in kept if p[i] >= min_p * p[order[0]]]
    out = torch.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


def draw(logits, count, values=None, weights=None, **parameters):
    """`count` draws of one row, as counts [V]; the row is repeated with stride 0."""
    rows = logits[None].expand(count, -1)
    heads = None if values is None else values[:, None].expand(-1, count, -1)
    out = ops.tilt_sample(rows, heads, weights, seed=7, position=torch.arange(count), **parameters)
    assert out.valid.all()
    return torch.bincount(out.token, minlength=logits.shape[-1])


def chi_square(counts, probabilities):
    """p-value; cells that expect fewer than five draws are pooled, and forbidden cells must be empty."""
    assert counts[probabilities == 0].sum() == 0
    want = probabilities * counts.sum()
    big = want >= 5
    observed, wanted = counts[big].tolist(), want[big].tolist()
    if (want[~big].sum()) >= 5:
        observed.append(counts[~big].sum().item())
        wanted.append(want[~big].sum().item())
    if len(wanted) < 2:
        return 1.0
    scale = sum(observed) / sum(wanted)
    return stats.chisquare(observed, [w * scale for w in wanted]).pvalue


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("heads", "method"), [(0, "inverse"), (2, "inverse"), (2, "gumbel")])
def test_draws_follow_the_law(isa, name, heads, method):
    torch.manual_seed(1)
    logits = torch.randn(50) * 2
    values = torch.randn(heads, 50) if heads else None
    weights = torch.tensor([0.7, -0.4]) if heads else None
    counts = draw(logits, 200_000, values, weights, method=method, **FILTERS[name])
    assert chi_square(counts, law(logits, values, weights, **FILTERS[name])) > 1e-4


@pytest.mark.parametrize("vocab", [1500, 5000])
def test_draws_follow_the_law_over_many_blocks(isa, vocab):
    torch.manual_seed(2)
    logits = torch.randn(vocab)
    assert chi_square(draw(logits, 200_000), law(logits)) > 1e-4


@pytest.mark.parametrize(
    ("gap", "same_block", "method"),
    [
        (18.0, True, "inverse"),
        (18.0, False, "inverse"),
        (20.0, True, "inverse"),
        (20.0, False, "inverse"),
        (18.0, True, "gumbel"),
    ],
)
def test_tail_mass_far_below_the_top(isa, gap, same_block, method):
    """flashinfer#2438, vllm#43150: 24-bit noise over- or under-samples tokens 18 to 20 nats down."""
    vocab = 1000 if same_block else 3000
    logits = torch.full((vocab,), -gap)
    logits[0] = 0.0
    draws = 1_000_000
    hits = draws - draw(logits, draws, method=method)[0].item()
    mean = draws * law(logits)[1:].sum().item()
    assert abs(hits - mean) < 4.5 * math.sqrt(mean) + 1


def test_uniforms_keep_their_low_bits(isa):
    """The rarest draws of four million, on a row where 2 % more or less in the uniform moves the token."""
    position = torch.arange(4_000_000)
    _, u = reference.uniforms(torch.full_like(position, 3), position, reference.TOKEN_STREAM)
    rare = u.argsort()[:32]
    logits = (math.log(1.02) * torch.arange(1024)).expand(32, -1)
    found = ops.tilt_sample(logits, seed=3, position=rare).token
    weights = logits[0].double().exp()
    want = torch.searchsorted(weights.cumsum(0), u[rare] * weights.sum(), right=True)
    assert (found - want).abs().max() <= 1  # fp32 weights may move a boundary by one token, 24-bit uniforms by ten


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 50, 1024, 1025, 4999])
@pytest.mark.parametrize("heads", [0, 1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_reference(isa, dtype, vocab, heads, method):
    torch.manual_seed(vocab + heads)
    batch = 12
    logits = (torch.randn(batch, vocab) * 4).to(dtype)
    values = torch.randn(heads, batch, vocab).to(dtype) if heads else None
    weights = torch.randn(batch, heads) if heads else None
    temperature = torch.rand(batch) + 0.4
    temperature[3] = 0.0
    for parameters in FILTERS.values():
        arguments = parameters | {"temperature": temperature, "seed": torch.arange(batch) + 9, "position": 4}
        assert_equals_reference(logits, values, weights, method=method, **arguments)


def test_accuracy_at_full_vocabulary(isa):
    """fp32 within 1e-5 of fp64; bf16 within 1e-2 of the fp64 result on the unrounded logits."""
    torch.manual_seed(0)
    logits, values = torch.randn(4, 128_256) * 3, torch.randn(1, 4, 128_256)
    want = expected(logits, values, 1.0, seed=5)
    found = ops.tilt_sample(logits, values, 1.0, seed=5)
    assert torch.equal(found.token, want.token)
    for name in ("logp_base", "logp_policy", "kl"):
        torch.testing.assert_close(getattr(found, name), getattr(want, name), atol=1e-5, rtol=0)
    rounded = ops.tilt_sample(logits.bfloat16(), values.bfloat16(), 1.0, seed=5)
    torch.testing.assert_close(rounded.kl, want.kl, atol=0, rtol=1e-2)
    same = rounded.token == want.token
    torch.testing.assert_close(rounded.logp_policy[same], want.logp_policy[same], atol=0, rtol=1e-2)
    torch.testing.assert_close(rounded.logp_base[same], want.logp_base[same], atol=0, rtol=1e-2)


def test_log_probabilities_and_kl_are_those_of_the_definition(isa):
    torch.manual_seed(4)
    logits, values, weight = torch.randn(1, 40), torch.randn(1, 1, 40), 1.7
    for parameters in FILTERS.values():
        out = ops.tilt_sample(logits, values, weight, seed=3, **parameters)
        policy = law(logits[0], values[:, 0], [weight], **parameters)
        base = (logits[0].double() / parameters.get("temperature", 1.0)).log_softmax(-1)
        kept = policy > 0
        kl = (policy[kept] * (policy[kept].log() - base[kept])).sum()
        assert out.kl.item() == pytest.approx(kl.item(), abs=1e-5)
        assert out.logp_policy.item() == pytest.approx(policy[out.token].log().item(), abs=1e-5)
        assert out.logp_base.item() == pytest.approx(base[out.token].item(), abs=1e-5)


def test_greedy_is_the_argmax_with_ties_to_the_lowest_id(isa):
    logits = torch.zeros(3, 2100)
    logits[0, [1500, 700, 2000]] = 2.0
    logits[1, 5] = 1.0
    values = torch.zeros(1, 3, 2100)
    values[0, 1, 2050] = 3.0
    out = ops.tilt_sample(logits, values, 0.5, temperature=0.0)
    assert out.token.tolist() == [700, 2050, 0]
    assert out.logp_policy.tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(out.kl, -out.logp_base)
    torch.testing.assert_close(out.logp_base[2], torch.tensor(-math.log(2100)))


@pytest.mark.parametrize("top", [14.0, 1e6, -14.0])
def test_greedy_separates_neighbouring_floats(isa, top):
    """A scale factor may round two logits to one; argmax must not see it. 14 and its neighbour do, times log2(e)."""
    logits = torch.full((1, 300), top)
    logits[0, 200] = torch.nextafter(torch.tensor(top), torch.tensor(math.inf))
    if top == 14.0:
        scaled = logits * torch.tensor(1.44269504)
        assert scaled[0, 200] == scaled[0, 0]
    assert ops.tilt_sample(logits, temperature=0.0).token.item() == 200


EXTREMES = {"none": {}, "top_k": {"top_k": 3}, "top_p": {"top_p": 0.5}, "min_p": {"min_p": 0.3}}


@pytest.mark.parametrize("temperature", [1e-5, 1e-9, 1e-20, 1e-37, 0.0, 1.0])
@pytest.mark.parametrize("weight", [None, 1.0, 1e10, -1e10, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_finite_rows_are_valid_however_far_they_reach(isa, temperature, weight, method):
    """Logits / T or λ·V beyond 2^31 in log2 units: a shift that is rounded beside a product that is fused gave NaN."""
    torch.manual_seed(0)
    for vocab in (5, 3000):
        logits, values = torch.randn(6, vocab) * 4, torch.randn(1, 6, vocab)
        logits[2, 1] = logits[2, 3] = logits[2].max() + 1  # exact ties share the draw
        values[0, 2, 1] = values[0, 2, 3]
        logits[3, 2] = -math.inf
        values[0, 4, 0] = -math.inf if (weight or 0) > 0 else 3.0
        for filters in EXTREMES.values():
            arguments = filters | {"temperature": temperature, "seed": torch.arange(6), "position": 3, "method": method}
            heads = (None, None) if weight is None else (values, weight)
            found, want = ops.tilt_sample(logits, *heads, **arguments), expected(logits, *heads, **arguments)
            assert found.valid.all()
            assert torch.equal(found.token, want.token)
            for name in ("logp_base", "logp_policy", "kl"):
                torch.testing.assert_close(getattr(found, name), getattr(want, name), atol=2e-3, rtol=1e-4, msg=name)


def test_bad_rows_beyond_the_range_of_floats_are_still_bad(isa):
    logits = torch.randn(4, 3000)
    logits[0, 2999], logits[1, 0], logits[2] = math.nan, math.inf, -math.inf
    found = ops.tilt_sample(logits, temperature=1e-30)
    assert found.valid.tolist() == [False, False, False, True]
    values = torch.randn(1, 4, 3000)
    values[0, 3, 5] = math.nan
    assert not ops.tilt_sample(logits, values, 1e12, temperature=1e-3).valid.any()
    values[0, 3] = -math.inf  # the base policy decides
    found = ops.tilt_sample(logits, values, 1e12, temperature=1e-30)
    assert found.token[3] == logits[3].argmax()
    assert found.kl[3] == 0


@pytest.mark.parametrize("top", [-1e-40, 1e-40, -1e-45, 0.0])
@pytest.mark.parametrize("min_p", [1.0, 0.9, 0.01])
def test_a_denormal_top_logit(isa, top, min_p):
    """Results too small for a normal float are 0 in the kernels; a bound must not be."""
    logits = torch.full((1, 1500), -50.0)
    logits[0, 700] = top
    for values in (None, torch.zeros(1, 1, 1500)):
        found = ops.tilt_sample(logits, values, None if values is None else 1.0, min_p=min_p)
        assert found.valid.item()
        assert found.token.item() == 700


@pytest.mark.parametrize("vocab", [3, 70, 1024, 3000])
@pytest.mark.parametrize("temperature", [1.0, 1e4])
def test_a_top_p_of_zero_keeps_the_first_of_many_ties(isa, vocab, temperature):
    """The sum of equal weights is rounded: what is kept must not be looked for above the maximum."""
    for level in (0.0, -0.0, 3.7, -1e-3):
        logits = torch.full((1, vocab), level)
        found = ops.tilt_sample(logits, temperature=temperature, top_p=0.0, seed=3)
        assert found.valid.item()
        assert found.token.item() == 0
        assert abs(found.logp_policy.item()) <= 2e-7  # one ulp of 1


@pytest.mark.parametrize("temperature", [1e-28, 1e-31, 1e-35, 1e-37])
@pytest.mark.parametrize("method", METHODS)
def test_a_tiny_temperature_loses_no_tilt(isa, temperature, method):
    """Logits that differ by little more than the temperature: T times a head's product is no normal float."""
    torch.manual_seed(1)
    logits = torch.randn(4, 1100).double() * temperature
    logits[1] = 0
    values, seed = torch.randn(1, 4, 1100), torch.arange(4)
    for filters in EXTREMES.values():
        arguments = filters | {"temperature": temperature, "seed": seed, "method": method}
        assert_equals_reference(logits.float(), values, 1.5, **arguments)


def test_every_bit_of_seed_and_position_counts(isa):
    high = 2**32
    seeds = torch.tensor([1, 1 + high, 1 + (1 << 62), -1, 1, 1])
    positions = torch.tensor([7, 7, 7, 7, 7 + high, 7 - (1 << 61)])
    for method in METHODS:
        found = ops.tilt_sample(torch.zeros(6, 50_000), seed=seeds, position=positions, method=method).token
        assert len(set(found.tolist())) == 6
        assert torch.equal(found, expected(torch.zeros(6, 50_000), seed=seeds, position=positions, method=method).token)


@pytest.mark.parametrize("more", [0, 1, 10**9])
def test_a_top_k_of_the_vocabulary_is_no_filter(isa, more):
    """Not only the same law: the same draws."""
    logits, seed = torch.randn(64, 3000), torch.arange(64)
    every = ops.tilt_sample(logits, top_k=3000 + more, seed=seed)
    for a, b in zip(every, ops.tilt_sample(logits, seed=seed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lift", [100.0, 300.0])
@pytest.mark.parametrize("heads", [0, 1])
def test_a_late_block_may_outgrow_the_first(isa, lift, heads):
    torch.manual_seed(1)
    logits = torch.randn(4, 4000)
    logits[:, 2500:2600] += lift
    values = torch.randn(heads, 4, 4000) if heads else None
    assert_equals_reference(logits, values, 0.5 if heads else None, seed=torch.arange(4))


def test_the_callers_thread_keeps_its_denormals(isa):
    ops.tilt_sample(torch.randn(4, 3000))
    tiny = torch.tensor([1e-40] * 32)
    assert (tiny * 0.5 != 0).all()


def test_top_k_keeps_exactly_k_with_ties_to_the_lowest_id(isa):
    """FreeToken#329: ties at the boundary are cut by id."""
    logits = torch.zeros(3000)
    for k in (1, 3, 2999):
        assert (draw(logits, 20_000, top_k=k) > 0).nonzero().max() < k


def test_zero_weight_is_the_base_policy_to_the_bit(isa):
    """λ = 0 skips the head: nothing in it, NaN and infinities included, may show."""
    torch.manual_seed(5)
    logits = torch.randn(6, 3000)
    values = torch.full((1, 6, 3000), math.nan)
    base, tilted = ops.tilt_sample(logits, seed=1), ops.tilt_sample(logits, values, 0.0, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(base, tilted, strict=True))


def test_per_request_weights(isa):
    torch.manual_seed(6)
    logits, values = torch.randn(2, 500), torch.randn(2, 2, 500)
    weights = torch.tensor([[1.0, 0.0], [-0.5, 2.0]])
    together = ops.tilt_sample(logits, values, weights, seed=2)
    for i in range(2):
        alone = ops.tilt_sample(logits[i : i + 1], values[:, i : i + 1], weights[i : i + 1], seed=2)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


def test_a_row_does_not_depend_on_batch_or_slot(isa):
    torch.manual_seed(7)
    logits, seed = torch.randn(40, 2500), torch.arange(40)
    everything = ops.tilt_sample(logits, top_p=0.9, seed=seed, position=3)
    order = torch.randperm(40)
    shuffled = ops.tilt_sample(logits[order], top_p=0.9, seed=seed[order], position=3)
    assert all(torch.equal(a[order], b) for a, b in zip(everything, shuffled, strict=True))


def test_seed_and_position_give_independent_draws():
    """Megatron#5697, vllm#51226: repeated or ignored randomness."""
    logits = torch.zeros(4000, 1000)
    by_position = ops.tilt_sample(logits, seed=1, position=torch.arange(4000)).token
    by_seed = ops.tilt_sample(logits, seed=torch.arange(4000), position=1).token
    for tokens in (by_position, by_seed):
        assert chi_square(torch.bincount(tokens // 10, minlength=100), torch.full((100,), 0.01)) > 1e-4
        lag = torch.corrcoef(torch.stack([tokens[:-1], tokens[1:]]).double())[0, 1]
        assert abs(lag) < 4.5 / math.sqrt(4000)
    again = ops.tilt_sample(logits, seed=1, position=torch.arange(4000)).token
    assert torch.equal(by_position, again)


def test_every_id_of_a_large_vocabulary_can_be_drawn():
    """vllm#59786: a noise table made half of a 152k vocabulary unreachable."""
    counts = draw(torch.zeros(151_936), 3000)
    blocks = counts[: 148 * 1024].view(148, 1024).sum(-1).double()
    assert chi_square(blocks, torch.full((148,), 1 / 148, dtype=torch.float64)) > 1e-4
    assert len(set((counts.nonzero()[:, 0] % 1024).tolist())) > 900


@pytest.mark.parametrize(
    "row",
    [
        lambda x: x.fill_(math.nan),
        lambda x: x.fill_(-math.inf),
        lambda x: x[7].fill_(math.nan),
        lambda x: x[7].fill_(math.inf),
    ],
    ids=["all NaN", "all -inf", "one NaN", "one +inf"],
)
@pytest.mark.parametrize("parameters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}])
def test_bad_row_is_reported_and_harms_no_other(isa, row, parameters):
    """vllm#50843, #53029, flashinfer#2402, #1049: ids >= V, illegal access, hangs."""
    logits = torch.randn(3, 2000)
    good = ops.tilt_sample(logits, seed=1, **parameters)
    row(logits[1])
    out = ops.tilt_sample(logits, seed=1, **parameters)
    assert out.valid.tolist() == [True, False, True]
    assert out.token[1] == 0
    assert out.kl[1].isnan()
    assert torch.equal(out.token[[0, 2]], good.token[[0, 2]])


def test_minus_infinity_forbids(isa):
    """TensorRT-LLM#18893: a row that a grammar leaves one token."""
    torch.manual_seed(8)
    logits = torch.full((5, 3000), -math.inf)
    logits[torch.arange(5), torch.tensor([0, 5, 1023, 1024, 2999])] = torch.randn(5)
    values = torch.randn(1, 5, 3000)
    values[:, :, 2] = math.nan  # on a forbidden token: must not matter
    for parameters in ({}, {"top_k": 4}, {"top_p": 0.3}, {"min_p": 0.5}, {"temperature": 0.0}):
        out = ops.tilt_sample(logits, values, 2.0, **parameters)
        assert out.valid.all()
        assert out.token.tolist() == [0, 5, 1023, 1024, 2999]
        torch.testing.assert_close(out.kl, torch.zeros(5), atol=1e-5, rtol=0)


def test_negative_logits_never_draw_padding(isa):
    """mirage#751, tt-metal#47021: zero-padded rows win when all logits are negative."""
    logits = torch.randn(200, 1030) - 500
    out = ops.tilt_sample(logits, seed=torch.arange(200))
    assert out.token.max() < 1030
    assert out.logp_base.max() < 0


def test_values_of_minus_infinity(isa):
    logits, values = torch.randn(2, 1500), torch.zeros(1, 2, 1500)
    values[0, 0, 10:] = -math.inf
    values[0, 1] = -math.inf
    out = ops.tilt_sample(logits.expand(2, -1), values, 1.0, seed=3)
    assert out.valid.all()
    assert out.token[0] < 10
    base = ops.tilt_sample(logits, seed=3)  # the scorer forbids all: the base policy decides
    assert out.token[1] == base.token[1]
    assert out.kl[1].item() == pytest.approx(0.0, abs=1e-6)
    wrong = ops.tilt_sample(logits, values, -1.0)  # +inf
    assert not wrong.valid.any()


def test_logits_of_any_magnitude(isa):
    """Sums are kept relative to the first block: a far larger later block must not overflow."""
    logits = torch.randn(4, 5000)
    logits[0] *= 1e4
    logits[1, 4000:] += 500
    logits[2, :1024] = -math.inf
    logits[3, 1024:] -= 1e30
    out, want = ops.tilt_sample(logits, seed=2), expected(logits, seed=2)
    assert out.valid.all()
    assert torch.equal(out.token, want.token)
    torch.testing.assert_close(out.logp_base, want.logp_base, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1e-4, 0.02, 0.2, 1e6, 3e38])
@pytest.mark.parametrize("heads", [0, 1])
def test_temperatures_of_any_size(isa, temperature, heads):
    """Scaled logits reach 10^5: shifts beyond the table's, beyond the rounding constant's, and denormal weights."""
    torch.manual_seed(17)
    logits, values = torch.randn(6, 3000) * 3, torch.randn(1, 6, 3000) if heads else None
    for parameters in ({}, {"top_p": 0.8999}, {"top_k": 20}, {"method": "gumbel"}):
        arguments = (logits, values, 0.7 if heads else None)
        parameters |= {"temperature": temperature, "seed": torch.arange(6)}
        found, want = ops.tilt_sample(*arguments, **parameters), expected(*arguments, **parameters)
        assert found.valid.all()
        assert torch.equal(found.token, want.token)
        scaled = 40 / min(temperature, 1.0)  # fp32 rounds a tilted logit of this size
        torch.testing.assert_close(found.logp_policy, want.logp_policy, atol=1e-7 * scaled + 1e-5, rtol=1e-5)
        torch.testing.assert_close(found.kl, want.kl, atol=1e-7 * scaled + 1e-5, rtol=1e-5)


@pytest.mark.parametrize("forbidden", [1024, 2048, 2500])
def test_leading_blocks_that_are_forbidden(isa, forbidden):
    """Sums are relative to the first block that has a finite maximum; far from 0 a default would underflow."""
    torch.manual_seed(11)
    logits, values = torch.randn(2, 3000), torch.randn(1, 2, 3000) - 50
    values[..., :forbidden] = -math.inf
    low = torch.randn(2, 3000) - 110
    low[:, :forbidden] = -math.inf
    cases = [((logits, values, 4.0), {}), ((low,), {}), ((low + 95,), {"temperature": 0.1})]
    for arguments, parameters in cases:
        for extra in ({}, {"top_k": 7}, {"top_p": 0.9}):
            out = ops.tilt_sample(*arguments, seed=3, **parameters, **extra)
            want = expected(*arguments, seed=3, **parameters, **extra)
            assert out.valid.all()
            assert torch.equal(out.token, want.token)
            torch.testing.assert_close(out.kl, want.kl, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [0, 1, 2])
def test_masked_rows_equal_the_reference(isa, method, dtype, heads):
    torch.manual_seed(heads)
    batch, vocab = 6, 2500
    logits = (torch.randn(batch, vocab) * 3).to(dtype)
    values = torch.randn(heads, batch, vocab) if heads else None
    weights = torch.randn(batch, heads) if heads else None
    mask = torch.rand(batch, vocab) > 0.5
    mask[0] = False  # TensorRT-LLM#18893, vllm#53665: a grammar that leaves nothing
    mask[1], mask[1, 2040] = False, True
    mask[2, :1024] = False
    if heads:
        values[:, ~mask] = math.nan  # no value revives a forbidden token
    for parameters in FILTERS.values():
        assert_equals_reference(logits, values, weights, mask=mask, method=method, seed=5, **parameters)
    shared = mask[3]
    if heads:
        values[:, :, ~shared] = math.inf
        values[:, :, shared] = 1.0
    assert_equals_reference(logits, values, weights, mask=shared, method=method, seed=5)


def test_mask_of_any_stride():
    torch.manual_seed(12)
    logits, wide = torch.randn(3, 1500), torch.rand(1500, 6) > 0.5
    across = wide.T[::2]
    found = ops.tilt_sample(logits, mask=across, seed=1)
    assert torch.equal(found.token, ops.tilt_sample(logits, mask=across.contiguous(), seed=1).token)


def test_mask_removes_tokens_from_base_and_policy():
    torch.manual_seed(9)
    logits = torch.randn(4, 100)
    mask = torch.rand(100) > 0.5
    out = ops.tilt_sample(logits, seed=1, mask=mask)
    assert mask[out.token].all()
    shrunk = logits.masked_fill(~mask, -math.inf).log_softmax(-1)
    torch.testing.assert_close(out.logp_base, shrunk.gather(1, out.token[:, None])[:, 0])


def test_strided_rows():
    torch.manual_seed(10)
    wide = torch.randn(6, 4096)
    narrow = wide[::2, 100:1600]
    assert torch.equal(ops.tilt_sample(narrow, seed=1).token, ops.tilt_sample(narrow.contiguous(), seed=1).token)
    across = torch.randn(1500, 3).T
    assert torch.equal(ops.tilt_sample(across, seed=1).token, ops.tilt_sample(across.contiguous(), seed=1).token)


def test_empty_batch():
    assert [len(x) for x in ops.tilt_sample(torch.zeros(0, 10))] == [0] * 5


def test_the_kernel_asked_for_runs(isa):
    before = ops.common.LAUNCHES.copy()
    for parameters in ({}, {"method": "gumbel"}, {"mask": torch.ones(10, dtype=torch.bool)}):
        ops.tilt_sample(torch.zeros(2, 10), **parameters)
    assert ops.common.LAUNCHES - before == {f"tilt_sample/{isa}": 3}


def test_opcheck():
    logits, values = torch.randn(3, 1500), torch.randn(1, 3, 1500)
    columns = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.0, "seed": 1, "position": 0}
    arguments = [ops.common.column("test", value, name, 3, logits.device) for name, value in columns.items()]
    mask = torch.ones(3, 1500, dtype=torch.bool)
    for gumbel in (False, True):
        torch.library.opcheck(
            torch.ops.pyengine.tilt_sample, (logits, values, torch.ones(3, 1), mask, *arguments, gumbel)
        )


def test_compiles_without_graph_breaks():
    logits, seed = torch.randn(3, 1500), torch.arange(3)

    def step(x, s):
        return ops.tilt_sample(x * 2, temperature=0.8, top_k=20, seed=s, position=5)

    compiled = torch.compile(step, fullgraph=True, backend="eager")(logits, seed)
    assert all(torch.equal(a, b) for a, b in zip(compiled, step(logits, seed), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must have shape \[B, V\]"),
        ({"logits": torch.zeros(1, 1).expand(2, 2**31)}, r"0 < V < 2\^31"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "float32, bfloat16 or float16"),
        ({"values": torch.zeros(1, 2, 4)}, r"values must have shape \[R, 2, 3\]"),
        ({"values": torch.zeros(1, 2, 3, device="meta")}, "values are on meta, logits on cpu"),
        ({"weights": None}, "values and weights go together"),
        ({"weights": torch.zeros(3)}, "weights must be a number or have shape"),
        ({"weights": math.nan}, "weights must be a number"),
        ({"temperature": -1.0}, "temperature must be a number"),
        ({"temperature": math.nan}, "temperature must be a number"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"top_k": torch.tensor([1.0, 2.0])}, "top_k must be an integer tensor"),
        ({"top_p": torch.ones(3)}, r"top_p must be a number or have shape \[2\]"),
        ({"min_p": 2.0}, "min_p must be a number"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {"logits": torch.zeros(2, 3), "values": torch.zeros(1, 2, 3), "weights": 1.0}
    with pytest.raises(ValueError, match=message):
        ops.tilt_sample(**(good | change))
