"""The linear layers of a decode step on a CPU, the few rows of a batch times a large fp32 weight, and their norms.

`quick_forwards` are what a model's modules do by default, `steady_forwards` what they do where no bit of a row may
depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import pyengine._C as _C
from pyengine.errors import InputError
from pyengine.ops.common import DTYPE_CODE, TEAM, instruction_set, launched, threads, traced

OP = "linear"
FEW = 32  # rows: at 48 oneDNN is as quick
INT8 = 3  # csrc/algebra.h DType
WIDENED = 2**20  # numbers of an int8 weight at a time: 4 MB
SMALL = 2**15  # numbers that one thread normalises: as many as torch gives to one
VECTORS = 64  # numbers that the longest of torch's vectorised loops takes at once: two vectors of 32 bf16
MIXING = {"GLU", "LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin"}  # act on more than each number


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


def _streamed(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    outputs, width = weight.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    code, rows = INT8 if scale is not None else DTYPE_CODE[weight.dtype], x.numel() // width
    _C.linear(rows, outputs, width, x, weight, code, scale, bias, out, threads(), instruction_set())
    return out


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, steady: bool = False) -> Tensor:
    """x (scale * W)^T + b, without a gradient: int8 weight [N, D] with a scale and a bias [N], fp32, for each output.

    x [..., D], fp32, bf16 or fp16 on a CPU -> [..., N], summed in fp32 and rounded to the type of x. The weight streams
    past up to FEW rows, or any number where `steady`, whose bits then depend on each row alone; for more it is widened
    in pieces that stay in a cache.
    """
    if x.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"{OP}: x has a width of {x.shape[-1]}, the weight of {weight.shape[1]}")
    if weight.dtype != torch.int8 or any(t is not None and t.dtype != torch.float32 for t in (scale, bias)):
        raise RuntimeError(f"{OP}: int8 weights have a scale and a bias in fp32: the layer was cast")
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(f"{OP}: int8 weights have no gradient: load the model without quantize to train it")
    wide = x.float().contiguous()
    if steady or (0 < x.numel() <= FEW * weight.shape[1] and not traced(x)):
        return _streamed(wide, weight, bias, scale).to(x.dtype)
    step = max(1, WIDENED // weight.shape[1])
    parts = [product(wide, part.float()) for part in weight.split(step)]
    out = torch.cat(parts, -1) * scale
    return (out if bias is None else out + bias).to(x.dtype)


def steady_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, without a gradient, whose row's bits depend on that row and the weights alone, not on the threads.

    x [..., D], weight [N, D] and bias [N] on a CPU, fp32, bf16 or fp16 -> [..., N], summed in fp32 and rounded to the
    type of x. Any number of rows.
    """
    if x.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"{OP}: x has a width of {x.shape[-1]}, the weight of {weight.shape[1]}")
    bias = None if bias is None else bias.float()
    return _streamed(x.float().contiguous(), weight.contiguous(), bias).to(x.dtype)


class Int8Linear(torch.nn.Module):
    """A linear layer whose weight [N, D] is int8 with an fp32 scale [N]: the largest number of each output is 127."""

    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (weight / scale[:, None]).round_().to(torch.int8)
        self.weight = torch.nn.Parameter(rounded, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale, self.bias)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, the quickest way, without a gradient: x [N, D], weight [V, D] or [R, V, D] -> [N, V] or [R, N, V]."""
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
    """What a model's fp32 linear layers and RMS norms do, through the functions above, where torch has MKL and oneDNN.

    torch sends linear layers to MKL, which takes 1.1 to 3 times as long as oneDNN on Zen 4 (1 to 1,024 rows), and
    oneDNN reads a weight for 2 to 8 rows at half to two thirds of the memory's speed. On Sapphire Rapids MKL takes 1.1
    times as long as ours for 1 row, 1.9 for 4 and 8, 1.2 for 16, .9 for 32, and as long as oneDNN above. A norm is six
    operators of torch, 55 us of a decode step where ours is 20. To be removed when torch does better itself
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


