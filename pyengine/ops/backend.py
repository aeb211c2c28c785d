"""Which implementation serves an op: one table, and PYENGINE_GPU_BACKEND over it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyengine.ops.common import cuda_built, fail, instruction_set, triton_kernels
from pyengine.ops.settings import settings


class OnGpu(NamedTuple):
    """An op on a GPU: its file in kernels/, and what serves it, the first that is there first."""

    stem: str
    backends: tuple[str, ...]


# On a CPU every op is C++. "reference" is plain PyTorch, for comparison and where nothing else is there.
# head_tilt_sample is fused by Triton alone: by another, the logits are made first and that backend's tilt_sample draws.
ON_GPU = {
    "tilt_sample": OnGpu("tilt", ("cuda", "triton", "reference")),
    "select_block": OnGpu("select_block", ("cuda", "triton", "reference")),
    "head_tilt_sample": OnGpu("head_tilt", ("triton", "cuda", "reference")),
    "linear_logprob": OnGpu("linear_logprob", ("triton", "reference")),
    "logits_logprob": OnGpu("linear_logprob", ("triton", "reference")),
    "linear_preference": OnGpu("linear_logprob", ("triton", "reference")),
    "tree_attention": OnGpu("tree_attention", ("triton", "reference")),
}


def backend(op: str, x: Tensor) -> str:
    """What serves `op` on the device of x: an instruction set of the CPU kernels, or one of the op's in ON_GPU."""
    return gpu_backend(op) if x.is_cuda else instruction_set()


@torch._dynamo.assume_constant_result  # a graph keeps what it was compiled with
def gpu_backend(op: str) -> str:
    """The backend that is asked for, where the op has it, else the first that is there.

    ValueError where the one that is asked for is the op's and not there.
    """
    stem, names = ON_GPU[op]
    asked = settings.gpu_backend
    if asked not in names:
        return next(name for name in names if _there(name, stem))
    if not _there(asked, stem):
        fail(op, f"PYENGINE_GPU_BACKEND={asked}, but that backend is not available here")
    return asked


def _there(name: str, stem: str) -> bool:
    if name == "cuda":
        return cuda_built()
    return name == "reference" or triton_kernels(stem) is not None
