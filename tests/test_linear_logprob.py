"""linear_logprob and logits_logprob against their fp64 reference and against plain PyTorch, pitfall by pitfall."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from pyengine import ops, reference

tiles = sys.modules["pyengine.ops.linear_logprob"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "temperature": 1.3, "softcap": 5.0},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in each direction, at sizes that a test can afford."""
    monkeypatch.setattr(ops.logit_tiles, "TOKENS", 5)
    monkeypatch.setattr(ops.logit_tiles, "COLUMNS", 2048)


def problem(form, dtype=torch.float32, rows=13, width=16, vocab=5000, seed=0):
    torch.manual_seed(seed)
    options = dict(form)
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(vocab, width).to(dtype)
    target = torch.randint(0, vocab, (rows,))
    target[0], target[1], target[rows // 2] = 0, vocab - 1, -100
    if options.pop("bias", False):
        options["bias"] = torch.randn(vocab).to(dtype)
    return hidden, weight, target, options


def plain(hidden, weight, target, bias=None, temperature=1.0, softcap=None):
    """What one writes in PyTorch: logits in the input type, then fp32."""
    z = torch.nn.functional.linear(hidden, weight, bias).float()
    x = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    p = x.log_softmax(-1)
    safe = target.clamp(min=0)
    fields = (p.gather(1, safe[:, None])[:, 0], x.logsumexp(-1), (2 * x).logsumexp(-1), x.amax(-1))
    return [torch.where(target >= 0, f, 0.0) for f in (*fields, -(p.exp() * p).sum(-1))]


def no_worse(found, exact, usual, dtype):
    """The error against fp64 is at most that of the plain computation in the same input type, plus 1e-5.

    fp32: the largest error, on the scale of the largest entry. bf16 and fp16 round every product, by luck up or
    down, so that the largest error of a few is a draw: their root mean square is compared, with 5 % for the draw.
    """
    error, bound = (found.double() - exact).abs(), (usual.double() - exact).abs()
    if dtype == torch.float32:
        return error.max() <= bound.max() + 1e-5 * max(1.0, exact.abs().max())
    return error.square().mean().sqrt() <= 1.05 * bound.square().mean().sqrt() + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_no_less_accurate_than_pytorch(isa, poisoned, name, dtype):
    hidden, weight, target, options = problem(FORMS[name], dtype, rows=200, vocab=2500)
    exact = reference.linear_logprob(hidden, weight, target, **options)
    usual = plain(hidden, weight, target, **options)
    found = ops.linear_logprob(hidden, weight, target, **options)
    for field, want, other in zip(found, exact, usual, strict=True):
        assert field.dtype == torch.float32
        assert no_worse(field, want, other, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_gradients(isa, poisoned, name, dtype):
    """ml-cross-entropy#14, #52: every gradient, the bias's too, of logp and entropy together."""
    hidden, weight, target, options = problem(FORMS[name], dtype, rows=40)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    if "bias" in options:
        inputs.append(options["bias"].requires_grad_())
    by_logp, by_entropy = torch.randn(2, len(target))

    def gradients(fields):
        return torch.autograd.grad((fields[0] * by_logp + fields[-1] * by_entropy).sum(), inputs)

    exact = gradients(reference.linear_logprob(hidden, weight, target, **options))
    usual = gradients(plain(hidden, weight, target, **options))
    found = gradients(ops.linear_logprob(hidden, weight, target, **options))
    for gradient, want, other in zip(found, exact, usual, strict=True):
        assert gradient.dtype == dtype
        assert no_worse(gradient, want.double(), other, dtype)


def test_only_what_is_asked_for_is_differentiated():
    hidden, weight, target, _ = problem({})
    out = ops.linear_logprob(hidden, weight.requires_grad_(), target)
    assert [field.requires_grad for field in out] == [True, False, False, False, True]
    (of_weight,) = torch.autograd.grad(out.logp.sum(), weight)
    want = torch.autograd.grad(reference.linear_logprob(hidden, weight, target).logp.sum(), weight)[0]
    torch.testing.assert_close(of_weight, want, atol=1e-5, rtol=1e-5)
    assert not ops.linear_logprob(hidden, weight.detach(), target).logp.requires_grad


@pytest.mark.parametrize("vocab", [1, 2, 1023, 1024, 1025, 4097])
def test_ragged_vocabularies_add_nothing(isa, poisoned, vocab):
    """verl#2656, #5349: a tile's out-of-range entries added exp(0); mirage#751: padding won when all were negative."""
    torch.manual_seed(vocab)
    hidden, weight = torch.rand(6, 8), -torch.rand(vocab, 8) * 5
    target = torch.randint(0, vocab, (6,))
    out, want = ops.linear_logprob(hidden, weight, target), reference.linear_logprob(hidden, weight, target)
    assert (out.logp <= 1e-6).all()
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-6)


def test_sums_do_not_depend_on_the_tiles(isa, monkeypatch):
    """Fixed blocks of 1,024: given the same products, bit for bit."""
    torch.manual_seed(3)
    logits, target = torch.randn(7, 6000) * 5, torch.randint(0, 6000, (7,))
    whole = ops.logits_logprob(logits, target)
    state, head = ops.logit_tiles.new_state(target), ops.logit_tiles.Head(6000, None, 1.0, None, -100)
    for start in range(0, 6000, 2048):
        ops.logit_tiles.fold(logits[:, start : start + 2048].contiguous(), start, head, target, state)
    for a, b in zip(ops.logit_tiles.finish(state, head, target), whole, strict=True):
        assert torch.equal(a.float(), b)
    one = ops.logits_logprob(logits[2:3], target[2:3])
    assert all(torch.equal(a[2:3], b) for a, b in zip(whole, one, strict=True))


def test_ignored_rows_are_zero_and_cost_no_product(monkeypatch):
    hidden, weight, target, _ = problem({})
    target[:] = -100
    target[4] = 17
    hidden[0] = math.nan
    seen = []
    multiply = tiles.multiply
    monkeypatch.setattr(tiles, "multiply", lambda h, w, b: seen.append(len(h)) or multiply(h, w, b))
    out = ops.linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), target)
    assert set(seen) == {1}
    assert all((field[[0, 1, 2, 3, *range(5, 13)]] == 0).all() for field in out)
    out.logp.sum().backward()
    assert (hidden.grad.abs().sum(-1) > 0).nonzero()[:, 0].tolist() == [4]
    assert weight.grad.isfinite().all()
    everything = ops.linear_logprob(hidden, weight, torch.full_like(target, -100))
    everything.logp.sum().backward()
    assert all((field == 0).all() for field in everything)
    other = ops.linear_logprob(
        hidden.detach(), weight.detach(), torch.where(target < 0, 7777, target), ignore_index=7777
    )
    assert torch.equal(other.logp, out.logp)


