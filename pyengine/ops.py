"""The public door to the ops: argument checks, the choice of backend, torch.library registration.

Conventions of every op here: per-row parameters are Python numbers or tensors of shape [B];
outputs are fp32 whatever the input type (fp32, bf16, fp16); rows may be strided; randomness is a
pure function of (seed, position) and so does not depend on the batch, the slot or the threads.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import pyengine._C as _C
from pyengine import reference
from pyengine.errors import InputError
from pyengine.reference import BlockSelection, TiltSample

_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/tilt.h DType

# name: (dtype, lowest, highest) of the per-row parameters
_PARAMETERS = {
    "temperature": (torch.float32, 0.0, sys.float_info.max),
    "top_k": (torch.int64, 0, 2**63 - 1),
    "top_p": (torch.float32, 0.0, sys.float_info.max),
    "min_p": (torch.float32, 0.0, 1.0),
    "seed": (torch.int64, -(2**63), 2**63 - 1),
    "position": (torch.int64, -(2**63), 2**63 - 1),
    "weights": (torch.float32, -sys.float_info.max, sys.float_info.max),
}

# "portable", "avx2" or "avx512": for comparing the paths on one machine; unset, the best one runs.
FORCED_ISA = os.environ.get("PYENGINE_CPU_ISA")
if FORCED_ISA is not None:
    try:
        _C.instruction_set(FORCED_ISA)
    except ValueError as error:
        raise InputError(f"PYENGINE_CPU_ISA: {error}") from error

_library = torch.library.Library("pyengine", "DEF")
_library.define(
    "tilt_sample(Tensor logits, Tensor? values, Tensor? weights, Tensor temperature, Tensor top_k, "
    "Tensor top_p, Tensor min_p, Tensor seed, Tensor position) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fail(message: str) -> NoReturn:
    raise ValueError(f"tilt_sample: {message}")


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

    Returns:
        TiltSample of shape [B] each:
        token (int64);
        logp_base (nats): log softmax(logits / temperature)[token];
        logp_policy (nats): log-probability under the distribution that was sampled from, filters
            included;
        kl (nats): KL of that distribution from softmax(logits / temperature);
        valid (bool): False for a row with NaN or +inf, or in which every token is forbidden. Such a row
            returns token 0 and NaN, never an id outside [0, V).
        Greedy rows are a point mass: logp_policy = 0 and kl = -logp_base, the base taken at temperature 1.
        Where the values forbid every token (all -inf), the row falls back to the base policy.

    Raises:
        ValueError: a shape, dtype, device or parameter is out of range; the message names it. Ranges of
            parameters given as tensors are not read (no host synchronisation).
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        _fail(f"logits must have shape [B, V] with V > 0, got {list(logits.shape)}")
    if logits.dtype not in _DTYPE_CODE:
        _fail(f"logits must be float32, bfloat16 or float16, got {logits.dtype}")
    batch, vocab = logits.shape
    if (values is None) != (weights is None):
        _fail("values and weights go together; one of them is missing")
    if values is not None:
        if values.dim() != 3 or values.shape[1:] != logits.shape:
            _fail(f"values must have shape [R, {batch}, {vocab}], got {list(values.shape)}")
        if values.dtype not in _DTYPE_CODE:
            _fail(f"values must be float32, bfloat16 or float16, got {values.dtype}")
        if values.device != logits.device:
            _fail(f"values are on {values.device}, logits on {logits.device}")
    heads = None if values is None else _weights(weights, values.shape[0], batch, logits.device)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape not in (logits.shape, logits.shape[1:]):
            _fail(f"mask must be bool [B, V] or [V], got {mask.dtype} {list(mask.shape)}")
        logits = logits.masked_fill(~mask, -torch.inf)
    device = logits.device
    columns = (
        _column(temperature, "temperature", batch, device),
        _column(top_k, "top_k", batch, device),
        _column(top_p, "top_p", batch, device),
        _column(min_p, "min_p", batch, device),
        _column(seed, "seed", batch, device),
        _column(position, "position", batch, device),
    )
    if device.type == "cpu" and not _traced(logits):
        return _tilt_sample_cpu(logits, values, heads, *columns)
    return TiltSample(*torch.ops.pyengine.tilt_sample(logits, values, heads, *columns))


def _traced(x: Tensor) -> bool:
    """Whether somebody (torch.compile, a fake or functional tensor, a dispatch mode) watches the ops.

    Otherwise the dispatcher is passed by: it costs 5 us, a tenth of a row of 128,256 logits.
    """
    return torch.compiler.is_compiling() or type(x) is not Tensor or is_in_torch_dispatch_mode()


@functools.lru_cache(maxsize=4096)
def _constant(value: float, name: str, device: torch.device, *shape: int) -> Tensor:
    """A checked number as a tensor with stride 0. Cached: building six of them costs a fifth of a row."""
    dtype, low, high = _PARAMETERS[name]
    if not low <= value <= high:
        _fail(f"{name} must be a number in {low} .. {high}, got {value}")
    if dtype is torch.int64 and int(value) != value:
        _fail(f"{name} must be a whole number, got {value}")
    return torch.tensor(value, dtype=dtype, device=device).expand(shape)


def _column(value: Tensor | float, name: str, batch: int, device: torch.device) -> Tensor:
    """A tensor of shape [B] from a number or a tensor."""
    if not isinstance(value, Tensor):
        # torch.compile traces through a cache with a warning; it folds the constant itself.
        make = _constant.__wrapped__ if torch.compiler.is_compiling() else _constant
        return make(value, name, device, batch)
    dtype = _PARAMETERS[name][0]
    if value.shape not in ((), (1,), (batch,)):
        _fail(f"{name} must be a number or have shape [{batch}], got {list(value.shape)}")
    if value.dtype.is_floating_point and not dtype.is_floating_point:
        _fail(f"{name} must be an integer tensor, got {value.dtype}")
    return value.to(device=device, dtype=dtype).expand(batch)


def _weights(weights: Tensor | float | None, heads: int, batch: int, device: torch.device) -> Tensor:
    if isinstance(weights, (int, float)):
        return _constant(weights, "weights", device, batch, heads)
    w = torch.as_tensor(weights, dtype=torch.float32, device=device)
    if w.shape not in ((), (heads,), (batch, heads)):
        _fail(f"weights must be a number or have shape [{heads}] or [{batch}, {heads}], got {list(w.shape)}")
    return w.expand(batch, heads)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _tilt_sample_cpu(
    logits: Tensor,
    values: Tensor | None,
    weights: Tensor | None,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> TiltSample:
    logits = _unit_stride(logits)
    batch, vocab = logits.shape
    heads: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0, 0)
    if values is not None and weights is not None:
        values = _unit_stride(values)
        code = _DTYPE_CODE[values.dtype]
        heads = (len(values), values.data_ptr(), code, *values.stride()[:2], weights.data_ptr(), *weights.stride())
    token = torch.empty(batch, dtype=torch.int64)
    logp_base = torch.empty(batch, dtype=torch.float32)
    logp_policy = torch.empty(batch, dtype=torch.float32)
    kl = torch.empty(batch, dtype=torch.float32)
    valid = torch.empty(batch, dtype=torch.bool)
    # Spelt out: a loop over the columns would cost more than the call itself.
    _C.tilt_sample(
        (batch, vocab, logits.data_ptr(), _DTYPE_CODE[logits.dtype], logits.stride(0)),
        heads,
        (temperature.data_ptr(), temperature.stride(0)),
        (top_k.data_ptr(), top_k.stride(0)),
        (top_p.data_ptr(), top_p.stride(0)),
        (min_p.data_ptr(), min_p.stride(0)),
        (seed.data_ptr(), seed.stride(0)),
        (position.data_ptr(), position.stride(0)),
        token.data_ptr(),
        logp_base.data_ptr(),
        logp_policy.data_ptr(),
        kl.data_ptr(),
        valid.data_ptr(),
        FORCED_ISA,
    )
    return TiltSample(token, logp_base, logp_policy, kl, valid)


def _tilt_sample_reference(
    logits: Tensor, values: Tensor | None, weights: Tensor | None, *columns: Tensor
) -> TiltSample:
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
    return reference.tilt_sample(logits, values, weights, **dict(zip(names, columns, strict=True)))


def _tilt_sample_fake(logits: Tensor, *_: object) -> tuple[Tensor, ...]:
    batch = logits.shape[0]
    dtypes = (torch.int64, torch.float32, torch.float32, torch.float32, torch.bool)
    return tuple(logits.new_empty(batch, dtype=dtype) for dtype in dtypes)


_library.impl("tilt_sample", _tilt_sample_cpu, "CPU")
_library.impl("tilt_sample", _tilt_sample_reference, "CUDA")
torch.library.register_fake("pyengine::tilt_sample", _tilt_sample_fake, lib=_library)


def select_block(
    scores: Tensor,
    weights: Tensor | float = 1.0,
    *,
    beta: float = 0.0,
    seed: Tensor | int = 0,
    position: Tensor | int = 0,
) -> BlockSelection:
    """Choose one of K candidates a row: argmax, or a draw from softmax(utility / beta) (Q-Probe, §4).

    utility = sum_r weights[r] * scores[..., r]; a head of weight 0 is skipped.

    Args:
        scores: [B, K, R], any float type. NaN ranks as -inf.
        weights: a number or [R].
        beta: 0 is argmax, ties to the lowest index; > 0 draws with the uniform of (seed, position).
        seed, position: a number or int64 [B]. The stream differs from `tilt_sample`'s.

    Returns:
        BlockSelection: index int64 [B], probability fp32 [B, K], utility fp32 [B, K]. Where every
        candidate scores -inf, argmax gives index 0 and the draw is uniform.

    Raises:
        ValueError: scores are not [B, K, R] with K, R >= 1, or beta is negative or NaN.
    """
    if scores.dim() != 3 or 0 in scores.shape[1:]:
        raise ValueError(f"select_block: scores must have shape [B, K, R], got {list(scores.shape)}")
    if not beta >= 0:
        raise ValueError(f"select_block: beta must be a number >= 0, got {beta}")
    batch, _, heads = scores.shape
    w = torch.as_tensor(weights, dtype=torch.float32, device=scores.device)
    if w.shape not in ((), (heads,)):
        raise ValueError(f"select_block: weights must be a number or have shape [{heads}], got {list(w.shape)}")
    seeds = torch.as_tensor(seed, dtype=torch.int64, device=scores.device).expand(batch)
    positions = torch.as_tensor(position, dtype=torch.int64, device=scores.device).expand(batch)
    return reference.select_block(scores, w.expand(heads), beta=beta, seed=seeds, position=positions)
