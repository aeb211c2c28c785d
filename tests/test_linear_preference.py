"""linear_preference against autograd on the fp64 reference, for several paired losses, chunk by chunk."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from pyengine import ops, reference

module = sys.modules["pyengine.ops.linear_preference"]
VOCAB = 5000


def dpo(chosen, rejected, reference_chosen, reference_rejected):
    margin = (chosen.logp - reference_chosen) - (rejected.logp - reference_rejected)
    return -torch.nn.functional.logsigmoid(0.1 * margin)


def wpo(chosen, rejected, reference_chosen, reference_rejected):
    """§3.1: DPO weighted by the sampled alignment of both responses, clamped as in the official code."""
    alignments = [m.sampled / m.tokens.clamp(min=1) for m in (chosen, rejected)]
    weight = (alignments[0] + alignments[1]).exp().clamp(max=1)
    return weight * dpo(chosen, rejected, reference_chosen, reference_rejected)


def ipo(chosen, rejected, reference_chosen, reference_rejected):
    greedy = (chosen.greedy / chosen.tokens.clamp(min=1)).exp()
    d = (chosen.logp - reference_chosen) - (rejected.logp - reference_rejected)
    return greedy * (d - 1 / (2 * 0.1)) ** 2


def simpo(chosen, rejected, reference_chosen, reference_rejected):
    assert reference_chosen is None
    assert reference_rejected is None
    lengths = [m.tokens.clamp(min=1) for m in (chosen, rejected)]
    return -torch.nn.functional.logsigmoid(2 * chosen.logp / lengths[0] - 2 * rejected.logp / lengths[1] - 0.5)


LOSSES = {"dpo": dpo, "wpo": wpo, "ipo": ipo, "simpo": simpo}


@pytest.fixture(
    params=[10**9, 16 * VOCAB, 9 * VOCAB, 3 * VOCAB], ids=["one chunk", "chunks", "partly recomputed", "recomputed"]
)
def limit(request, monkeypatch):
    monkeypatch.setattr(module, "KEPT_LOGITS", request.param)
    monkeypatch.setattr(ops.logit_tiles, "COLUMNS", 2048)


def problem(dtype=torch.float32, pairs=4, length=7):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2 * pairs, length, 16).to(dtype), torch.randn(VOCAB, 16).to(dtype)
    target = torch.randint(0, VOCAB, (2 * pairs, length))
    target[0, :3] = -100
    if pairs > 2:
        target[3, 2:] = -100
        target[5] = -100  # an empty response
    return hidden, weight, target, torch.randn(2 * pairs) * 3 - 60


@pytest.mark.parametrize("name", LOSSES)
def test_equals_autograd_on_the_reference(limit, poisoned, name):
    hidden, weight, target, logp = problem()
    bias = torch.randn(VOCAB)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    options = {"bias": bias, "temperature": 0.9, "softcap": 5.0}
    if name != "simpo":
        options["reference_logp"] = logp
    found = ops.linear_preference(hidden, weight, target, LOSSES[name], **options)
    want = reference.linear_preference(hidden, weight, target, LOSSES[name], **options)
    torch.testing.assert_close(found.loss.double(), want.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.losses.double(), want.losses, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.top1, want.top1)
    for a, b in zip(found.moments, want.moments, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a.double(), b.double(), atol=1e-4, rtol=1e-6)
    for a, b in zip(
        torch.autograd.grad(3 * found.loss, inputs), torch.autograd.grad(3 * want.loss, inputs), strict=True
    ):
        torch.testing.assert_close(a, b.float(), atol=1e-5 * b.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(limit, dtype):
    hidden, weight, target, logp = problem(dtype)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    found = ops.linear_preference(hidden, weight, target, wpo, reference_logp=logp)
    want = reference.linear_preference(hidden, weight, target, wpo, reference_logp=logp)
    torch.testing.assert_close(found.losses.double(), want.losses, atol=2e-2, rtol=2e-2)
    for a, b in zip(torch.autograd.grad(found.loss, inputs), torch.autograd.grad(want.loss, inputs), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b.double(), atol=3e-2 * b.abs().max().item(), rtol=3e-2)


def test_chunks_do_not_change_the_result(monkeypatch):
    """Liger's chunked DPO divides by the whole batch's pairs; so must any chunking."""
    hidden, weight, target, logp = problem()
    weight.requires_grad_()
    results = []
    for kept in (10**9, 16 * VOCAB, VOCAB):
        monkeypatch.setattr(module, "KEPT_LOGITS", kept)
        out = ops.linear_preference(hidden, weight, target, wpo, reference_logp=logp)
        results.append((out.loss.detach(), out.losses, *torch.autograd.grad(out.loss, weight)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_three_products_a_tile(monkeypatch):
    """One product to make the logits, two for the gradients: kept logits are not recomputed."""
    hidden, weight, target, logp = problem()
    calls = []
    multiply = module.multiply
    monkeypatch.setattr(module, "multiply", lambda *a: calls.append(1) or multiply(*a))
    monkeypatch.setattr(ops.logit_tiles, "COLUMNS", 1024)
    ops.linear_preference(hidden, weight.requires_grad_(), target, dpo, reference_logp=logp).loss.backward()
    assert len(calls) == math.ceil(VOCAB / 1024)


def test_a_long_pair_keeps_the_tiles_that_fit(monkeypatch):
    """Of 5 tiles 2 are recomputed: 7 products instead of 5, and as much memory as was allowed, and one tile."""
    hidden, weight, target, _ = problem(pairs=1)
    rows = int((target != -100).sum())
    calls = []
    multiply = module.multiply
    monkeypatch.setattr(module, "multiply", lambda *a: calls.append(a[2].numel()) or multiply(*a))
    monkeypatch.setattr(ops.logit_tiles, "COLUMNS", 1024)
    monkeypatch.setattr(module, "KEPT_LOGITS", rows * 3100)
    ops.linear_preference(hidden, weight.requires_grad_(), target, simpo).loss.backward()
    assert len(calls) == 7
    assert max(calls) == rows * 4 * 1024


def test_top1_counts_the_likeliest_tokens_and_ties():
    hidden, weight, target, _ = problem()
    best = (hidden @ weight.T).argmax(-1)
    target = torch.where((target != -100) & (torch.arange(7) % 2 == 0), best, target)
    weight[best[1, 0] - 1] = weight[best[1, 0]]  # as likely, with a lower id
    found = ops.linear_preference(hidden, weight, target, simpo)
    assert found.top1.tolist() == ((target == best) & (target != -100)).sum(-1).tolist()
    assert found.top1.sum() > 15


def test_weights_carry_no_gradient():
    """W is detached (§3.1): the gradient is that of DPO times the weight."""
    hidden, weight, target, logp = (x[[2, 6]] if len(x) == 8 else x for x in problem())
    weight.requires_grad_()
    plain = ops.linear_preference(hidden, weight, target, dpo, reference_logp=logp)
    weighted = ops.linear_preference(hidden, weight, target, wpo, reference_logp=logp)
    ratio = (weighted.losses / plain.losses).item()
    a, b = (torch.autograd.grad(x.loss, weight)[0] for x in (plain, weighted))
    torch.testing.assert_close(b, ratio * a, atol=1e-8, rtol=1e-4)


def test_without_gradients_nothing_is_kept(poisoned):
    hidden, weight, target, logp = problem()
    with torch.no_grad():
        out = ops.linear_preference(hidden, weight.requires_grad_(), target, wpo, reference_logp=logp)
    assert not out.loss.requires_grad
    want = reference.linear_preference(hidden, weight, target, wpo, reference_logp=logp)
    torch.testing.assert_close(out.losses.double(), want.losses.detach(), atol=1e-5, rtol=1e-5)


def test_gradients_are_handed_out_once():
    hidden, weight, target, logp = problem()
    loss = ops.linear_preference(hidden, weight.requires_grad_(), target, dpo, reference_logp=logp).loss
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out"):
        loss.backward()


def test_nothing_to_learn_from():
    hidden, weight, target, logp = problem()
    target[:] = -100
    out = ops.linear_preference(hidden, weight.requires_grad_(), target, dpo, reference_logp=logp)
    out.loss.backward()
    assert (weight.grad == 0).all()
    assert (out.moments.logp == 0).all()


def test_compiles_without_graph_breaks():
    hidden, weight, target, logp = problem()
    bias = torch.randn(VOCAB)

    def step(h, w, b):
        out = ops.linear_preference(h * 2, w, target, wpo, reference_logp=logp, bias=b, softcap=9.0)
        return out.loss, out.losses, *out.moments

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        loss, *rest = function(*inputs)
        results.append((loss.detach(), *rest, *torch.autograd.grad(3 * loss, inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_closure_is_refused_in_a_compiled_graph():
    """The graph would go on with the first closure's numbers."""
    hidden, weight, target, _ = problem()

    def scaled(beta):
        return lambda c, r, *_: -torch.nn.functional.logsigmoid(beta * (c.logp - r.logp))

    compiled = torch.compile(
        lambda h, loss: ops.linear_preference(h, weight, target, loss).loss, fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="must not be a closure"):
        compiled(hidden, scaled(0.1))


