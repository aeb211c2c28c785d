"""What holds for every op, whatever surrounds the call: default dtype and device, tracing, transforms."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyengine import _C, ops


def simpo(chosen, rejected, reference_chosen, reference_rejected):
    return -torch.nn.functional.logsigmoid(chosen.logp - rejected.logp)


def every_op(device="cpu"):
    """One call of each op, forward and backward, by name; the same numbers in every surrounding."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    hidden, weight = normal(4, 3, 8, dtype=torch.bfloat16), normal(50, 8, dtype=torch.bfloat16)
    target = torch.randint(0, 50, (4, 3), generator=generator, device="cpu")
    logits = normal(4, 50, dtype=torch.bfloat16).requires_grad_()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    out = {
        "tilt_sample": ops.tilt_sample(logits.detach(), temperature=0.7, top_k=9, seed=11),
        "tilt_sample, gumbel": ops.tilt_sample(logits.detach(), method="gumbel", seed=12),
        "head_tilt_sample": ops.head_tilt_sample(hidden.detach()[:, 0], weight.detach(), seed=13),
        "select_block": ops.select_block(normal(4, 3, 2), beta=1.0, seed=14),
    }
    fields = ops.logits_logprob(logits, target[:, 0])
    out["logits_logprob"] = (*fields, *torch.autograd.grad(fields.logp.sum(), logits))
    fields = ops.linear_logprob(hidden, weight, target)
    out["linear_logprob"] = (*fields, *torch.autograd.grad(fields.logp.sum(), (hidden, weight)))
    loss, losses, *_ = ops.linear_preference(hidden, weight, target, simpo)
    out["linear_preference"] = (loss, losses, *torch.autograd.grad(loss, (hidden, weight)))
    return out


def assert_same(found, want):
    for name in want:
        for a, b in zip(found[name], want[name], strict=True):
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    want, before = every_op(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert_same(every_op(), want)
    finally:
        torch.set_default_dtype(before)


def test_the_default_device_changes_nothing():
    want = every_op()
    with torch.device("meta"):
        assert_same(every_op(), want)


def test_fake_tensors_leave_nothing_behind():
    """A parameter's cached tensor must not be a fake one, nor a fake call find a real one."""
    with FakeTensorMode():
        assert ops.select_block(torch.empty(2, 3, 1), beta=1.0, seed=77).index.shape == (2,)
        assert ops.tilt_sample(torch.empty(2, 9), temperature=0.123).token.shape == (2,)
    ops.select_block(torch.randn(2, 3, 1), beta=1.0, seed=77)
    ops.tilt_sample(torch.randn(2, 9), temperature=torch.tensor(0.123))
    with FakeTensorMode():
        ops.tilt_sample(torch.empty(2, 9), temperature=0.123)


def test_transforms_are_refused():
    with pytest.raises(ValueError, match="vmap or a torch"):
        torch.vmap(lambda x: ops.tilt_sample(x).token)(torch.randn(2, 3, 9))


def test_inference_mode_and_parameters():
    weight = torch.nn.Parameter(torch.randn(50, 8))
    target = torch.randint(0, 50, (4, 3))
    with torch.inference_mode():
        assert ops.linear_preference(torch.randn(4, 3, 8), weight, target, simpo).losses.shape == (2,)
        assert ops.linear_logprob(torch.randn(4, 3, 8), weight, target).logp.shape == (4, 3)


@pytest.mark.parametrize("value", ["1", [1.0, 2.0], None])
def test_a_parameter_that_is_no_number_is_named(value):
    with pytest.raises(ValueError, match="temperature must be a number or a tensor"):
        ops.tilt_sample(torch.zeros(2, 3), temperature=value)
    with pytest.raises(ValueError, match="seed must be a number or a tensor"):
        ops.select_block(torch.zeros(2, 3, 1), seed=value)


def test_numbers_that_fp32_cannot_hold_are_refused():
    for call in (
        lambda: ops.tilt_sample(torch.zeros(2, 3), temperature=1e-46),
        lambda: ops.select_block(torch.zeros(2, 3, 1), beta=1e-50),
        lambda: ops.logits_logprob(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), temperature=1e-46),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()


@pytest.mark.parametrize("op", ["tilt_sample", "select_block"])
def test_a_binding_names_the_argument_that_is_missing(op):
    with pytest.raises(KeyError, match=r"batch|weights|seed"):
        getattr(_C, op)({}, 1, None)
