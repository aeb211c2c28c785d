"""Tiles of logits: the GEMM that makes them, the epilogue that folds them, the gradient they turn into.

What `linear_logprob` and `linear_preference` share. A tile is [n, columns], in the type of
the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pyengine._C as _C
from pyengine.ops import common
from pyengine.ops.common import DTYPE_CODE, SMALLEST, check_float, fail, instruction_set
from pyengine.reference import TokenLogprob

# A tile's tokens and columns. 4,096 columns: wide enough for a CPU GEMM's full rate at 1,024 tokens, 16 MB in
# fp32. On a GPU 4,096 by 4,096 in bf16 is 33 MB, which an H200's 50 MB of L2 hold until it is folded.
TOKENS, TOKENS_GPU = 1024, 4096
COLUMNS = 4096
# Tokens up to which a GPU fuses the forward's product and epilogue in one kernel: there the GEMM waits for the
# weight's bytes anyway. By reasoning, not yet measured.
FUSED_TOKENS = 128
_STATE = 6  # csrc/algebra.h kStateSize


class Head(NamedTuple):
    """How logits come from products: l = softcap * tanh((z + bias) / softcap) / temperature."""

    vocab: int
    bias: Tensor | None  # fp32, contiguous
    temperature: float
    softcap: float | None
    ignore_index: int


def make_head(
    weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None, ignore_index: int
) -> Head:
    offsets = None if bias is None else bias.detach().float().contiguous()
    return Head(len(weight), offsets, temperature, softcap, ignore_index)


def columns(vocab: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each tile; the starts are multiples of 1,024, so that sums do not depend on the width."""
    return ((start, min(start + COLUMNS, vocab)) for start in range(0, vocab, COLUMNS))