def steady_forwards(model: Any) -> Forwards:
    """What a model's linear layers, fp32 RMS norms and activations do where a row's bits may depend on that row alone.

    torch's products sum in another order for another number of rows. Its vectorised activations take another exp for
    the numbers that are left at the end of a tensor, which are another row's where the width is no multiple of a
    vector: they get a width that is. (They do so at the end of a thread's share, too, hence `hold_threads`.)
    InputError for one of them that cannot be served.
    """
    found: Forwards = []
    for name, module in model.named_modules():
        forward = type(module).forward
        types = DTYPE_CODE
        if forward is torch.nn.Linear.forward:
            ours: Callable[[Tensor], Tensor] = partial(_steady_product, module)
        elif type(module) is Int8Linear:
            ours, types = partial(_steady_int8, module), {torch.int8: INT8}
        elif forward is Conv1D.forward:
            ours = partial(_steady_transposed, module)
        elif _is_activation(module):
            ours = partial(_whole_vectors, forward.__get__(module))
        elif _serves(module) and _is_rms_norm(module):
            ours = partial(_steady_norm, module)
        else:
            continue
        parameters = list(module.parameters(recurse=False))
        if "forward" in vars(module) or any(x.dtype not in types or x.device.type != "cpu" for x in parameters):
            raise InputError(f"batch_invariant: {name} has a forward, dtype or device that ours cannot stand in for")
        found.append((module, ours))
    return found


def _steady_product(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    return steady_linear(x, layer.weight, layer.bias)


def _steady_int8(layer: Int8Linear, x: Tensor) -> Tensor:
    return int8_linear(x, layer.weight, layer.scale, layer.bias, steady=True)


def _steady_transposed(layer: Any, x: Tensor) -> Tensor:
    return steady_linear(x, layer.weight.t(), layer.bias)


def _steady_norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x.contiguous(), module.weight, module.variance_epsilon)


def _whole_vectors(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    width = x.shape[-1]
    if width % VECTORS == 0:
        return activation(x.contiguous())
    return activation(torch.nn.functional.pad(x, (0, -width % VECTORS)))[..., :width]


def _is_activation(module: Any) -> bool:
    """Whether it is an activation of torch's or transformers' that acts on each number alone."""
    home, name = type(module).__module__, type(module).__name__
    at_home = home in ("torch.nn.modules.activation", "transformers.activations")
    return at_home and name not in MIXING and not list(module.children())


@contextmanager
def steady(*models: Any) -> Iterator[None]:
    """Inside, the layers of these modules are steady, and torch's operators run on one thread."""
    forwards = [found for model in models for found in steady_forwards(model)]
    before = threads_held()
    # Given back once more where an interrupt cuts the first time short.
    try:
        try:
            hold_threads()
            patch(forwards)
            yield
        finally:
            unpatch(forwards)
            release_threads(before)
    except BaseException:
        unpatch(forwards)
        release_threads(before)
        raise


def check_patched(forwards: Forwards) -> None:
    """InputError where a module that was patched has a forward of its owner's."""
    for module, forward in forwards:
        if module.__dict__["forward"] is not forward:
            raise InputError(f"batch_invariant: a {type(module).__name__} has been given a forward while it decodes")


Threads = tuple[int, int | None]  # torch's, and what our kernels take where that is another number


def threads_held() -> Threads:
    return torch.get_num_threads(), TEAM.size


def hold_threads() -> None:
    """torch's operators run on one thread from now on, our kernels on as many as torch has had."""
    TEAM.size = threads()
    torch.set_num_threads(1)


def release_threads(before: Threads) -> None:
    """As `threads_held` found them."""
    torch.set_num_threads(before[0])
    TEAM.size = before[1]


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
    """Whether torch has both libraries, of which it takes the slower one."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
