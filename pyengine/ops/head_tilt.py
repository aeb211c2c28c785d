"""head_tilt_sample: LM head, value heads, tilt and draw in one call that does not hold a row of logits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyengine.ops.backend import gpu_backend
from pyengine.ops.common import (
    check_float,
    check_mask,
    column,
    fail,
    head_weights,
    instruction_set,
    launched,
    library,
    triton_kernels,
    unit_strides,
)
from pyengine.ops.linear import product
from pyengine.ops.logit_tiles import triton_runs
from pyengine.ops.tilt import tilt_finish, tilt_fold, tilt_sample, tilt_state
from pyengine.reference import TiltSample

OP = "head_tilt_sample"
COLUMNS = 4096  # vocabulary of a tile on a CPU


def fuses(batch: int, on_gpu: bool) -> bool:
    """Whether the fused form wins; otherwise the GEMM writes logits for `tilt_sample` to read.

    CPU, measured (bench/results/head_tilt.json): above 64 rows; up to there the tiles' calls cost up to 13 %. GPU, by
    reasoning, not yet measured: up to the rows of one tile, where the products wait for the weights' bytes.
    """
    return batch <= 64 if on_gpu else batch > 64


library.define(
    "head_tilt_sample(Tensor hidden, Tensor weight, Tensor? bias, Tensor? value_hidden, Tensor? value_weight, "
    "Tensor? value_bias, Tensor? weights, Tensor? mask, float? softcap, Tensor temperature, Tensor top_k, "
    "Tensor top_p, Tensor min_p, Tensor seed, Tensor position, bool filtered) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def head_tilt_sample(
    hidden: Tensor,
    weight: Tensor,
    value_weight: Tensor | None = None,
    weights: Tensor | float | None = None,
    *,
    value_hidden: Tensor | None = None,
    bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
    seed: Tensor | int = 0,
    position: Tensor | int = 0,
    mask: Tensor | None = None,
) -> TiltSample:
    """`tilt_sample(method="gumbel")` of the logits and values that the heads make of the hidden states.

    Unfiltered, the fused form folds tile after tile of both products into running sums and a Gumbel argmax: logits
    are never written. With filters, or where it measures faster (`fuses`), the logits are made first. Both draw with
    the same noise, so a token changes between them only where the rounding of the product turns a near tie.

    Args:
        hidden: [B, D], fp32, bf16 or fp16.
        weight: [V, D], of the same type.
        value_weight: [R, V, Dv] value heads, or None for the base policy.
        weights: λ of each head: a number, [R] or [B, R].
        value_hidden: [B, Dv], what the value heads read; None: hidden.
        bias, value_bias: [V] and [R, V], or None.
        softcap: logits become softcap * tanh(z / softcap); None: none.
        temperature, top_k, top_p, min_p, seed, position, mask: as in `tilt_sample`.

    Returns:
        TiltSample, as `tilt_sample`, ties, NaN and -inf included.

    Raises:
        ValueError: a shape, dtype, device or parameter is out of range; the message names it.
    """
    check_float(OP, hidden, "hidden")
    if hidden.dim() != 2 or weight.dim() != 2 or 0 in weight.shape or hidden.shape[1] != weight.shape[1]:
        fail(OP, f"hidden must be [B, D] and weight [V, D], got {list(hidden.shape)} and {list(weight.shape)}")
    batch, vocab, device = len(hidden), len(weight), hidden.device
    if (value_weight is None) != (weights is None):
        fail(OP, "value_weight and weights go together; one of them is missing")
    heads = 0
    if value_weight is not None:
        value_hidden = hidden if value_hidden is None else value_hidden
        if value_weight.dim() != 3 or value_weight.shape[1] != vocab or len(value_weight) == 0:
            fail(OP, f"value_weight must have shape [R, {vocab}, Dv] with R >= 1, got {list(value_weight.shape)}")
        if value_hidden.shape != (batch, value_weight.shape[2]):
            shape = [batch, value_weight.shape[2]]
            fail(OP, f"value_hidden must have shape {shape}, got {list(value_hidden.shape)}")
        heads = len(value_weight)
    elif value_hidden is not None or value_bias is not None:
        fail(OP, "value_hidden and value_bias go with value_weight, which is missing")
    for name, tensor, like in (("weight", weight, hidden), ("value_weight", value_weight, value_hidden)):
        if tensor is not None and like is not None and (tensor.dtype, tensor.device) != (like.dtype, device):
            fail(OP, f"{name} is {tensor.dtype} on {tensor.device}, what it multiplies {like.dtype} on {device}")
    for name, tensor, shape in (("bias", bias, [vocab]), ("value_bias", value_bias, [heads, vocab])):
        if tensor is not None and list(tensor.shape) != shape:
            fail(OP, f"{name} must have shape {shape}, got {list(tensor.shape)}")
        if tensor is not None and tensor.device != device:
            fail(OP, f"{name} is on {tensor.device}, hidden on {device}")
    if softcap is not None and not 0 < softcap < math.inf:
        fail(OP, f"softcap must be a number > 0 or None, got {softcap}")
    off = ((top_k, 0), (top_p, 1), (min_p, 0))  # a tensor may hold anything: to look would synchronise
    filtered = any(isinstance(value, Tensor) or value != none for value, none in off)
    result = torch.ops.pyengine.head_tilt_sample(
        hidden,
        weight,
        bias,
        value_hidden,
        value_weight,
        value_bias,
        None if heads == 0 else head_weights(OP, weights, heads, batch, device),
        None if mask is None else check_mask(OP, mask, batch, vocab, device),
        softcap,
        column(OP, temperature, "temperature", batch, device),
        column(OP, top_k, "top_k", batch, device),
        column(OP, top_p, "top_p", batch, device),
        column(OP, min_p, "min_p", batch, device),
        column(OP, seed, "seed", batch, device),
        column(OP, position, "position", batch, device),
        filtered,
    )
    return TiltSample(*result)


class _Heads(NamedTuple):
    """Both heads and what they read; checked."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    value_hidden: Tensor | None
    value_weight: Tensor | None
    value_bias: Tensor | None
    weights: Tensor | None
    mask: Tensor | None
    softcap: float | None

    def products(self, at: slice) -> tuple[Tensor, Tensor | None]:
        """Logits [B, n] and values [R, B, n] of the vocabulary's slice `at`."""
        z = product(self.hidden, self.weight[at])
        if self.bias is not None:
            z = z.float() + self.bias[at].float()
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z.float() / self.softcap)
        if self.value_hidden is None or self.value_weight is None:
            return z, None
        values = product(self.value_hidden, self.value_weight[:, at])
        return z, values if self.value_bias is None else values.float() + self.value_bias[:, None, at].float()


