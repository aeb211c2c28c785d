"""head_tilt_sample against its fp64 reference and against the two steps that it replaces."""

from __future__ import annotations

import math

import pytest
import torch

import pyengine.ops.linear as linear_module
from pyengine import ops, reference

module = ops.head_tilt


def problem(batch=6, vocab=9000, width=24, heads=2, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    tensors = {
        "hidden": torch.randn(batch, width),
        "weight": torch.randn(vocab, width) * 0.7,
        "value_weight": torch.randn(heads, vocab, 10) * 0.5 if heads else None,
        "value_hidden": torch.randn(batch, 10) if heads else None,
    }
    out = {name: None if x is None else x.to(dtype) for name, x in tensors.items()}
    out["weights"] = torch.randn(batch, heads) if heads else None
    return out


def expected(**arguments):
    batch = len(arguments["hidden"])
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0}
    optional = {"bias": None, "value_bias": None, "softcap": None, "mask": None}
    given = defaults | optional | arguments
    for name in defaults:
        given[name] = torch.as_tensor(given[name]).expand(batch)
    return reference.head_tilt_sample(**given)


FORMS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "greedy": {"temperature": 0.0},
    "softcap": {"softcap": 4.0},
    "bias": {"bias": True},
    "mask": {"mask": True},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.7, "temperature": 1.4},
}


def complete(form, vocab, heads):
    options = dict(form)
    if options.pop("bias", False):
        options["bias"] = torch.randn(vocab)
        options["value_bias"] = torch.randn(heads, vocab) if heads else None
    if options.pop("mask", False):
        options["mask"] = torch.rand(vocab) > 0.5
    return options


