"""What all ops share: parameter columns, the kernels there are, the torch.library handle, the count of launches."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections import Counter
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import pyengine._C as _C
from pyengine.errors import SMALLEST
from pyengine.ops.settings import settings

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/algebra.h DType

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

BEST_ISA = _C.instruction_set()

# "op/kernel" -> calls: which kernel really ran. Tests read it; nothing else depends on it.
LAUNCHES: Counter[str] = Counter()

library = torch.library.Library("pyengine", "DEF")


def fail(op: str, message: str) -> NoReturn:
    raise ValueError(f"{op}: {message}")


def launched(op: str, kernel: str) -> None:
    LAUNCHES[f"{op}/{kernel}"] += 1


def instruction_set() -> str:
    """What the CPU kernels run with."""
    return settings.cpu_isa or BEST_ISA


class _Team(threading.local):
    size: int | None = None


TEAM = _Team()  # set while torch's own operators are held to one thread, and ours are not


def threads() -> int:
    """How many threads our CPU kernels take: torch's number."""
    return TEAM.size or torch.get_num_threads()


_PLAIN = (Tensor, torch.nn.Parameter)


def traced(x: Tensor) -> bool:
    """Whether somebody (torch.compile, a fake or functional tensor, a dispatch mode) watches the ops.

    Otherwise the dispatcher is passed by: it costs 5 us, a tenth of a row of 128,256 logits.
    """
    return torch.compiler.is_compiling() or type(x) not in _PLAIN or is_in_torch_dispatch_mode()


@functools.cache
def triton_kernels(stem: str) -> ModuleType | None:
    """pyengine.kernels.<stem>, or None where Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    return importlib.import_module(f"pyengine.kernels.{stem}")


def cuda_built() -> bool:
    """Whether the CUDA C++ kernels were compiled into this build."""
    return bool(_C.cuda_architectures())


def number(op: str, value: float, name: str) -> float:
    """The checked number."""
    if not isinstance(value, (int, float)):
        fail(op, f"{name} must be a number or a tensor, got {type(value).__name__}")
    dtype, low, high = _PARAMETERS[name]
    if not low <= value <= high or (name == "temperature" and 0 < value < SMALLEST):
        fail(op, f"{name} must be a number in {low} .. {high}, got {value}")
    if dtype is torch.int64 and int(value) != value:
        fail(op, f"{name} must be a whole number, got {value}")
    return value


@functools.lru_cache(maxsize=1024)
def _constant(value: float, name: str, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=_PARAMETERS[name][0], device=device)


# Constants that a captured CUDA graph goes on reading, held for the life of the process.
_CAPTURED: dict[tuple[float, str, torch.device], Tensor] = {}


def _number_column(op: str, value: float, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A checked number as a tensor with stride 0."""
    number(op, value, name)
    # While somebody traces, a tensor may be a fake one; seeds and positions change with every call.
    once = torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or name in ("seed", "position")
    found = (_constant.__wrapped__ if once else _constant)(value, name, device)
    if device.type == "cuda" and not once and torch.cuda.is_current_stream_capturing():
        found = _CAPTURED.setdefault((value, name, device), found)
    return found.expand(shape)


def column(op: str, value: Tensor | float, name: str, batch: int, device: torch.device) -> Tensor:
    """A tensor of shape [B] from a number or a tensor."""
    if not isinstance(value, Tensor):
        return _number_column(op, value, name, (batch,), device)
    dtype = _PARAMETERS[name][0]
    # One comparison at a time: under torch.compile the batch may be symbolic beside a constant tensor.
    if not (value.dim() == 0 or (value.dim() == 1 and (value.shape[0] == 1 or value.shape[0] == batch))):
        fail(op, f"{name} must be a number or have shape [{batch}], got {list(value.shape)}")
    if value.dtype.is_floating_point and not dtype.is_floating_point:
        fail(op, f"{name} must be an integer tensor, got {value.dtype}")
    return value.to(device=device, dtype=dtype).expand(batch)


def cell(op: str, value: Tensor | float, name: str, batch: int, device: torch.device) -> Tensor | float:
    """What `column` gives, with a number left as it is: the CPU kernels take both."""
    return number(op, value, name) if isinstance(value, (int, float)) else column(op, value, name, batch, device)


def head_weights(op: str, weights: Tensor | float | None, heads: int, batch: int, device: torch.device) -> Tensor:
    """λ as [B, R] from a number, [R] or [B, R]."""
    if isinstance(weights, (int, float)):
        return _number_column(op, weights, "weights", (batch, heads), device)
    w = torch.as_tensor(weights, dtype=torch.float32, device=device)
    ends = w.dim() == 0 or w.shape[-1] == heads
    if not (ends and (w.dim() < 2 or (w.dim() == 2 and w.shape[0] == batch))):
        fail(op, f"weights must be a number or have shape [{heads}] or [{batch}, {heads}], got {list(w.shape)}")
    return w.expand(batch, heads)


def check_float(op: str, x: Tensor, name: str) -> None:
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        fail(op, f"{name} is inside vmap or a torch.func transform, which the kernels do not support")
    if x.dtype not in DTYPE_CODE:
        fail(op, f"{name} must be float32, bfloat16 or float16, got {x.dtype}")


def check_mask(op: str, mask: Tensor, batch: int, vocab: int, device: torch.device) -> Tensor:
    """The mask as bool [B, V], a row repeated with stride 0."""
    if mask.dtype != torch.bool or mask.shape not in ((batch, vocab), (vocab,)):
        fail(op, f"mask must be bool [{batch}, {vocab}] or [{vocab}], got {mask.dtype} {list(mask.shape)}")
    if mask.device != device:
        fail(op, f"mask is on {mask.device}, logits on {device}")
    return mask.expand(batch, vocab)


def unit_stride(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def unit_strides(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else unit_stride(x) for x in tensors)
