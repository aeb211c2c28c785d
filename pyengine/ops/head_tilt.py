"""head_tilt_sample: LM head, value heads, tilt and draw in one call that does not hold a row of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyengine.ops import common
from pyengine.ops.common import (
    check_float,
    check_mask,
    column,
    fail,
    head_weights,
    instruction_set,
    launched,
    library,
)
from pyengine.ops.logit_tiles import triton_runs
from pyengine.ops.tilt import tilt_finish, tilt_fold, tilt_sample, tilt_state
from pyengine.reference import TiltSample

OP = "head_tilt_sample"
COLUMNS = 4096  # vocabulary of a tile on a CPU
# Rows up to which the fused form runs; above, the product is left to the GEMM and `tilt_sample` reads its result.
# CPU: bench/results/head_tilt.json. GPU: by reasoning (the tile's rows), not yet measured.
FUSED_ROWS, FUSED_ROWS_GPU = 64, 64

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

    Unfiltered, small batches fold tile after tile of both products into running sums and a Gumbel argmax: logits
    are never written. Larger batches and filters make the logits first. Both draw with the same noise, so a token
    changes between them only where the rounding of the product turns a near tie.

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
        if value_weight.dim() != 3 or value_weight.shape[1] != vocab:
            fail(OP, f"value_weight must have shape [R, {vocab}, Dv], got {list(value_weight.shape)}")
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
        *(
            column(OP, value, name, batch, device)
            for name, value in (
                ("temperature", temperature),
                ("top_k", top_k),
                ("top_p", top_p),
                ("min_p", min_p),
                ("seed", seed),
                ("position", position),
            )
        ),
        filtered,
    )
    return TiltSample(*result)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = hidden @ weight.T
    if bias is not None:
        z = z.float() + bias
    return z if softcap is None else softcap * torch.tanh(z.float() / softcap)


def _values(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[R, B, V] from hidden [B, Dv] and weight [R, V, Dv]."""
    values = hidden @ weight.mT
    return values if bias is None else values.float() + bias[:, None]


def _in_two_steps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value_hidden: Tensor | None,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    *columns: Tensor,
) -> TiltSample:
    launched(OP, "in two steps")
    values = None
    if value_hidden is not None and value_weight is not None:
        values = _values(value_hidden, value_weight, value_bias)
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
    parameters = dict(zip(names, columns, strict=True))
    logits = _logits(hidden, weight, bias, softcap)
    return tilt_sample(logits, values, weights, mask=mask, method="gumbel", **parameters)


def _fused_cpu(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value_hidden: Tensor | None,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
) -> TiltSample:
    launched(OP, instruction_set())
    state = tilt_state(len(hidden))
    for start in range(0, len(weight), COLUMNS):
        at = slice(start, start + COLUMNS)
        values = None
        if value_hidden is not None and value_weight is not None:
            values = _values(value_hidden, value_weight[:, at], None if value_bias is None else value_bias[:, at])
        logits = _logits(hidden, weight[at], None if bias is None else bias[at], softcap)
        tile_mask = None if mask is None else mask[:, at]
        rows = {"temperature": temperature, "seed": seed, "position": position}
        tilt_fold(state, logits, values, weights, start, mask=tile_mask, **rows)
    return tilt_finish(state, temperature)


def _head_tilt_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value_hidden: Tensor | None,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    filtered: bool,
) -> TiltSample:
    heads = (hidden, weight, bias, value_hidden, value_weight, value_bias, weights, mask, softcap)
    gpu = triton_runs(hidden)
    fits = len(hidden) <= (FUSED_ROWS_GPU if gpu else FUSED_ROWS)
    if filtered or not fits:
        return _in_two_steps(*heads, temperature, top_k, top_p, min_p, seed, position)
    if not gpu:
        return _fused_cpu(*heads, temperature, seed, position)
    kernels = common.triton_kernels("head_tilt")
    if kernels is None:
        return _in_two_steps(*heads, temperature, top_k, top_p, min_p, seed, position)
    launched(OP, "triton")
    return TiltSample(*kernels.head_tilt_sample(*heads, temperature, seed, position))


def _fake(hidden: Tensor, *_: object) -> tuple[Tensor, ...]:
    dtypes = (torch.int64, torch.float32, torch.float32, torch.float32, torch.bool)
    return tuple(hidden.new_empty(len(hidden), dtype=dtype) for dtype in dtypes)


for key in ("CPU", "CUDA"):
    library.impl("head_tilt_sample", _head_tilt_sample, key)
torch.library.register_fake("pyengine::head_tilt_sample", _fake, lib=library)
