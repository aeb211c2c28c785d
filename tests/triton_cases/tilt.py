"""tilt_sample in Triton against pyengine.reference, and the random numbers that every kernel draws."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from rig import BF16, DEVICE, FP16, FP32, ROWS, assert_same, columns, on_device

from pyengine import reference
from pyengine.kernels import algebra, filters, head_tilt, linear_logprob, select_block, tilt

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on log2(0) and inf - inf


def sample(logits, values=None, weights=None, *, mask=None, gumbel=False, rows=None, **shared):
    """The kernel's TiltSample, on the CPU."""
    parameters = columns(len(logits), rows, **shared)
    arguments = on_device(logits, values, weights, mask, *parameters.values())
    out = tilt.tilt_sample(*arguments, gumbel)
    return reference.TiltSample(*(field.cpu() for field in out))


def expected(logits, values=None, weights=None, *, mask=None, gumbel=False, rows=None, **shared):
    parameters = columns(len(logits), rows, **shared)
    method = "gumbel" if gumbel else "inverse"
    return reference.tilt_sample(logits, values, weights, **parameters, mask=mask, method=method)


def check(*arguments, **parameters):
    found = sample(*arguments, **parameters)
    assert_same(found, expected(*arguments, **parameters))
    return found


@triton.jit
def random_kernel(seed, position, words, noise, exponential, first, N: tl.constexpr):
    index = tl.arange(0, N // 4)[None, :]
    s, p = tl.load(seed + tl.arange(0, 1)[:, None]), tl.load(position + tl.arange(0, 1)[:, None])
    tl.store(noise + tl.arange(0, N)[None, :], algebra.gumbel(s, p, first // 4 + index))
    tl.store(exponential + tl.arange(0, N), algebra.exponential(tl.load(words + tl.arange(0, N)).to(tl.uint32)))


def test_random_numbers_are_the_reference_ones_to_both_ends():
    """D7, D8: 24-bit noise loses tail tokens (vllm#43150), a noise table makes ids unreachable (vllm#59786)."""
    vocab, first = (1 << 20) + 64, 1 << 20
    seed, position = torch.tensor([-(2**40) - 3]), torch.tensor([2**33 + 5])
    words = torch.tensor([0, 1, 5, 2**24 + 1, 2**28 - 1, 2**28, 2**31, 2**32 - 2**20, 2**32 - 2, 2**32 - 1]).repeat(8)[
        :64
    ]
    noise, exponential = torch.empty(64, device=DEVICE), torch.empty(64, device=DEVICE)
    random_kernel[(1,)](*on_device(seed, position, words), noise, exponential, first, N=64)
    want = reference.gumbel(seed, position, vocab)[0, first:]
    torch.testing.assert_close(noise.double().cpu() * math.log(2), want, atol=2e-6, rtol=0)
    u = (words.double() + 0.5) * 2.0**-32
    torch.testing.assert_close(exponential.double().cpu(), -torch.log1p(-u), atol=0, rtol=2e-6)


@pytest.mark.parametrize(
    ("vocab", "heads", "dtype", "gumbel"),
    [
        (1, 0, FP32, False),
        (50, 3, FP16, False),
        (1024, 1, BF16, True),
        (1025, 0, BF16, False),
        (3001, 1, FP32, False),
        (3001, 3, FP32, True),
    ],
)
def test_tilt_sample(vocab, heads, dtype, gumbel):
    """D1, D2: a ragged tail must neither add exp(0) nor win; per-request weights; bf16 ties are cut by id (D9)."""
    torch.manual_seed(vocab + heads)
    batch = len(ROWS)
    logits = (torch.randn(batch, vocab) * 4).to(dtype)
    values = torch.randn(heads, batch, vocab).to(dtype) if heads else None
    weights = torch.randn(batch, heads) if heads else None
    mask = torch.rand(batch, vocab) > 0.3 if vocab == 1024 else None
    random = {"seed": torch.arange(batch) + 9, "position": 4}
    out = check(logits, values, weights, mask=mask, gumbel=gumbel, rows=ROWS, **random)
    assert (out.logp_base <= 0).all()
    assert (out.token < vocab).all()


def test_negative_logits_never_draw_padding():
    """D2, mirage#751: zero-padded rows win when all logits are negative."""
    logits = torch.randn(3, 1030) - 500
    check(logits, rows=[{}, {"temperature": 0.0}, {"top_p": 0.9}])
    check(logits, gumbel=True, position=torch.arange(3))


@pytest.mark.parametrize("gumbel", [False, True])
def test_bad_rows_are_reported_and_harm_no_other(gumbel):
    """D3, D5, D6: ids beyond V, illegal access, hangs on -inf and NaN (vllm#50843, #53029, flashinfer#2402, #1049)."""
    torch.manual_seed(0)
    logits = torch.randn(10, 1100)
    for row, value in ((0, math.nan), (1, -math.inf), (2, math.nan), (3, math.inf), (8, math.inf)):
        logits[row] = value
    logits[6, 7], logits[7, 1050] = math.nan, math.inf
    kinds = [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}]
    rows = [{}, {}, *kinds, {"top_k": 3}, {"temperature": 0.0}, {}, {"top_p": 0.5}]
    out = check(logits, gumbel=gumbel, rows=rows)
    assert out.valid.tolist() == [False] * 4 + [True] * 2 + [False] * 3 + [True]
    assert (out.token[:4] == 0).all()


def test_rows_that_a_grammar_leaves_few_tokens():
    """D6, D10, D11: -inf with top-k ends, temperature 0 is no divisor, a mask may leave one token."""
    torch.manual_seed(1)
    batch = len(ROWS)
    logits, values = torch.randn(batch, 2500), torch.randn(1, batch, 2500)
    mask = torch.zeros(batch, 2500, dtype=torch.bool)
    mask[torch.arange(batch), torch.randint(0, 2500, (batch,))] = True
    values[:, ~mask] = math.nan  # on forbidden tokens: must not matter
    out = check(logits, values, torch.full((batch, 1), 2.0), mask=mask, rows=ROWS)
    assert mask[torch.arange(batch), out.token].all()
    assert out.kl.abs().max() < 1e-5


def test_values_that_forbid():
    """-inf values forbid; where they forbid all, the base policy decides, also greedily, by noise and filtered."""
    torch.manual_seed(2)
    rows = [{}, {"top_k": 5}, {"temperature": 0.0}, {"top_p": 0.5}]
    logits, values = torch.randn(4, 1500), torch.full((1, 4, 1500), -math.inf)
    values[0, 3, :10] = 0
    ones = torch.ones(4, 1)
    for gumbel in (False, True):
        out = check(logits, values, ones, gumbel=gumbel, rows=rows, position=3)
        assert out.token[3] < 10
        assert out.kl[0].abs() < 1e-6
    assert not sample(logits[:2], values[:, :2], -ones[:2]).valid.any()  # +inf


def test_zero_weight_is_the_base_policy_to_the_bit():
    torch.manual_seed(3)
    logits, seed = torch.randn(4, 1500), torch.arange(4)
    values = torch.full((2, 4, 1500), math.nan)
    rows = [{}, {"top_k": 4}, {"temperature": 0.0}, {"top_p": 0.5}]
    a, b = sample(logits, rows=rows, seed=seed), sample(logits, values, torch.zeros(4, 2), rows=rows, seed=seed)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_ties_at_a_threshold_are_cut_by_id():
    """D9: top-p drops required tokens (vllm#59785), bf16 ties are clipped by id (FreeToken#329)."""
    logits = torch.zeros(5, 5000)  # more ties than are searched in registers
    logits[:, 4000], logits[:, 4500] = 1.0, -1.0
    rows = [{"top_k": 1}, {"top_k": 3}, {"top_k": 4998}, {"top_p": 0.25}, {"top_k": 4900, "top_p": 0.5}]
    out = check(logits, rows=rows, position=torch.arange(5))
    assert out.token[0] == 4000
    assert out.token[1] in (0, 1, 4000)
    few = torch.zeros(8, 4)
    out = check(few, rows=[{"top_p": 0.5}, {"top_k": 2}] * 4, position=torch.arange(8))
    assert sorted(set(out.token.tolist())) == [0, 1]


@pytest.mark.parametrize("scale", [0.3, 40.0])
def test_filters_on_flat_and_peaked_rows(scale):
    """Flat rows keep more tokens than the registers search at once; the search then narrows its interval."""
    torch.manual_seed(4)
    logits = torch.randn(4, 12_000) * scale
    rows = [{"top_p": 0.9}, {"top_k": 7000}, {"top_k": 6000, "top_p": 0.95}, {"min_p": 1e-3}]
    check(logits, rows=rows, seed=torch.arange(4))


def test_noise_and_filters_over_several_groups():
    """The best of all groups wins, be it in the first, a middle one or the last, with its own id."""
    torch.manual_seed(5)
    filters = [{"top_p": 0.99}, {"top_k": 8000}, {"min_p": 1e-3}]
    out = check(torch.randn(6, 10_000), gumbel=True, rows=filters * 2, seed=torch.arange(3, 9))
    assert set((out.token // 4096).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("forbids", ["mask", "logits"])
def test_a_value_that_is_no_number_on_a_forbidden_token(forbids):
    """The rest of its block is allowed, so that the row's sums would show it."""
    torch.manual_seed(6)
    logits, values = torch.randn(len(ROWS), 2100), torch.randn(1, len(ROWS), 2100)
    allowed = torch.rand(len(ROWS), 2100) > 0.2
    values[:, ~allowed] = math.nan
    if forbids == "logits":
        logits[~allowed] = -math.inf
    for gumbel in (False, True):
        mask = allowed if forbids == "mask" else None
        assert check(logits, values, torch.ones(len(ROWS), 1), mask=mask, gumbel=gumbel, rows=ROWS).valid.all()


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-20, 1e-36])
def test_rows_as_steep_as_numbers_go(temperature):
    """All mass on the best, equal bests share it; also where a weight makes the values as steep."""
    torch.manual_seed(7)
    logits, values = torch.randn(5, 1500) * 4, torch.randn(1, 5, 1500)
    for at in (1, 3):
        logits[2, at], values[0, 2, at] = 20.0, 5.0
    logits[3, ::2] = -math.inf
    rows = [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 3}]
    for weights in (None, torch.full((5, 1), 1e10)):
        drawn = {"temperature": temperature, "seed": torch.arange(5), "position": 3, "rows": rows}
        arguments = (logits, None if weights is None else values, weights)
        out, want = sample(*arguments, **drawn), expected(*arguments, **drawn)
        assert out.valid.all()
        assert torch.equal(out.token, want.token)
        torch.testing.assert_close(out.logp_policy, want.logp_policy, atol=1e-5, rtol=1e-5)


def test_tiny_and_huge_logits():
    """D6: flushing denormals to zero must not stall the search (flashinfer#769); sums never overflow."""
    logits = torch.randn(5, 2048)
    logits[0] *= 1e-41
    logits[1] *= 1e4
    logits[2, 1024:] += 500
    logits[3, :1024] = -math.inf
    logits[4, 1024:] -= 1e30
    for rows in ([{}] * 5, [{"top_k": 7}, {"top_p": 0.9}] * 2 + [{"top_k": 7}]):
        out, want = sample(logits, rows=rows, seed=2), expected(logits, rows=rows, seed=2)
        assert out.valid.all()
        assert torch.equal(out.token[1:], want.token[1:])
        torch.testing.assert_close(out.kl, want.kl, atol=1e-3, rtol=1e-5)


def test_greedy_separates_neighbouring_floats():
    """A scale factor may round two logits to one; argmax must not see it; ties go to the lowest id."""
    logits = torch.full((2, 1300), 14.0)
    logits[0, 1200] = torch.nextafter(torch.tensor(14.0), torch.tensor(15.0))
    for gumbel in (False, True):
        assert check(logits, temperature=0.0, gumbel=gumbel).token.tolist() == [1200, 0]


def test_draws_keep_the_low_bits_of_their_uniforms():
    """D7: the rarest draws of 400,000, on a row where 2 % more or less in the uniform moves the token."""
    position = torch.arange(400_000)
    _, u = reference.uniforms(torch.full_like(position, 3), position, reference.TOKEN_STREAM)
    rare = u.argsort()[:8]
    logits = (math.log(1.02) * torch.arange(1024)).expand(8, -1)
    found = sample(logits, seed=3, position=rare).token
    weights = logits[0].double().exp()
    want = torch.searchsorted(weights.cumsum(0), u[rare] * weights.sum(), right=True)
    assert (found - want).abs().max() <= 1


def test_a_row_does_not_depend_on_batch_or_slot():
    """D12, D15: seeds are per row (vllm#51226), and a row's sums have one order."""
    torch.manual_seed(5)
    batch = len(ROWS)
    logits, values, weights = torch.randn(batch, 1500), torch.randn(2, batch, 1500), torch.randn(batch, 2)
    seed = torch.arange(batch)
    together = sample(logits, values, weights, rows=ROWS, seed=seed)
    for i in (0, 5):
        one = slice(i, i + 1)
        alone = sample(logits[one], values[:, one], weights[one], rows=ROWS[one], seed=seed[one])
        assert all(torch.equal(a[one], b) for a, b in zip(together, alone, strict=True))


def test_strided_rows():
    torch.manual_seed(6)
    wide, heads = torch.randn(8, 2500), torch.randn(4, 8, 2500)
    mask, weights = torch.rand(8, 2500) > 0.2, torch.randn(4, 8).T
    cut = slice(100, 1600)
    check(wide[::2, cut], heads[::2, ::2, cut], weights[::2, ::2], mask=mask[::2, cut])
    check(wide[:1, cut].expand(3, -1), mask=mask[:1, cut].expand(3, -1), position=torch.arange(3))


def test_offsets_beyond_32_bits():
    """D14: B x V overflows 32 bits (sglang#35571, pytorch#111484). Most of the storage is never touched."""
    stride = 2**31 + 16
    storage = torch.empty(stride + 64, dtype=FP16, device=DEVICE)
    logits = storage.as_strided((2, 50), (stride, 1))
    logits.copy_(torch.randn(2, 50))
    out = tilt.tilt_sample(logits, None, None, None, *on_device(*columns(2).values()), False)
    assert_same(reference.TiltSample(*(f.cpu() for f in out)), expected(logits.cpu()))


def test_no_kernel_is_tuned_or_compiled_by_batch_size():
    """D19: autotuning keyed on the batch inflated the time per token (FlashSampling)."""
    for module in (filters, head_tilt, linear_logprob, select_block, tilt):
        assert not [name for name, x in vars(module).items() if type(x).__name__ in ("Autotuner", "Heuristics")]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_graph_replay_draws_anew():
    """D13: a replay must not repeat the captured random numbers (Megatron#5697)."""
    logits = torch.randn(4, 5000, device=DEVICE)
    parameters = on_device(*columns(4, [{}, {"top_k": 50}, {"top_p": 0.9}, {}]).values())
    position = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    tilt.tilt_sample(logits, None, None, None, *parameters[:5], position, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tilt.tilt_sample(logits, None, None, None, *parameters[:5], position, False)
    for step in range(3):
        position.fill_(step)
        graph.replay()
        want = tilt.tilt_sample(logits, None, None, None, *parameters[:5], position, False)
        assert torch.equal(captured[0], want[0])