def test_bad_rows_are_nan_and_harm_no_other(isa):
    hidden, weight, target, _ = problem({})
    target[6] = 5
    good = ops.linear_logprob(hidden, weight, target)
    hidden[2], hidden[3, 0] = math.nan, math.inf
    out = ops.linear_logprob(hidden, weight, target)
    rest = [0, 1, *range(4, 13)]
    for field, clean in zip(out, good, strict=True):
        assert field[[2, 3]].isnan().all()
        assert torch.equal(field[rest], clean[rest])
    logits = torch.full((2, 3000), -math.inf)
    logits[1, 7] = math.inf
    assert all(field.isnan().all() for field in ops.logits_logprob(logits, torch.tensor([1, 7])))


@pytest.mark.parametrize("allowed", [[0], [2999], [5, 1500]])
def test_minus_infinity_forbids(isa, allowed):
    """0 * inf: forbidden tokens add nothing to the entropy and get no gradient."""
    logits = torch.full((1, 3000), -math.inf)
    logits[0, allowed] = torch.tensor([1.0, 2.0])[: len(allowed)]
    logits.requires_grad_()
    target = torch.tensor([allowed[-1]])
    out, want = ops.logits_logprob(logits, target), reference.logits_logprob(logits, target)
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[0].nonzero()[:, 0].tolist() or allowed) == allowed
    forbidden = ops.logits_logprob(logits, torch.tensor([7]))
    assert forbidden.logp.item() == -math.inf
    assert forbidden.lse.isfinite().all()


