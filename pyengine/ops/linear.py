"""The linear layers of a decode step on a CPU, the few rows of a batch times a large fp32 weight, and their norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyengine._C as _C
from pyengine.ops.common import instruction_set, launched, traced

OP = "linear"
FEW = 32  # rows: at 48 oneDNN is as quick
SMALL = 2**15  # numbers that one thread normalises: as many as torch gives to one


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, without a gradient: x [..., D], weight [N, D], bias [N], all fp32 on a CPU -> [..., N].

    Up to FEW rows the weight streams past all of them once, and a row's bits do not depend on the other rows; more go
    to oneDNN.
    """
    if not _few(x, weight) or traced(x):
        return torch.ops.mkldnn._linear_pointwise(x, _describable(weight), bias, "none", [], "")
    launched(OP, instruction_set())
    return _streamed(x, weight, bias)


def _few(x: Tensor, weight: Tensor) -> bool:
    width = weight.shape[1]
    return x.shape[-1] == width and 0 < x.numel() <= FEW * width and x.is_contiguous() and weight.is_contiguous()


def _describable(weight: Tensor) -> Tensor:
    """The weight, or a copy where its rows share or interleave their numbers: oneDNN refuses those."""
    rows, width = weight.shape
    row, number = weight.stride()
    apart = (number == 1 and row >= width) or (row == 1 and number >= rows)
    return weight if apart else weight.contiguous()


def _streamed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outputs, width = weight.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    rows, threads = x.numel() // width, torch.get_num_threads()
    _C.linear(rows, outputs, width, x, weight, bias, out, threads, instruction_set())
    return out


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T by whoever is quickest, without a gradient: x [N, D], weight [V, D] or [R, V, D] -> [N, V] or [R, N, V]."""
    if not (quicker() and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32):
        return x @ weight.mT
    return linear(x, weight) if weight.dim() == 2 else torch.stack([linear(x, head) for head in weight])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, without a gradient; contiguous fp32 on a CPU."""
    width = len(weight)
    out = torch.empty_like(x)
    _C.rms_norm(x.numel() // width, width, x, weight, eps, out, instruction_set())
    return out


Forwards = list[tuple[torch.nn.Module, Callable[[Tensor], Tensor]]]


def quick_forwards(model: Any) -> Forwards:
    """What a model's fp32 linear layers and RMS norms do, through the functions above, on CPUs that are not Intel's.

    torch sends linear layers to MKL, which takes 1.1 to 3 times as long as oneDNN there (Zen 4, 1 to 1,024 rows), and
    oneDNN reads a weight for 2 to 8 rows at half to two thirds of the memory's speed. A norm is six operators of
    torch, 55 us of a decode step where ours is 20. To be removed when torch does better itself
    (aten/src/ATen/native/Linear.cpp).
    """
    if not quicker():
        return []
    found: Forwards = []
    for module in filter(_serves, model.modules()):
        if type(module) is torch.nn.Linear:
            found.append((module, partial(_product, module)))
        elif _is_rms_norm(module):
            found.append((module, partial(_norm, module, type(module).forward)))
    return found


def served(forwards: Forwards) -> Forwards:
    """Those of the modules that nobody has hooked, moved or cast since."""
    return [(module, forward) for module, forward in forwards if _serves(module)]


def patch(forwards: Forwards) -> None:
    """The modules have these forwards until `unpatch`; past nn.Module's setter, which takes twenty times as long.

    One that its owner has given since `served` looked, as a scorer may between two passes, stays.
    """
    for module, forward in forwards:
        module.__dict__.setdefault("forward", forward)


def unpatch(forwards: Forwards) -> None:
    """The modules have their own forwards, however many of them were patched."""
    for module, forward in forwards:
        if module.__dict__.get("forward") is forward:
            del module.__dict__["forward"]


@contextmanager
def lent(forwards: Forwards) -> Iterator[None]:
    """Inside, the modules have these forwards; those that somebody else has hooked, moved or cast keep their own."""
    serving = served(forwards)
    try:
        patch(serving)
        yield
    finally:
        unpatch(serving)


def _serves(module: Any) -> bool:
    if type(getattr(module, "weight", None)) is not torch.nn.Parameter or "forward" in vars(module):
        return False
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in module.parameters(recurse=False))


# A step has 85 products and 25 norms: who else watches is not asked for each, nor are launches counted, 10 us a time.
def _product(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if x.dtype != torch.float32 or torch.is_grad_enabled():  # autocast; a thread that trains while another decodes
        return torch.nn.functional.linear(x, weight, bias)
    return _streamed(x, weight, bias) if _few(x, weight) else linear(x, weight, bias)


def _norm(module: Any, otherwise: Any, x: Tensor) -> Tensor:
    weight = module.weight
    if torch.is_grad_enabled():
        return otherwise(module, x)
    if x.dtype == torch.float32 and 0 < x.numel() <= SMALL and x.shape[-1:] == weight.shape and x.is_contiguous():
        return rms_norm(x, weight, module.variance_epsilon)
    return otherwise(module, x)


def _is_rms_norm(module: Any) -> bool:
    """By its name and by what it does: some of that name multiply by 1 + weight, or in another precision."""
    weight, eps = module.weight, getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return False
    if weight.dim() != 1 or not weight.is_contiguous() or not len(weight):
        return False
    with torch.inference_mode():
        x = torch.linspace(-1, 2, len(weight))[None]
        return torch.allclose(module(x), rms_norm(x, weight, eps), rtol=1e-5, atol=1e-6)


@cache
def quicker() -> bool:
    """Whether torch's own products are slower here: it has both libraries, and the CPU is not Intel's."""
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        intel = True  # unknown: as torch does
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and not intel
