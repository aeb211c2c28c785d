"""The Triton kernels against pyengine.reference: on the GPU where there is one, else through the interpreter.

Collected by test_triton.py, which runs this file in a process of its own: triton reads TRITON_INTERPRET when
it is imported.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from pyengine import ops, reference
from pyengine.kernels import algebra, filters, head_tilt, linear_logprob, select_block, tilt, tree_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on log2(0) and inf - inf

COLUMNS = {
    "temperature": (1.0, torch.float32),
    "top_k": (0, torch.int64),
    "top_p": (1.0, torch.float32),
    "min_p": (0.0, torch.float32),
    "seed": (0, torch.int64),
    "position": (0, torch.int64),
}
# One row each: every filter runs in one launch, as mixed batches do.
ROWS = [
    {},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 8, "top_p": 0.7},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write, and workspace that it reads unwritten, shows as NaN or as an absurd number."""
    allocate = torch.Tensor.new_empty

    def poisoned_empty(self, *args, **kwargs):
        out = allocate(self, *args, **kwargs)
        return out.fill_(math.nan if out.is_floating_point() else True if out.dtype == torch.bool else 2**30 + 7)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_empty)


def on_device(*tensors):
    return [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in tensors]


def columns(batch, rows=None, **shared):
    """The six parameter columns; a parameter that all rows share has stride 0."""
    out = {}
    for name, (default, dtype) in COLUMNS.items():
        if rows is not None and name not in shared and name not in ("seed", "position"):
            out[name] = torch.tensor([row.get(name, default) for row in rows], dtype=dtype)
        else:
            out[name] = torch.as_tensor(shared.get(name, default), dtype=dtype).expand(batch)
    return out


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


def assert_same(found, want, tolerance=1e-5):
    assert torch.equal(found.valid, want.valid)
    assert torch.equal(found.token, want.token)
    for name in ("logp_base", "logp_policy", "kl"):
        a, b = getattr(found, name), getattr(want, name)
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, equal_nan=True)


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
    out = check(torch.randn(12, 10_000), gumbel=True, rows=filters * 4, seed=torch.arange(12))
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


def assert_fields(found, want, tolerance=1e-5):
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double().cpu(), b.double(), atol=tolerance, rtol=tolerance, equal_nan=True)


VARIANTS = [(1.0, None), (0.7, 10.0)]  # temperature, softcap


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("temperature", "softcap"), VARIANTS)
@pytest.mark.parametrize("vocab", [1, 50, 5000])
def test_logits_logprob_and_its_gradient(vocab, dtype, temperature, softcap):
    """D1, verl#2656: tails beyond V must not count; D16: gradients to logits with -inf and ignored rows among them."""
    torch.manual_seed(vocab)
    logits = (torch.randn(5, vocab + 3) * 5).to(dtype)[:, :vocab]
    target = torch.randint(0, vocab, (5,))
    target[2] = -100
    if vocab > 1:
        logits[0, ::3] = -math.inf
        target[0] = 1
    options = {"temperature": temperature, "softcap": softcap}
    found = linear_logprob.logits_logprob(*on_device(logits, target), **options)
    leaf = logits.double().requires_grad_()
    want = reference.logits_logprob(leaf, target, **options)
    assert_fields(found, [field.detach() for field in want])
    assert (found[0] <= 0).all()
    coefficients = torch.randn(2, 5)
    (want.logp * coefficients[0] + want.entropy * coefficients[1]).sum().backward()
    arguments = on_device(logits, 0, target, found[1], found[4], *coefficients)
    out = torch.full((5, vocab), math.nan, device=DEVICE)
    assert_fields([linear_logprob.grad_tile(*arguments, out=out, **options)], [leaf.grad])