_COLUMNS = ("temperature", "top_k", "top_p", "min_p", "seed", "position")


def _in_two_steps(heads: _Heads, columns: dict[str, Tensor]) -> TiltSample:
    launched(OP, "in two steps")
    logits, values = heads.products(slice(None))
    return tilt_sample(logits, values, heads.weights, mask=heads.mask, method="gumbel", **columns)


def _fused_cpu(heads: _Heads, temperature: Tensor, seed: Tensor, position: Tensor) -> TiltSample:
    launched(OP, instruction_set())
    state = tilt_state(len(heads.hidden))
    for start in range(0, len(heads.weight), COLUMNS):
        at = slice(start, start + COLUMNS)
        mask = None if heads.mask is None else heads.mask[:, at]
        rows = {"temperature": temperature, "seed": seed, "position": position}
        tilt_fold(state, *heads.products(at), heads.weights, start, mask=mask, **rows)
    return tilt_finish(state, temperature)


def _head_tilt_sample(*arguments: Any) -> TiltSample:
    with torch.autocast(arguments[0].device.type, enabled=False):  # as linear_logprob, whatever surrounds the call
        return _in_full_precision(*arguments)


def _in_full_precision(*arguments: Any) -> TiltSample:
    heads, (*rows, filtered) = _Heads(*arguments[:9]), arguments[9:]
    columns = dict(zip(_COLUMNS, rows, strict=True))
    on_gpu = triton_runs(heads.hidden)
    kernels = triton_kernels("head_tilt") if on_gpu and gpu_backend(OP) == "triton" else None
    if filtered or not fuses(len(heads.hidden), on_gpu) or (on_gpu and kernels is None):
        return _in_two_steps(heads, columns)
    unfiltered = [columns[name] for name in ("temperature", "seed", "position")]
    if kernels is None:
        return _fused_cpu(heads, *unfiltered)
    launched(OP, "triton")
    *tensors, softcap = heads
    return TiltSample(*kernels.head_tilt_sample(*unit_strides(*tensors), softcap, *unfiltered))


def _fake(hidden: Tensor, *_: object) -> tuple[Tensor, ...]:
    dtypes = (torch.int64, torch.float32, torch.float32, torch.float32, torch.bool)
    return tuple(hidden.new_empty(len(hidden), dtype=dtype) for dtype in dtypes)


for key in ("CPU", "CUDA"):
    library.impl("head_tilt_sample", _head_tilt_sample, key)
torch.library.register_fake("pyengine::head_tilt_sample", _fake, lib=library)