def test_logits_of_any_magnitude(isa):
    torch.manual_seed(5)
    logits = torch.randn(4, 5000)
    logits[0] *= 1e4
    logits[1, 4000:] += 500
    logits[2, :1024] = -math.inf
    logits[3] -= 1e30
    target = torch.tensor([3, 4500, 2000, 9])
    out, want = ops.logits_logprob(logits, target), reference.logits_logprob(logits, target)
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "temperature", "softcap"])
def test_twin_from_logits(isa, poisoned, name, dtype):
    torch.manual_seed(6)
    logits = (torch.randn(4, 9, 2500) * 4).to(dtype).requires_grad_()
    target = torch.randint(0, 2500, (4, 9))
    target[1, 2:5] = -100
    by_logp, by_entropy = torch.randn(2, 4, 9)
    out = ops.logits_logprob(logits, target, **FORMS[name])
    flat = reference.logits_logprob(logits.flatten(0, 1), target.flatten(), **FORMS[name])
    want = [field.view(4, 9) for field in flat]
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-6, rtol=2e-6)
    (found,) = torch.autograd.grad((out.logp * by_logp + out.entropy * by_entropy).sum(), logits)
    (exact,) = torch.autograd.grad((want[0] * by_logp + want[4] * by_entropy).sum(), logits)
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=step)


def test_strided_logits():
    torch.manual_seed(7)
    wide = torch.randn(6, 4096)
    narrow, target = wide[::2, 100:1600], torch.tensor([0, 5, 1499])
    for view in (narrow, torch.randn(1500, 3).T):
        found, want = ops.logits_logprob(view, target), ops.logits_logprob(view.contiguous(), target)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_wpo_moments():
    """§3.2: E[p_v / sum p^2] = 1; greedy alignment <= 0; one-hot and uniform rows give 0; shift invariance."""
    torch.manual_seed(8)
    logits = torch.randn(1, 300).double()
    p = logits.softmax(-1)[0]
    rows = ops.logits_logprob(logits.float().expand(300, -1), torch.arange(300))
    sampled, greedy = rows.logp + 2 * rows.lse - rows.lse2, rows.logp + rows.lse - rows.max_logit
    assert (p * sampled.double().exp()).sum().item() == pytest.approx(1.0, abs=1e-5)
    assert greedy.max().item() == 0.0
    shifted = ops.logits_logprob(logits.float() + 100, torch.tensor([3]))
    torch.testing.assert_close(shifted.logp + 2 * shifted.lse - shifted.lse2, sampled[3:4], atol=1e-4, rtol=0)
    uniform = ops.logits_logprob(torch.zeros(1, 5000), torch.tensor([9]))
    assert (uniform.logp + 2 * uniform.lse - uniform.lse2).item() == pytest.approx(0.0, abs=1e-5)
    assert uniform.entropy.item() == pytest.approx(math.log(5000), abs=1e-5)


def test_which_kernel_ran(isa):
    ops.LAUNCHES.clear()
    hidden, weight, target, _ = problem({})
    ops.linear_logprob(hidden, weight, target)
    ops.logits_logprob(hidden, target.clamp(0, 15))
    assert {f"linear_logprob/{isa}": 1, f"logits_logprob/{isa}": 1} == ops.LAUNCHES


def test_memory_stays_far_below_the_logits(monkeypatch):
    """The largest tensor made on the way is a tile."""
    monkeypatch.undo()
    sizes = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *a, **k: sizes.append(a[0]) or new_empty(x, *a, **k))
    hidden, weight, target = torch.randn(64, 8), torch.randn(100_000, 8), torch.zeros(64, dtype=torch.int64)
    ops.linear_logprob(hidden, weight, target)
    assert max(sizes) <= 64 * ops.logit_tiles.COLUMNS


