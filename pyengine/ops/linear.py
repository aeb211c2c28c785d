"""The linear layers of a decode step on a CPU: the few rows of a batch times a large fp32 weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyengine._C as _C
from pyengine.ops.common import instruction_set, launched, traced

OP = "linear"
FEW = 16  # rows: beyond, oneDNN reads the weight again for fewer of them than we do


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, without a gradient: x [..., D], weight [N, D], bias [N], all fp32 on a CPU -> [..., N].

    Up to FEW rows the weight streams past all of them once, and a row's bits do not depend on the other rows; more go
    to oneDNN.
    """
    rows, width = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    if not 0 < rows <= FEW or not width or not (x.is_contiguous() and weight.is_contiguous()) or traced(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    isa, outputs = instruction_set(), len(weight)
    launched(OP, isa)
    out = x.new_empty(*x.shape[:-1], outputs)
    _C.linear(rows, outputs, width, x, weight, bias, out, torch.get_num_threads(), isa)
    return out


@contextmanager
def quick_products(model: Any) -> Iterator[None]:
    """Inside, fp32 linear layers of a model go to `linear` on CPUs that are not Intel's.

    torch sends them to MKL, which takes 1.1 to 3 times as long as oneDNN there (Zen 4, 1 to 1,024 rows), and oneDNN
    reads a weight for 2 to 16 rows at half to two thirds of the memory's speed. To be removed when torch does better
    itself (aten/src/ATen/native/Linear.cpp).
    """
    layers = []
    if torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and not _made_by_intel():
        layers = [
            layer
            for layer in model.modules()
            if type(layer) is torch.nn.Linear
            and layer.weight.dtype == torch.float32
            and layer.weight.device.type == "cpu"
            and "forward" not in vars(layer)  # somebody else's hook
        ]
    for layer in layers:
        layer.forward = partial(_product, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _product(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:  # autocast
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    return linear(x, layer.weight, layer.bias)


@cache
def _made_by_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # unknown: as torch does
