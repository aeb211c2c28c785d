"""The Triton kernels of the LM head and of blocks against pyengine.reference, and the ops over them."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from rig import BF16, DEVICE, FP16, FP32, assert_fields, assert_same, columns, on_device

from pyengine import ops, reference
from pyengine.kernels import head_tilt, linear_logprob, select_block

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on log2(0) and inf - inf

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
