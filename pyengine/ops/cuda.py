"""The CUDA kernels of `pyengine._C` on tensors: the arguments of the torch.library ops, outputs and scratch allocated.

Nothing here checks or synchronises: arguments are those that `pyengine.ops` hands to torch.library,
all on one device. Launches go to the current stream, so a CUDA graph can capture them. The caching
allocator keeps the workspace alive: memory freed on a stream is not given to another before it is done.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyengine._C as _C
from pyengine.ops.common import DTYPE_CODE, unit_stride
from pyengine.reference import BlockSelection, TiltSample


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _column(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.stride(0)


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
    logits = unit_stride(logits)
    (batch, vocab), device = logits.shape, logits.device
    heads: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0, 0)
    if values is not None and weights is not None:
        values = unit_stride(values)
        code = DTYPE_CODE[values.dtype]
        heads = (len(values), values.data_ptr(), code, *values.stride()[:2], weights.data_ptr(), *weights.stride())
    mask = None if mask is None else unit_stride(mask)
    token = torch.empty(batch, dtype=torch.int64, device=device)
    logp_base = torch.empty(batch, dtype=torch.float32, device=device)
    logp_policy = torch.empty(batch, dtype=torch.float32, device=device)
    kl = torch.empty(batch, dtype=torch.float32, device=device)
    valid = torch.empty(batch, dtype=torch.bool, device=device)
    workspace = torch.empty(_C.cuda_tilt_workspace(batch, vocab), dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        _C.cuda_tilt_sample(
            (batch, vocab, logits.data_ptr(), DTYPE_CODE[logits.dtype], logits.stride(0)),
            heads,
            (0, 0) if mask is None else _column(mask),
            _column(temperature),
            _column(top_k),
            _column(top_p),
            _column(min_p),
            _column(seed),
            _column(position),
            gumbel,
            tuple(x.data_ptr() for x in (token, logp_base, logp_policy, kl, valid)),
            workspace.data_ptr(),
            _stream(device),
        )
    return TiltSample(token, logp_base, logp_policy, kl, valid)


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
    along: tuple[int, ...] = (0, 0, 0, 0, 0)
    if probe is not None:
        along = (probe.data_ptr(), DTYPE_CODE[probe.dtype], probe.shape[1], *probe.stride())
    index = torch.empty(batch, dtype=torch.int64, device=device)
    probability = torch.empty(batch, branches, dtype=torch.float32, device=device)
    utility = torch.empty(batch, branches, dtype=torch.float32, device=device)
    with torch.cuda.device(device):
        _C.cuda_select_block(
            (batch, branches, len(weights), given.data_ptr(), DTYPE_CODE[given.dtype], *given.stride()),
            along,
            _column(weights),
            (0, 0, 0) if reference is None else (reference.data_ptr(), *reference.stride()),
            lsc,
            beta,
            _column(seed),
            _column(position),
            (index.data_ptr(), probability.data_ptr(), utility.data_ptr()),
            _stream(device),
        )
    return BlockSelection(index, probability, utility)