def multiply(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """hidden [n, D] . weight [columns, D]^T, written to the front of `buffer`."""
    rows, columns = len(hidden), len(weight)
    return torch.mm(hidden, weight.T, out=buffer[: rows * columns].view(rows, columns))


def triton_runs(x: Tensor) -> bool:
    """Whether the epilogue of x's tiles is Triton's: on a GPU. Elsewhere it is C++."""
    return x.is_cuda


def tokens(x: Tensor) -> int:
    return TOKENS_GPU if triton_runs(x) else TOKENS


def _triton() -> ModuleType:
    kernels = common.triton_kernels("linear_logprob")
    if kernels is None:
        raise RuntimeError("log-probabilities on a GPU need Triton: pip install triton")
    return kernels


def new_state(target: Tensor) -> Tensor:
    """Running moments of the tokens target [n]: on a CPU rows of csrc/algebra.h RowMoments."""
    if triton_runs(target):
        return _triton().new_state(target)
    state = target.new_zeros(len(target), _STATE, dtype=torch.float64)
    state[:, 0] = state[:, 5] = -math.inf
    return state


def fold(tile: Tensor, start: int, head: Head, target: Tensor, state: Tensor) -> None:
    """Fold a tile that begins at vocabulary id `start` into the state; the tiles come in order. target: [n]."""
    if triton_runs(tile):
        _triton().fold(tile, start, target, state, **_numbers(head))
        return
    _C.fold_logits(
        *tile.shape,
        start,
        tile,
        DTYPE_CODE[tile.dtype],
        head.bias,
        head.softcap or 0.0,
        head.temperature,
        target,
        state,
        torch.get_num_threads(),
        instruction_set(),
    )


def _numbers(head: Head) -> dict[str, Any]:
    return {
        "bias": head.bias,
        "temperature": head.temperature,
        "softcap": head.softcap,
        "ignore_index": head.ignore_index,
    }


class RowGradient(NamedTuple):
    """What turns a tile into its gradient, each fp32 [n]: the row's lse, entropy, d loss / d logp and, or None,
    d loss / d entropy."""

    lse: Tensor
    entropy: Tensor
    by_logp: Tensor
    by_entropy: Tensor | None


def in_place(x: Tensor) -> bool:
    """Whether the gradient of x's tiles may overwrite them; the CPU kernel writes fp32 alone."""
    return x.dtype == torch.float32 or triton_runs(x)


def differentiate(tile: Tensor, start: int, head: Head, target: Tensor, rows: RowGradient, scratch: Tensor) -> Tensor:
    """d loss / d product [n, columns], in place of the tile or, unless `in_place`, at the front of scratch."""
    out = tile if in_place(tile) else scratch[: tile.numel()].view(tile.shape)
    return gradient_into(out, tile, start, head, target, rows)


def gradient_into(out: Tensor, tile: Tensor, start: int, head: Head, target: Tensor, rows: RowGradient) -> Tensor:
    """out [n, columns] = d loss / d product."""
    if triton_runs(tile):
        by_entropy = torch.zeros_like(rows.lse) if rows.by_entropy is None else rows.by_entropy
        known = (rows.lse, rows.entropy, rows.by_logp, by_entropy)
        return _triton().grad_tile(tile, start, target, *known, **_numbers(head), out=out)
    _C.logit_gradient(
        *tile.shape,
        start,
        tile,
        DTYPE_CODE[tile.dtype],
        head.bias,
        head.softcap or 0.0,
        head.temperature,
        target,
        *rows,
        out,
        torch.get_num_threads(),
        instruction_set(),
    )
    return out


class Gradients:
    """Gradients of hidden, weight and bias, as far as they are wanted, summed over tiles in fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]) -> None:
        # fp16 is left to the end: a loss scaler's factor must reach the gradient before it is rounded.
        rounded = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        self.hidden = hidden.new_zeros(hidden.shape, dtype=rounded) if wanted[0] else None  # ignored rows have none
        self.weight = hidden.new_empty(weight.shape, dtype=torch.float32) if wanted[1] else None
        wants_bias = bias is not None and wanted[2]
        self.bias = hidden.new_zeros(len(weight), dtype=torch.float32) if wants_bias else None
        self.wanted = any(wanted)
        self._weight_set = False

    def add(
        self,
        tiles: Iterator[tuple[int, int, Tensor]],
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor,
    ) -> None:
        """Add the gradients of one set of rows [n], given as (start, end, gradient [n, columns])."""
        of_rows = hidden.new_zeros(hidden.shape, dtype=torch.float32) if self.hidden is not None else None
        for start, end, gradient in tiles:
            if of_rows is not None:
                _accumulate(of_rows, gradient, weight[start:end], True)
            if self.weight is not None:
                _accumulate(self.weight[start:end], gradient.T, hidden, self._weight_set)
            if self.bias is not None:
                self.bias[start:end] += gradient.sum(0, dtype=torch.float32)
        self._weight_set = True
        if self.hidden is not None and of_rows is not None:
            self.hidden[rows] = of_rows.to(self.hidden.dtype)

    def results(self, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
        """In the types of the inputs, but fp32 instead of fp16; None where it was not wanted."""
        if self.weight is not None and not self._weight_set:
            self.weight.zero_()
        of_weight = self.weight
        if of_weight is not None and weight.dtype != torch.float16:
            of_weight = of_weight.to(weight.dtype)
        of_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return [self.hidden, of_weight, of_bias]


def operator_gradients(
    found: list[Tensor | None], given: tuple[Tensor, Tensor, Tensor | None], fp16: torch.dtype = torch.float16
) -> list[Tensor]:
    """As an operator returns them: in the shapes and types of hidden, weight and bias, empty where not wanted.

    fp16: the type for what is given in fp16.
    """
    pairs = zip(found, given, strict=True)
    return [
        given[0].new_empty(0) if g is None or x is None else g.view(x.shape).to(_in_place_of(x.dtype, fp16))
        for g, x in pairs
    ]


def fake_gradients(
    given: tuple[Tensor, Tensor, Tensor | None], wanted: list[bool], fp16: torch.dtype = torch.float16
) -> list[Tensor]:
    """What `operator_gradients` returns, without the numbers."""
    return [
        x.new_empty(x.shape, dtype=_in_place_of(x.dtype, fp16)) if x is not None and want else given[0].new_empty(0)
        for x, want in zip(given, wanted, strict=True)
    ]


def _in_place_of(kind: torch.dtype, fp16: torch.dtype) -> torch.dtype:
    return fp16 if kind == torch.float16 else kind


def _accumulate(total: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """total = a . b, plus total if `add`; the product is not rounded to a half type before it is added."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b.float(), beta=float(add), out=total)
    else:
        torch.addmm(total, a, b, beta=float(add), out_dtype=torch.float32, out=total)


def finish(state: Tensor, head: Head, target: Tensor) -> TokenLogprob:
    """The fields in nats from running moments in log2 units; fp64 on a CPU, fp32 on a GPU."""
    if triton_runs(state):
        return _marked(_triton().finish(state, target, ignore_index=head.ignore_index), head, target)
    m, s, s2, w, wanted, top = state.unbind(-1)
    lse = m + s.log2()
    found = (wanted - m - s.log2(), lse, 2 * m + s2.log2(), top, s.log2() - w / s)
    bad = ~lse.isfinite()
    return TokenLogprob(*((field * math.log(2)).masked_fill(bad, math.nan) for field in found))


def fused(hidden: Tensor, weight: Tensor, head: Head, target: Tensor) -> TokenLogprob:
    """The fields from one Triton kernel around the product itself: no tile is written."""
    numbers = (head.temperature, head.softcap, head.ignore_index)
    return _marked(_triton().fused_forward(hidden, weight, head.bias, target, *numbers), head, target)


def whole_rows(logits: Tensor, head: Head, target: Tensor) -> TokenLogprob:
    """The fields of logits that lie in memory, through Triton, which splits long rows between programs."""
    numbers = {"temperature": head.temperature, "softcap": head.softcap, "ignore_index": head.ignore_index}
    return _marked(_triton().logits_logprob(logits, target, **numbers), head, target)


def _marked(fields: Sequence[Tensor], head: Head, target: Tensor) -> TokenLogprob:
    """The fields of the Triton kernels, NaN throughout where the row or its target is bad: so that no gradient
    passes for right."""
    out = TokenLogprob(*fields)
    outside = ((target < 0) | (target >= head.vocab)) & (target != head.ignore_index)
    bad = outside | ~out.lse.isfinite()
    return TokenLogprob(*(field.masked_fill(bad, math.nan) for field in out))


def kept_rows(op: str, target: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Indices of the rows that are not ignored; their targets are checked.

    On a GPU all rows: to find them would synchronise, and the kernels skip ignored ones.
    """
    if triton_runs(target):
        return torch.arange(len(target), device=target.device)
    return check_labels(op, target, vocab, ignore_index)


def check_labels(op: str, target: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Indices of the rows that are not ignored; ValueError for a target outside the vocabulary. Synchronises."""
    kept = (target != ignore_index).nonzero()[:, 0]
    labels = target[kept]
    wrong = ((labels < 0) | (labels >= vocab)).nonzero()
    if len(wrong):
        row = int(kept[wrong[0, 0]])
        fail(op, f"target {target[row].item()} in row {row} is outside [0, {vocab}) and is not {ignore_index}")
    return kept


def check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    check_float(op, hidden, "hidden")
    if hidden.dim() < 2 or weight.dim() != 2 or 0 in weight.shape or hidden.shape[-1] != weight.shape[1]:
        fail(op, f"hidden must be [..., D] and weight [V, D], got {list(hidden.shape)} and {list(weight.shape)}")
    if weight.dtype != hidden.dtype:
        fail(op, f"weight is {weight.dtype}, hidden {hidden.dtype}; they must agree")
    if target.shape != hidden.shape[:-1]:
        fail(op, f"target must have shape {list(hidden.shape[:-1])}, got {list(target.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        fail(op, f"bias must have shape [{len(weight)}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            fail(op, f"{name} is on {tensor.device}, hidden on {hidden.device}")
    check_target(op, target, hidden.device)


def check_target(op: str, target: Tensor, device: torch.device) -> None:
    if target.dtype != torch.int64:
        fail(op, f"target must be int64, got {target.dtype}")
    if target.device != device:
        fail(op, f"target is on {target.device}, the rest on {device}")


def check_numbers(op: str, temperature: float, softcap: float | None) -> None:
    if not SMALLEST <= temperature < math.inf:
        fail(op, f"temperature must be a number > 0, got {temperature}")
    if softcap is not None and not SMALLEST <= softcap < math.inf:
        fail(op, f"softcap must be a number > 0 or None, got {softcap}")
