"""The CUDA kernels of `pyengine._C` on tensors: the arguments of the torch.library ops, outputs and scratch allocated.

Nothing here checks or synchronises: arguments are those that `pyengine.ops` hands to torch.library,
all on one device. Launches go to the current stream, so a CUDA graph can capture them. The caching
allocator keeps the workspace alive: memory freed on a stream is not given to another before it is done.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pyengine._C as _C
from pyengine.ops.arguments import row_arguments, select_arguments, tilt_arguments
from pyengine.reference import BlockSelection, TiltSample


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def tilt_sample(
    logits: Tensor,
    values: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    gumbel: bool,
) -> TiltSample:
    (batch, vocab), device = logits.shape, logits.device
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    out = TiltSample(
        torch.empty(batch, dtype=torch.int64, device=device),
        torch.empty(batch, **fp32),
        torch.empty(batch, **fp32),
        torch.empty(batch, **fp32),
        torch.empty(batch, dtype=torch.bool, device=device),
    )
    workspace = torch.empty(_C.cuda_tilt_workspace(batch, vocab), dtype=torch.uint8, device=device)
    rows = row_arguments(logits, values, weights, mask, temperature, seed, position)
    given = tilt_arguments(rows, top_k, top_p, min_p, gumbel, out)
    with torch.cuda.device(device):
        _C.cuda_tilt_sample(given, workspace.data_ptr(), _stream(device))
    return out


def select_block(
    scores: Tensor | None,
    hidden: Tensor | None,
    probe: Tensor | None,
    weights: Tensor,
    reference: Tensor | None,
    lsc: bool,
    beta: float,
    seed: Tensor,
    position: Tensor,
) -> BlockSelection:
    given = scores if scores is not None else hidden
    assert given is not None
    (batch, branches), device = given.shape[:2], given.device
    out = BlockSelection(
        torch.empty(batch, dtype=torch.int64, device=device),
        torch.empty(batch, branches, dtype=torch.float32, device=device),
        torch.empty(batch, branches, dtype=torch.float32, device=device),
    )
    arguments = select_arguments(given, probe, weights, reference, lsc, beta, seed, position, out)
    with torch.cuda.device(device):
        _C.cuda_select_block(arguments, _stream(device))
    return out
