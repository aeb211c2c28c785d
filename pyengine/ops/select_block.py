"""select_block: the branch that a request keeps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import pyengine._C as _C
from pyengine import reference
from pyengine.ops import cuda
from pyengine.ops.arguments import select_arguments
from pyengine.ops.backend import gpu_backend
from pyengine.ops.common import (
    SMALLEST,
    cell,
    check_float,
    column,
    fail,
    head_weights,
    instruction_set,
    launched,
    library,
    traced,
    triton_kernels,
    unit_stride,
    unit_strides,
)
from pyengine.reference import BlockSelection

OP = "select_block"
TRANSFORMS = ("identity", "lsc")

library.define(
    "select_block(Tensor? scores, Tensor? hidden, Tensor? probe, Tensor weights, Tensor? reference, bool lsc, "
    "float beta, Tensor seed, Tensor position) -> (Tensor, Tensor, Tensor)"
)


def select_block(
    scores: Tensor | None = None,
    weights: Tensor | float = 1.0,
    *,
    hidden: Tensor | None = None,
    probe: Tensor | None = None,
    reference: Tensor | None = None,
    transform: str = "identity",
    beta: float = 0.0,
    seed: Tensor | int = 0,
    position: Tensor | int = 0,
) -> BlockSelection:
    """Choose one of K candidates a row: argmax, or a draw from softmax(utility / beta) (Q-Probe).

    utility = sum_r weights[r] * u_r, where u_r is the score itself or its LSC form
    log sigmoid(score - reference) (LSC). A head of weight 0 is skipped, not multiplied.

    Args:
        scores: [B, K, R], fp32, bf16 or fp16; or None, and then
        hidden, probe: [B, K, D] and [R, D]; the scores are hidden . probe (a bias changes no choice).
        weights: a number or [R].
        reference: [B, R] or [R], with transform "lsc": the score of the reference response; None is 0.
        transform: "identity" or "lsc".
        beta: 0 is argmax, ties to the lowest index; > 0 draws with the uniform of (seed, position).
        seed, position: a number or int64 [B]. The stream differs from `tilt_sample`'s.

    Returns:
        BlockSelection: index int64 [B], probability fp32 [B, K], utility fp32 [B, K]. A utility that is
        NaN ranks as -inf and is returned as such. Where every candidate has -inf, argmax gives index 0 and
        the draw is uniform; candidates at +inf share the draw.

    Raises:
        ValueError: a shape, dtype, device or parameter is out of range; the message names it.
    """
    if (scores is None) == (hidden is None) or (hidden is None) != (probe is None):
        fail(OP, "give either scores, or hidden and probe")
    given = scores if scores is not None else hidden
    assert given is not None
    name, shape = ("scores", "[B, K, R]") if scores is not None else ("hidden", "[B, K, D]")
    if given.dim() != 3 or 0 in given.shape[1:]:
        fail(OP, f"{name} must have shape {shape} with K >= 1, got {list(given.shape)}")
    check_float(OP, given, name)
    batch, device = given.shape[0], given.device
    heads = given.shape[2]
    if probe is not None:
        if probe.dim() != 2 or probe.shape[1] != given.shape[2] or len(probe) == 0:
            fail(OP, f"probe must have shape [R, {given.shape[2]}], got {list(probe.shape)}")
        check_float(OP, probe, "probe")
        heads = len(probe)
    if transform not in TRANSFORMS:
        fail(OP, f"transform must be one of {TRANSFORMS}, got {transform!r}")
    if not (beta == 0 or SMALLEST <= beta < math.inf):
        fail(OP, f"beta must be 0 or a number >= {SMALLEST}, got {beta}")
    w = head_weights(OP, weights, heads, 1, device)[0]
    if reference is not None:
        if transform != "lsc":
            fail(OP, "reference goes with transform='lsc' (a mere shift changes no choice)")
        if reference.shape not in ((heads,), (batch, heads)):
            fail(OP, f"reference must have shape [{heads}] or [{batch}, {heads}], got {list(reference.shape)}")
        reference = reference.to(device=device, dtype=torch.float32).expand(batch, heads)
    for other, tensor in (("probe", probe), ("reference", reference)):
        if tensor is not None and tensor.device != device:
            fail(OP, f"{other} is on {tensor.device}, {name} on {device}")
    arguments = (scores, hidden, probe, w, reference, transform == "lsc", float(beta))
    if device.type == "cpu" and not traced(given):  # numbers go down as they are
        cells = (cell(OP, value, name, batch, device) for name, value in (("seed", seed), ("position", position)))
        return _select_block_cpu(*arguments, *cells)
    columns = (column(OP, value, name, batch, device) for name, value in (("seed", seed), ("position", position)))
    return BlockSelection(*torch.ops.pyengine.select_block(*arguments, *columns))


def _select_block_gpu(scores: Tensor | None, hidden: Tensor | None, probe: Tensor | None, *rest: Any) -> BlockSelection:
    """rest: weights, reference, lsc, beta, seed, position."""
    backend = gpu_backend(OP)
    launched(OP, backend)
    if backend != "reference":
        kernels = cuda if backend == "cuda" else triton_kernels("select_block")
        assert kernels is not None
        return BlockSelection(*kernels.select_block(*unit_strides(scores, hidden, probe), *rest))
    weights, against, lsc, beta, seed, position = rest
    if scores is None:
        assert hidden is not None
        assert probe is not None
        scores = hidden.double() @ probe.double().T
    options = {"transform": "lsc" if lsc else "identity", "beta": beta, "seed": seed, "position": position}
    return reference.select_block(scores, weights, against, **options)


def _select_block_cpu(
    scores: Tensor | None,
    hidden: Tensor | None,
    probe: Tensor | None,
    weights: Tensor,
    against: Tensor | None,
    lsc: bool,
    beta: float,
    seed: Tensor | float,
    position: Tensor | float,
) -> BlockSelection:
    isa = instruction_set()
    launched(OP, isa)
    given = scores if scores is not None else hidden
    assert given is not None
    batch, branches, _ = given.shape
    out = BlockSelection(
        given.new_empty(batch, dtype=torch.int64),
        given.new_empty(batch, branches, dtype=torch.float32),
        given.new_empty(batch, branches, dtype=torch.float32),
    )
    read = unit_stride(given) if scores is None else scores.float().contiguous()
    probe = None if probe is None else probe.float().contiguous()
    _C.select_block(
        select_arguments(read, probe, weights, against, lsc, beta, seed, position, out),
        torch.get_num_threads(),
        isa,
    )
    return out


def _select_block_fake(scores: Tensor | None, hidden: Tensor | None, *_: object) -> tuple[Tensor, ...]:
    given = scores if scores is not None else hidden
    assert given is not None
    shape = given.shape[:2]
    dtypes = ((shape[:1], torch.int64), (shape, torch.float32), (shape, torch.float32))
    return tuple(given.new_empty(size, dtype=dtype) for size, dtype in dtypes)


library.impl("select_block", _select_block_cpu, "CPU")
library.impl("select_block", _select_block_gpu, "CUDA")
torch.library.register_fake("pyengine::select_block", _select_block_fake, lib=library)