@pytest.mark.parametrize("fused", [False, True], ids=["in two steps", "fused"])
@pytest.mark.parametrize("heads", [0, 1, 2])
@pytest.mark.parametrize("name", FORMS)
def test_equals_the_reference(isa, poisoned, monkeypatch, name, heads, fused):
    monkeypatch.setattr(module, "fuses", lambda batch, on_gpu: fused)
    given = problem(heads=heads)
    options = complete(FORMS[name], 9000, heads) | {"seed": torch.arange(6), "position": 3}
    found, want = ops.head_tilt_sample(**given, **options), expected(**given, **options)
    assert torch.equal(found.token, want.token)
    assert torch.equal(found.valid, want.valid)
    for field in ("logp_base", "logp_policy", "kl"):
        torch.testing.assert_close(getattr(found, field), getattr(want, field), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_equal_the_two_steps(isa, dtype):
    """The products round; given them, both ways are the same."""
    given = problem(heads=1, dtype=dtype)
    found = ops.head_tilt_sample(**given, seed=5)
    logits, values = given["hidden"] @ given["weight"].T, given["value_hidden"] @ given["value_weight"].mT
    two = ops.tilt_sample(logits, values, given["weights"], seed=5, method="gumbel")
    assert torch.equal(found.token, two.token)
    torch.testing.assert_close(found.kl, two.kl, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("columns", [1000, 1024, 4096, 10**6])
def test_tiles_do_not_change_the_draw(monkeypatch, columns):
    given = problem()
    whole = ops.head_tilt_sample(**given, seed=1)
    monkeypatch.setattr(module, "COLUMNS", columns)
    tiled = ops.head_tilt_sample(**given, seed=1)
    assert torch.equal(whole.token, tiled.token)
    torch.testing.assert_close(whole.kl, tiled.kl, atol=1e-5, rtol=1e-5)


def test_draws_do_not_depend_on_the_batch_or_the_path(monkeypatch):
    """vllm#51226, FlashSampling: noise by (seed, position, id), never by tile, slot or path."""
    given, seed = problem(batch=40), torch.arange(40)
    everything = ops.head_tilt_sample(**given, seed=seed)
    some = {k: v[10:15] if k != "weight" and k != "value_weight" else v for k, v in given.items()}
    assert torch.equal(ops.head_tilt_sample(**some, seed=seed[10:15]).token, everything.token[10:15])
    monkeypatch.setattr(module, "fuses", lambda batch, on_gpu: False)
    assert torch.equal(ops.head_tilt_sample(**given, seed=seed).token, everything.token)


SHARED = {"overlapping": (3, 1), "interleaving": (2, 101), "repeated": (0, 1)}  # strides of [50, 8] weights


@pytest.mark.parametrize("batch", [4, 80])
@pytest.mark.parametrize("strides", SHARED.values(), ids=SHARED)
def test_rows_may_share_their_numbers(isa, monkeypatch, batch, strides):
    torch.manual_seed(0)
    monkeypatch.setattr(linear_module, "quicker", lambda: True)
    hidden = torch.randn(3 * batch + 8).as_strided((batch, 8), (3, 1))
    weight = torch.randn(1000).as_strided((50, 8), strides)
    value_weight = torch.randn(300).as_strided((2, 50, 8), (5, 3, 1))
    found = ops.head_tilt_sample(hidden, weight, value_weight, 0.5, seed=3)
    want = ops.head_tilt_sample(hidden.contiguous(), weight.contiguous(), value_weight.contiguous(), 0.5, seed=3)
    assert found.valid.all()
    assert torch.equal(found.token, want.token)
    torch.testing.assert_close(found.kl, want.kl, atol=1e-5, rtol=1e-5)


def test_which_form_ran(isa):
    before = ops.LAUNCHES.copy()
    given = problem(batch=65)
    ops.head_tilt_sample(**given)
    assert (ops.LAUNCHES - before)[f"head_tilt_sample/{isa}"] == 1
    ops.head_tilt_sample(**given, top_k=3)
    ops.head_tilt_sample(**problem(batch=64))
    assert (ops.LAUNCHES - before)["head_tilt_sample/in two steps"] == 2


def test_bad_rows_and_forbidden_tokens(isa):
    given = problem(heads=1)
    good = ops.head_tilt_sample(**given, seed=2)
    given["hidden"][1] = math.nan
    given["hidden"][2, 0] = math.inf
    out = ops.head_tilt_sample(**given, seed=2)
    assert out.valid.tolist() == [True, False, False, True, True, True]
    assert out.token[[1, 2]].tolist() == [0, 0]
    assert torch.equal(out.token[3:], good.token[3:])
    value_bias = torch.full((1, 9000), -math.inf)  # the scorer forbids all: the base policy decides
    fallback = ops.head_tilt_sample(**(problem(heads=1) | {"weights": 1.0}), value_bias=value_bias, seed=2)
    base = ops.head_tilt_sample(given["hidden"][3:], given["weight"], seed=2)
    assert torch.equal(fallback.token[3:], base.token)
    nothing = ops.head_tilt_sample(given["hidden"][3:], given["weight"], mask=torch.zeros(9000, dtype=torch.bool))
    assert not nothing.valid.any()


def test_opcheck_and_compile():
    given = problem(batch=3, vocab=1100, heads=1)
    columns = [torch.full((3,), v) for v in (0.9, 0, 1.0, 0.0, 1, 2)]
    arguments = (given["hidden"], given["weight"], None, given["value_hidden"], given["value_weight"], None)
    weights = given["weights"]
    torch.library.opcheck(torch.ops.pyengine.head_tilt_sample, (*arguments, weights, None, 5.0, *columns, False))

    def step(h):
        return ops.head_tilt_sample(h * 2, given["weight"], seed=torch.arange(3), position=1)

    compiled = torch.compile(step, fullgraph=True, backend="eager")(given["hidden"])
    assert all(torch.equal(a, b) for a, b in zip(compiled, step(given["hidden"]), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 5)}, r"hidden must be \[B, D\] and weight \[V, D\]"),
        ({"weight": torch.zeros(9, 4, dtype=torch.float16)}, "weight is torch.float16 on cpu"),
        ({"weights": None}, "value_weight and weights go together"),
        ({"value_weight": torch.zeros(1, 8, 4)}, r"value_weight must have shape \[R, 9, Dv\]"),
        ({"value_hidden": torch.zeros(2, 5)}, r"value_hidden must have shape \[2, 4\]"),
        ({"value_weight": None, "weights": None, "value_bias": torch.zeros(1, 9)}, "which is missing"),
        ({"bias": torch.zeros(8)}, r"bias must have shape \[9\]"),
        ({"softcap": 0.0}, "softcap must be a number > 0"),
        ({"temperature": -1.0}, "temperature must be a number"),
        ({"mask": torch.ones(9)}, "mask must be bool"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(9, 4),
        "value_weight": torch.zeros(1, 9, 4),
        "weights": 1.0,
    }
    with pytest.raises(ValueError, match="head_tilt_sample: .*" + message):
        ops.head_tilt_sample(**(good | change))