@pytest.mark.parametrize("splits", [1, 3])
def test_folding_tile_by_tile_and_gradients_in_place(splits):
    """D16, ml-cross-entropy#52: the bias enters the recomputed gradient; a target is found in its own tile alone."""
    torch.manual_seed(0)
    vocab, width, options = 9000, 3700, {"temperature": 0.8, "softcap": 12.0}
    logits, bias = torch.randn(4, vocab) * 4, torch.randn(vocab)
    logits[0, 5:7400] = -500
    target = torch.tensor([0, 3700, -100, 8999])
    device_logits, device_target, device_bias = on_device(logits.clone(), target, bias)
    state = linear_logprob.new_state(device_target, splits)
    for start in range(0, vocab, width):
        tile = device_logits[:, start : start + width]
        linear_logprob.fold(tile, start, device_target, state, bias=device_bias, **options)
    found = linear_logprob.finish(state, device_target)
    leaf = logits.double().requires_grad_()
    want = reference.logits_logprob(leaf + bias.double(), target, **options)
    assert_fields(found, [field.detach() for field in want])
    coefficients = torch.randn(2, 4)
    (want.logp * coefficients[0] + want.entropy * coefficients[1]).sum().backward()
    for start in range(0, vocab, width):
        tile = device_logits[:, start : start + width]
        arguments = on_device(target, found[1], found[4], *coefficients)
        linear_logprob.grad_tile(tile, start, *arguments, bias=device_bias, **options)
    assert_fields([device_logits], [leaf.grad])