def test_a_long_pair_after_a_kept_chunk(monkeypatch):
    """The scratch of half types is sized apart from the kept logits."""
    monkeypatch.setattr(module, "KEPT_LOGITS", 9000 * 20)
    torch.manual_seed(1)
    hidden, weight = torch.randn(4, 15, 8).bfloat16(), torch.randn(9000, 8).bfloat16().requires_grad_()
    target = torch.randint(0, 9000, (4, 15))
    target[0, 7:] = target[2, 7:] = -100
    found = ops.linear_preference(hidden, weight, target, simpo)
    want = reference.linear_preference(hidden, weight, target, simpo)
    a, b = (torch.autograd.grad(x.loss, weight)[0].double() for x in (found, want))
    torch.testing.assert_close(a, b, atol=3e-2 * b.abs().max().item(), rtol=3e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_scaler_reaches_small_fp16_gradients(compiled):
    """Scaled before they are rounded: at unit scale they would flush to 0, and the scale is no number of fp16."""
    hidden, weight, target, _ = problem(torch.float16)
    hidden = (hidden * 0.01).requires_grad_()

    def small(chosen, rejected, *_):
        return -torch.nn.functional.logsigmoid(1e-4 * (chosen.logp - rejected.logp))

    def step(h):
        return 65536 * ops.linear_preference(h, weight, target, small).loss

    step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    found = torch.autograd.grad(step(hidden), hidden)[0]
    want = torch.autograd.grad(65536 * reference.linear_preference(hidden, weight, target, small).loss, hidden)[0]
    torch.testing.assert_close(found, want, atol=1e-3 * want.abs().max().item(), rtol=1e-2)


def test_opcheck():
    hidden, weight, target, logp = problem()
    inputs = [hidden.requires_grad_(), weight.requires_grad_(), torch.randn(VOCAB).requires_grad_()]
    handle = module._handle(wpo)
    arguments = (*inputs, target, logp, handle, 0.9, 5.0, -100, [True, True, True])
    torch.library.opcheck(torch.ops.pyengine.linear_preference, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 2, 4)}, r"hidden must have shape \[2P, T, D\]"),
        ({"hidden": torch.zeros(8, 4)}, r"hidden must have shape \[2P, T, D\]"),
        ({"reference_logp": torch.zeros(3)}, r"reference_logp must have shape \[4\]"),
        ({"target": torch.full((4, 2), 9)}, "target 9 in row 0"),
        ({"loss": lambda c, r, a, b: (c.logp - r.logp).mean()}, r"one value a pair, shape \[2\], got \[\]"),
        ({"loss": lambda *_: 1.0}, r"one value a pair, shape \[2\], got float"),
        ({"loss": lambda c, r, a, b: c.greedy}, "carries no gradient"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {
        "hidden": torch.zeros(4, 2, 4),
        "weight": torch.zeros(9, 4, requires_grad=True),
        "target": torch.zeros(4, 2, dtype=torch.int64),
        "loss": simpo,
    }
    with pytest.raises(ValueError, match="linear_preference: .*" + message):
        ops.linear_preference(**(good | change))
