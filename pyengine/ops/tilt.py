"""tilt_sample: one token a row from the exponentially tilted policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pyengine._C as _C
from pyengine import reference
from pyengine.ops import cuda
from pyengine.ops.arguments import row_arguments, tilt_arguments
from pyengine.ops.backend import gpu_backend
from pyengine.ops.common import (
    cell,
    check_float,
    check_mask,
    column,
    fail,
    head_weights,
    instruction_set,
    launched,
    library,
    number,
    traced,
    triton_kernels,
    unit_strides,
)
from pyengine.reference import TiltSample

OP = "tilt_sample"
METHODS = ("inverse", "gumbel")
# new_empty of a bound tensor parses one argument instead of two: five outputs are half of a call's overhead.
_WHOLE, _FP32, _TRUTH = (
    torch.empty(0, dtype=t, device="cpu").new_empty for t in (torch.int64, torch.float32, torch.bool)
)

library.define(
    "tilt_sample(Tensor logits, Tensor? values, Tensor? weights, Tensor? mask, Tensor temperature, Tensor top_k, "
    "Tensor top_p, Tensor min_p, Tensor seed, Tensor position, bool gumbel) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def tilt_sample(
    logits: Tensor,
    values: Tensor | None = None,
    weights: Tensor | float | None = None,
    *,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
    seed: Tensor | int = 0,
    position: Tensor | int = 0,
    mask: Tensor | None = None,
    method: str = "inverse",
) -> TiltSample:
    """Draw one token a row from the exponentially tilted policy, with its log-probabilities and KL.

    The policy is softmax(logits / temperature + sum_r weights[r] * values[r]) (Controlled Decoding,
    Eq. 6), restricted by top-k, then top-p, then min-p, in this order; ties go to the lowest id.
    One pass over the row; the draw re-reads one block of 1,024 tokens (hierarchical inverse CDF).

    Args:
        logits: [B, V], fp32, bf16 or fp16. -inf marks a forbidden token.
        values: [R, B, V] reward heads, or None for the base policy. -inf forbids a token.
        weights: λ of each head: a number, [R] or [B, R]. A head of weight 0 is skipped, not multiplied.
        temperature: >= 0. 0 is greedy: argmax of logits + sum_r weights[r] * values[r].
        top_k: keep the k most likely tokens; 0 or >= V is off.
        top_p: keep the smallest set whose mass reaches top_p; >= 1 is off.
        min_p: keep tokens at least min_p times as likely as the likeliest; 0 is off.
        seed, position: int64; the uniforms are Philox4x32-10 of (seed, position).
        mask: bool [B, V] or [V]; False removes a token from base and policy alike (padded vocabulary,
            grammar).
        method: how the token is drawn. "inverse": hierarchical inverse CDF, two uniforms a row. "gumbel":
            argmax of the tilted logits plus noise that depends on (seed, position, id) alone, so that two
            policies drawn with the same seed are coupled and shards of a row can be drawn apart; slower.

    Returns:
        TiltSample of shape [B] each:
        token (int64);
        logp_base (nats): log softmax(logits / temperature)[token];
        logp_policy (nats): log-probability under the distribution that was sampled from, filters
            included;
        kl (nats): KL of that distribution from softmax(logits / temperature);
        valid (bool): False for a row with NaN or +inf, or in which every token is forbidden. Such a row
            returns token 0 and NaN, never an id outside [0, V). A head whose product with its weight is
            +inf or NaN on an allowed token makes the row bad as well.
        Greedy rows are a point mass: logp_policy = 0 and kl = -logp_base, the base taken at temperature 1.
        Where the values forbid every token (all -inf), the row falls back to the base policy.
        Logits and sums are fp32: a tilted logit is right to about 2^-21 of |logit| / T + sum_r |λ_r V_r|, so that
        heads that cancel each other leave their rounding behind, and kl to about 1e-5 of its mean under the policy.

    Raises:
        ValueError: a shape, dtype, device or parameter is out of range; the message names it. Ranges of
            parameters given as tensors are not read (no host synchronisation).
    """
    if logits.dim() != 2 or not 0 < logits.shape[1] < 2**31:
        fail(OP, f"logits must have shape [B, V] with 0 < V < 2^31, got {list(logits.shape)}")
    check_float(OP, logits, "logits")
    batch, vocab = logits.shape
    if (values is None) != (weights is None):
        fail(OP, "values and weights go together; one of them is missing")
    if values is not None:
        if values.dim() != 3 or values.shape[1:] != logits.shape:
            fail(OP, f"values must have shape [R, {batch}, {vocab}], got {list(values.shape)}")
        check_float(OP, values, "values")
        if values.device != logits.device:
            fail(OP, f"values are on {values.device}, logits on {logits.device}")
    if method not in METHODS:
        fail(OP, f"method must be one of {METHODS}, got {method!r}")
    device, gumbel = logits.device, method == "gumbel"
    if mask is not None:
        mask = check_mask(OP, mask, batch, vocab, device)
    if logits.is_cpu and not traced(logits):
        # Numbers go down as they are: making six tensors of them costs a tenth of a row of 128,256 logits.
        if isinstance(weights, (int, float)):
            number(OP, weights, "weights")
        elif values is not None:
            weights = head_weights(OP, weights, len(values), batch, device)
        return _tilt_sample_cpu(
            logits,
            values,
            weights,
            mask,
            cell(OP, temperature, "temperature", batch, device),
            cell(OP, top_k, "top_k", batch, device),
            cell(OP, top_p, "top_p", batch, device),
            cell(OP, min_p, "min_p", batch, device),
            cell(OP, seed, "seed", batch, device),
            cell(OP, position, "position", batch, device),
            gumbel,
        )
    arguments = (
        logits,
        values,
        None if values is None else head_weights(OP, weights, values.shape[0], batch, device),
        mask,
        column(OP, temperature, "temperature", batch, device),
        column(OP, top_k, "top_k", batch, device),
        column(OP, top_p, "top_p", batch, device),
        column(OP, min_p, "min_p", batch, device),
        column(OP, seed, "seed", batch, device),
        column(OP, position, "position", batch, device),
        gumbel,
    )
    return TiltSample(*torch.ops.pyengine.tilt_sample(*arguments))


def _outputs(batch: int) -> TiltSample:
    return TiltSample(_WHOLE(batch), _FP32(batch), _FP32(batch), _FP32(batch), _TRUTH(batch))


def _tilt_sample_cpu(
    logits: Tensor,
    values: Tensor | None,
    weights: Tensor | float | None,
    mask: Tensor | None,
    temperature: Tensor | float,
    top_k: Tensor | float,
    top_p: Tensor | float,
    min_p: Tensor | float,
    seed: Tensor | float,
    position: Tensor | float,
    gumbel: bool,
) -> TiltSample:
    isa = instruction_set()
    launched(OP, isa)
    out = _outputs(len(logits))
    rows = row_arguments(logits, values, weights, mask, temperature, seed, position)
    _C.tilt_sample(tilt_arguments(rows, top_k, top_p, min_p, gumbel, out), torch.get_num_threads(), isa)
    return out


def tilt_state(batch: int) -> Tensor:
    """The state [B, n] that `tilt_fold` folds tiles of the vocabulary into, on the CPU."""
    return torch.tensor(_C.TILT_STATE, dtype=torch.float64, device="cpu").repeat(batch, 1)


def tilt_fold(
    state: Tensor,
    logits: Tensor,
    values: Tensor | None,
    weights: Tensor | float | None,
    first_id: int,
    *,
    temperature: Tensor | float,
    seed: Tensor | float,
    position: Tensor | float,
    mask: Tensor | None = None,
) -> None:
    """Fold the tile of ids first_id, first_id + 1, ... into `state`: for ops that never hold a whole row.

    logits [B, n], values [R, B, n] and the bool mask [B, n] are tiles; weights [B, R] and the rest are those of
    the rows, or numbers. The caller has checked them. Tiles may come in any order. `tilt_finish` of all tiles of
    a row is `tilt_sample` of the row with method="gumbel" and without filters.
    """
    isa = instruction_set()
    launched("tilt_fold", isa)
    rows = row_arguments(logits, values, weights, mask, temperature, seed, position)
    _C.tilt_fold(state, rows, first_id, torch.get_num_threads(), isa)


def tilt_finish(state: Tensor, temperature: Tensor | float) -> TiltSample:
    """The sample of the rows whose tiles are folded into `state`."""
    out = _outputs(len(state))
    _C.tilt_finish(state, {"batch": len(state), "temperature": temperature, **out._asdict()})
    return out


def _tilt_sample_gpu(
    logits: Tensor, values: Tensor | None, weights: Tensor | None, mask: Tensor | None, *rest: Any
) -> TiltSample:
    """rest: temperature, top_k, top_p, min_p, seed, position, gumbel."""
    backend = gpu_backend(OP)
    launched(OP, backend)
    if backend == "reference":
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
        columns = dict(zip(names, rest[:-1], strict=True))
        method = "gumbel" if rest[-1] else "inverse"
        return reference.tilt_sample(logits, values, weights, mask=mask, method=method, **columns)
    kernels = cuda if backend == "cuda" else triton_kernels("tilt")
    assert kernels is not None
    logits_, values, mask = unit_strides(logits, values, mask)
    return TiltSample(*kernels.tilt_sample(logits_, values, weights, mask, *rest))


def _tilt_sample_fake(logits: Tensor, *_: object) -> tuple[Tensor, ...]:
    batch = logits.shape[0]
    dtypes = (torch.int64, torch.float32, torch.float32, torch.float32, torch.bool)
    return tuple(logits.new_empty(batch, dtype=dtype) for dtype in dtypes)


library.impl("tilt_sample", _tilt_sample_cpu, "CPU")
library.impl("tilt_sample", _tilt_sample_gpu, "CUDA")
torch.library.register_fake("pyengine::tilt_sample", _tilt_sample_fake, lib=library)