def test_rows_of_nan_and_minus_infinity():
    logits = torch.randn(3, 100)
    logits[0], logits[1, 7] = -math.inf, math.nan
    found = linear_logprob.logits_logprob(*on_device(logits, torch.tensor([1, 2, 3])))
    assert found[1][0] == -math.inf
    assert all(field[1].isnan() for field in found)
    assert all(field[2].isfinite() for field in found)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_fused_head(dtype):
    """D1: tiles that overhang V or N; the interpreter's bf16 dot is wrong, so the kernels widen for it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 100).to(dtype), (torch.randn(2500, 100) * 0.3).to(dtype)
    bias, target = (torch.randn(2500) - 30).to(dtype), torch.randint(0, 2500, (70,))
    target[3], target[69] = -100, 2499
    found = linear_logprob.fused_forward(*on_device(hidden, weight, bias, target), 0.8, 20.0)
    want = reference.linear_logprob(hidden, weight, target, bias=bias, temperature=0.8, softcap=20.0)
    assert_fields(found, want, 1e-4)


@pytest.mark.parametrize(
    ("batch", "vocab", "heads", "dtype", "extras"),
    [(3, 50, 0, FP32, False), (4, 1000, 1, BF16, True), (18, 300, 2, FP16, True), (70, 200, 1, FP32, False)],
)
def test_head_tilt_sample(batch, vocab, heads, dtype, extras):
    """D2: rows and tokens of padding never win, all logits being negative; equal noise gives equal tokens."""
    torch.manual_seed(vocab)
    hidden, weight = torch.randn(batch, 100).to(dtype), (torch.randn(vocab, 100) * 0.3).to(dtype)
    bias = (torch.randn(vocab) - 100).to(dtype) if extras else None
    softcap = 60.0 if extras else None
    value_hidden = torch.randn(batch, 30).to(dtype) if heads else None
    value_weight = (torch.randn(heads, vocab, 30) * 0.2).to(dtype) if heads else None
    value_bias = torch.randn(heads, vocab).to(dtype) if heads and extras else None
    weights = torch.randn(batch, heads) if heads else None
    mask = torch.rand(batch, vocab) > 0.3 if extras else None
    if extras:
        mask[2] = False  # a bad row
        value_bias[0] = -math.inf  # forbids all: the base policy decides, but where the weight is not positive
        weights[:, 0] = torch.tensor([1.0, 0.0]).repeat(batch)[:batch]
    parameters = columns(batch, seed=torch.arange(batch) + 5, position=3)
    parameters["temperature"] = torch.rand(batch) + 0.5
    parameters["temperature"][1] = 0
    names = ("temperature", "seed", "position")
    arguments = [hidden, weight, bias, value_hidden, value_weight, value_bias, weights, mask, softcap]
    found = head_tilt.head_tilt_sample(*on_device(*arguments, *(parameters[name] for name in names)))
    want = reference.head_tilt_sample(
        hidden,
        weight,
        value_hidden,
        value_weight,
        weights,
        bias=bias,
        value_bias=value_bias,
        softcap=softcap,
        mask=mask,
        **parameters,
    )
    assert_same(reference.TiltSample(*(field.cpu() for field in found)), want, 1e-4)


@pytest.mark.parametrize("lsc", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize(("branches", "heads"), [(1, 1), (5, 3), (8, 1)])
def test_select_block(branches, heads, lsc, beta):
    torch.manual_seed(branches)
    scores, weights = torch.randn(branches, 6, heads).transpose(0, 1) * 3, torch.randn(heads)
    hidden, probe = torch.randn(6, branches, 700).bfloat16(), (torch.randn(heads, 700) / 20).bfloat16()
    against = torch.randn(1, heads).expand(6, heads) if lsc else None
    random = torch.arange(6), torch.tensor(2).expand(6)
    for given in ((scores, None, None), (None, hidden, probe)):
        found = select_block.select_block(*on_device(*given, weights, against, lsc, beta, *random))
        direct = scores if given[0] is not None else hidden.double() @ probe.double().T
        transform = "lsc" if lsc else "identity"
        drawn = {"transform": transform, "beta": beta, "seed": random[0], "position": random[1]}
        want = reference.select_block(direct, weights, against, **drawn)
        assert torch.equal(found[0].cpu(), want.index)
        assert_fields(found[1:], want[1:])


def test_select_block_on_scores_that_are_not_finite():
    """D5: NaN ranks as -inf; a weight of 0 drops a head; saturated scores keep their order."""
    bad = torch.tensor([[math.nan, -5.0, -math.inf], [math.nan, -math.inf, math.nan], [math.inf, 1.0, math.inf]])
    scores = torch.stack([bad, torch.full_like(bad, math.nan)], -1)
    weights, random = torch.tensor([1.0, 0.0]), (torch.arange(3), torch.arange(3))
    for beta in (0.0, 1.0):
        found = select_block.select_block(*on_device(scores, None, None, weights, None, False, beta, *random))
        drawn = {"transform": "identity", "beta": beta, "seed": random[0], "position": random[1]}
        want = reference.select_block(scores, weights, **drawn)
        assert torch.equal(found[0].cpu(), want.index)
        assert_fields(found[1:], want[1:])
    saturated = torch.tensor([[[30.0], [40.0], [50.0], [60.0], [55.0], [-60.0]]])
    one = torch.ones(1)
    out = select_block.select_block(*on_device(saturated, None, None, one, None, True, 0.0, *(c[:1] for c in random)))
    assert out[0].item() == 3
    want = [-math.log1p(math.exp(-x)) if x > 0 else x for x in saturated.flatten().tolist()]
    torch.testing.assert_close(out[2].cpu(), torch.tensor([want]), atol=0, rtol=1e-5)


OP_MODULES = {
    name: sys.modules[f"pyengine.ops.{name}"] for name in ("linear_logprob", "linear_preference", "head_tilt")
}
OP_DTYPES = [FP32, BF16] if DEVICE == "cuda" else [FP32]  # on a CPU no GEMM sums half types in fp32
TILE_TOKENS, TILE_COLUMNS, HEAD = 5, 1024, {"temperature": 0.8, "softcap": 12.0}


@pytest.fixture
def over_triton(monkeypatch):
    """pyengine.ops goes over these kernels, in several tiles of tokens and of the vocabulary, on any device."""
    monkeypatch.setattr(ops.logit_tiles, "TOKENS_GPU", TILE_TOKENS)
    monkeypatch.setattr(ops.logit_tiles, "FUSED_TOKENS", 0)
    monkeypatch.setattr(ops.logit_tiles, "COLUMNS", TILE_COLUMNS)
    monkeypatch.setattr(OP_MODULES["linear_logprob"], "COLUMNS", TILE_COLUMNS)
    monkeypatch.setattr(linear_logprob, "SPLIT", TILE_COLUMNS)
    for module in (ops.logit_tiles, *OP_MODULES.values()):
        monkeypatch.setattr(module, "triton_runs", lambda x: True)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def assert_gradients(found, want, dtype):
    tolerance = 1e-5 if dtype == FP32 else 3e-2  # the products of half types round
    for a, b in zip(found, want, strict=True):
        norm = b.grad.double().norm()
        assert (a.grad.double().cpu() - b.grad.double()).norm() <= tolerance * norm


@pytest.mark.parametrize("fused_tokens", [0, 128], ids=["tiles", "fused"])
@pytest.mark.parametrize("dtype", OP_DTYPES)
def test_ops_linear_logprob(over_triton, monkeypatch, dtype, fused_tokens):
    """D16: ignored rows and a bias; a bad target is NaN there and nowhere else."""
    monkeypatch.setattr(ops.logit_tiles, "FUSED_TOKENS", fused_tokens)
    torch.manual_seed(0)
    given = [torch.randn(12, 40), torch.randn(2500, 40) * 0.3, torch.randn(2500)]
    given = [t.to(dtype) for t in given]
    target = torch.randint(0, 2500, (12,))
    target[3], target[11] = -100, 2499
    coefficients = torch.randn(2, 12)
    mine, theirs = leaves(*on_device(*given)), leaves(*(t.double() for t in given))
    before = ops.LAUNCHES.copy()
    found = ops.linear_logprob(*mine[:2], *on_device(target), bias=mine[2], **HEAD)
    want = reference.linear_logprob(*theirs[:2], target, bias=theirs[2], **HEAD)
    assert (ops.LAUNCHES - before)["linear_logprob/triton"] == 1
    tolerance = 1e-5 if dtype == FP32 else 5e-2
    assert_fields([f.detach() for f in found], [f.detach() for f in want], tolerance)
    for out, c in ((found, coefficients.to(DEVICE)), (want, coefficients)):
        (out.logp * c[0] + out.entropy * c[1]).sum().backward()
    assert_gradients(mine, theirs, dtype)
    target[1] = 2500
    for field, right in zip(
        ops.linear_logprob(*mine[:2], *on_device(target), bias=mine[2], **HEAD), found, strict=True
    ):
        assert field.isnan().nonzero().tolist() == [[1]]
        assert torch.equal(field[2:], right[2:])
    assert ops.linear_logprob(*on_device(given[0][:0], given[1], target[:0])).logp.shape == (0,)


@pytest.mark.parametrize("dtype", OP_DTYPES)
def test_ops_logits_logprob(over_triton, dtype):
    torch.manual_seed(1)
    logits, target = (torch.randn(7, 2503) * 4).to(dtype)[:, :2500], torch.randint(0, 2500, (7,))
    target[2] = -100
    coefficients = torch.randn(2, 7)
    (mine,), (theirs,) = leaves(*on_device(logits)), leaves(logits.double())
    found = ops.logits_logprob(mine, *on_device(target), **HEAD)
    want = reference.logits_logprob(theirs, target, **HEAD)
    assert_fields([f.detach() for f in found], [f.detach() for f in want])
    for out, c in ((found, coefficients.to(DEVICE)), (want, coefficients)):
        (out.logp * c[0] + out.entropy * c[1]).sum().backward()
    assert_gradients([mine], [theirs], dtype)
    bad = logits.clone()
    bad[0], bad[1, 3], bad[3, 5] = -math.inf, math.nan, math.inf
    for field in ops.logits_logprob(*on_device(bad, target)):
        assert field.isnan().tolist() == [True, True, False, True, False, False, False]
    empty = logits[:0].to(DEVICE).requires_grad_()
    ops.logits_logprob(empty, *on_device(target[:0])).logp.sum().backward()
    assert empty.grad.shape == empty.shape


def wpo(chosen, rejected, *_):
    weight = ((chosen.sampled / chosen.tokens + rejected.sampled / rejected.tokens) / 9).exp().clamp(max=1)
    return -weight * torch.nn.functional.logsigmoid(0.1 * (chosen.logp - rejected.logp))


@pytest.mark.parametrize("dtype", OP_DTYPES)
@pytest.mark.parametrize("kept", [2**30, 12 * 2500, 2500], ids=["one chunk", "chunks", "recomputed"])
def test_ops_linear_preference(over_triton, monkeypatch, kept, dtype):
    monkeypatch.setattr(OP_MODULES["linear_preference"], "KEPT_LOGITS", kept)
    torch.manual_seed(2)
    given = [torch.randn(6, 4, 40).to(dtype), (torch.randn(2500, 40) * 0.3).to(dtype)]
    target = torch.randint(0, 2500, (6, 4))
    target[0, :2] = target[4, 3:] = -100
    mine, theirs = leaves(*on_device(*given)), leaves(*(t.double() for t in given))
    before = ops.LAUNCHES.copy()
    found = ops.linear_preference(*mine, *on_device(target), wpo)
    want = reference.linear_preference(*theirs, target, wpo)
    assert (ops.LAUNCHES - before)["linear_preference/triton"] == 1
    tolerance = 1e-5 if dtype == FP32 else 5e-2
    assert_fields([found.losses, *found.moments], [want.losses, *want.moments], tolerance)
    found.loss.backward()
    want.loss.backward()
    assert_gradients(mine, theirs, dtype)


@pytest.mark.parametrize("filtered", [False, True])
def test_ops_head_tilt_sample(over_triton, filtered):
    torch.manual_seed(3)
    hidden, weight, value_weight = torch.randn(3, 40), torch.randn(1000, 40) * 0.3, torch.randn(1, 1000, 40) * 0.2
    parameters = columns(3, seed=torch.arange(3), top_k=20 if filtered else 0)
    before = ops.LAUNCHES.copy()
    arguments = on_device(hidden, weight, value_weight)
    off = {} if filtered else {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    moved = {name: x.to(DEVICE) for name, x in parameters.items()} | off
    found = ops.head_tilt_sample(*arguments, 1.5, **moved)
    form = "in two steps" if filtered else "triton"
    assert (ops.LAUNCHES - before)[f"head_tilt_sample/{form}"] == 1
    heads = (hidden, weight, hidden, value_weight, torch.full((3, 1), 1.5))
    want = reference.head_tilt_sample(*heads, bias=None, value_bias=None, softcap=None, **parameters)
    assert_same(reference.TiltSample(*(field.cpu() for field in found)), want, 1e-4)


def _tree_problems():
    """tests/test_tree_attention.py, whose problems serve here too."""
    spec = importlib.util.spec_from_file_location("tree_problems", Path(__file__).with_name("test_tree_attention.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TREES = _tree_problems()


def run_tree(p, append=False, scale=None, window=None, softcap=None, sinks=None):
    """The wrapper on the device; `append` lets the kernel write the new keys and values."""
    stores = on_device(*p.stores)
    if append:
        _, _, leaf, inside = on_device(*TREES.new_places(p))
        for store in stores[2:]:
            store[leaf, :, inside] = math.nan
    new = on_device(p.key, p.value) if append else (None, None)
    scale = scale or p.query.shape[3] ** -0.5
    query, sinks = on_device(p.query, sinks)
    found = tree_attention.tree_attention(
        query, *new, *stores, *on_device(*p.tree), scale, window or 0, softcap or 0.0, sinks
    )
    for store, given in zip(stores, p.stores, strict=True):
        assert torch.equal(store.cpu().nan_to_num(7), given.nan_to_num(7)), "not only the new tokens were written"
    return found.cpu()


@pytest.mark.parametrize("options", TREES.OPTIONS)
@pytest.mark.parametrize("shape", [s for s in TREES.SHAPES if s not in ("more rows than a unit", "width 256")])
def test_tree_attention(shape, options):
    p = TREES.problem(**TREES.SHAPES[shape], kernel=options != "plain")
    chosen = TREES.with_sinks(TREES.OPTIONS[options], p)
    found = run_tree(p, append=options in ("plain", "window"), **chosen)
    torch.testing.assert_close(found, p(reference.tree_attention, **chosen), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", ["more rows than a unit", "width 256"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_tree_attention_in_half_precision(shape, dtype):
    p = TREES.problem(**TREES.SHAPES[shape], dtype=dtype)
    want = p(reference.tree_attention).float()
    assert (run_tree(p, append=True).float() - want).abs().max() <= 3 * TREES.TOLERANCE[dtype]


def test_a_branch_of_tree_attention_depends_on_nothing_but_itself():
    """Bit for bit: a prompt alone, its branches in another order, the others with other tails or none."""
    p = TREES.problem(lengths=(300, 70), branches=(4, 2), tail=40)
    want, tails = run_tree(p, window=60), p.tree.tail_len
    for b in range(2):
        alone, rows = TREES.only(p, b)
        tables = {name: getattr(alone.tree, name).flip(0) for name in ("leaves", "tail_len")}
        alone.query, alone.tree = alone.query.flip(0), alone.tree._replace(**tables)
        assert torch.equal(run_tree(alone, window=60).flip(0), want[rows])
    for row in (0, 3):
        for others in (tails.clamp(max=3), torch.zeros_like(tails)):
            others[row] = tails[row]
            p.tree = p.tree._replace(tail_len=others)
            assert torch.equal(run_tree(p, window=60)[row], want[row])