def test_opcheck():
    hidden, weight, target, _ = problem({}, rows=4, vocab=1100)
    bias = torch.randn(1100)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.pyengine.linear_logprob, (hidden, weight, bias, target, 0.9, 4.0, -100))
    torch.library.opcheck(torch.ops.pyengine.linear_logprob, (hidden, weight, None, target, 1.0, None, -100))
    logits = torch.randn(4, 1100, requires_grad=True)
    torch.library.opcheck(torch.ops.pyengine.logits_logprob, (logits, target, 0.9, 4.0, -100))


def test_compiles_without_graph_breaks():
    """unsloth-zoo#592, pytorch#179722: fullgraph, forward and backward."""
    hidden, weight, target, _ = problem({})

    def step(h, w):
        out = ops.linear_logprob(h * 2, w, target, temperature=0.8)
        twin = ops.logits_logprob(h, target.clamp(0, 15))
        return (out.logp + out.entropy + twin.logp).sum() + out.lse2.mean()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = function(*inputs)
        results.append((value.detach(), *torch.autograd.grad(value, inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_leading_dimensions():
    hidden, weight, target, _ = problem({}, rows=12)
    flat = ops.linear_logprob(hidden, weight, target)
    shaped = ops.linear_logprob(hidden.view(3, 4, 16), weight, target.view(3, 4))
    assert all(torch.equal(a.view(3, 4), b) for a, b in zip(flat, shaped, strict=True))
    empty = ops.linear_logprob(hidden[:0], weight, target[:0])
    assert [field.shape for field in empty] == [(0,)] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4)}, r"hidden must be \[..., D\]"),
        ({"weight": torch.zeros(9, 5)}, r"weight \[V, D\], got \[3, 4\] and \[9, 5\]"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "hidden must be float32"),
        ({"weight": torch.zeros(9, 4, dtype=torch.float16)}, "weight is torch.float16, hidden torch.float32"),
        ({"weight": torch.zeros(9, 4, device="meta")}, "weight is on meta, hidden on cpu"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target must have shape \[3\]"),
        ({"target": torch.zeros(3)}, "target must be int64"),
        ({"target": torch.tensor([0, 9, 1])}, r"target 9 in row 1 is outside \[0, 9\)"),
        ({"target": torch.tensor([0, 8, -1])}, r"target -1 in row 2 is outside \[0, 9\) and is not -100"),
        ({"bias": torch.zeros(8)}, r"bias must have shape \[9\]"),
        ({"temperature": 0.0}, "temperature must be a number > 0"),
        ({"temperature": math.nan}, "temperature must be a number > 0"),
        ({"softcap": -1.0}, "softcap must be a number > 0 or None"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(9, 4), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        ops.linear_logprob(**(good | change))


def test_bad_logits_are_named():
    target = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="logits_logprob: target must have the shape of logits without V"):
        ops.logits_logprob(torch.zeros(2, 9), target)
    with pytest.raises(ValueError, match="logits_logprob: target 9 in row 0"):
        ops.logits_logprob(torch.zeros(3, 9), target + 9)


@pytest.mark.parametrize("view", ["column", "slice", "expanded"])
def test_targets_that_do_not_lie_together(view):
    """A target is read where it lies; its strides must not shift the rows."""
    labels = torch.randint(0, 50, (6, 2))
    logits = torch.randn(6, 50, requires_grad=True)
    target = {"column": labels[:, 0], "slice": labels[:, :1], "expanded": torch.tensor([7]).expand(6)}[view]
    given = logits[:, None] if view == "slice" else logits
    found, want = ops.logits_logprob(given, target), ops.logits_logprob(given, target.contiguous())
    assert torch.equal(found.logp, want.logp)
    a, b = (torch.autograd.grad(x.logp.sum(), logits, retain_graph=True)[0] for x in (found, want))
    assert torch.equal(a, b)
    hidden, weight = torch.randn(6, 8), torch.randn(50, 8).T.contiguous().T
    if view != "slice":
        found, want = (ops.linear_logprob(hidden, weight, t) for t in (target, target.contiguous()))
        assert torch.equal(found.logp, want.logp)
