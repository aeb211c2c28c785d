"""Tiles of logits: the GEMM that makes them, the epilogue that folds them, the gradient they turn into.

What `linear_logprob` and `linear_preference` share. A tile is [n, columns], in the type of the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import pyengine._C as _C
from pyengine.ops import common
from pyengine.ops.common import DTYPE_CODE, check_float, fail
from pyengine.reference import TokenLogprob

# 4,096 columns: wide enough for the GEMM's full rate at 1,024 tokens; 16 MB in fp32.
TOKENS, COLUMNS = 1024, 4096
_STATE = 6  # csrc/algebra.h kStateSize


class Head(NamedTuple):
    """How logits come from products: l = softcap * tanh((z + bias) / softcap) / temperature."""

    vocab: int
    bias: Tensor | None  # fp32, contiguous
    temperature: float
    softcap: float | None


def make_head(weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> Head:
    return Head(len(weight), None if bias is None else bias.detach().float().contiguous(), temperature, softcap)


def columns(vocab: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each tile; the starts are multiples of 1,024, so that sums do not depend on the width."""
    return ((start, min(start + COLUMNS, vocab)) for start in range(0, vocab, COLUMNS))


def multiply(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """hidden [n, D] . weight [columns, D]^T, written to the front of `buffer`."""
    rows, columns = len(hidden), len(weight)
    return torch.mm(hidden, weight.T, out=buffer[: rows * columns].view(rows, columns))


def new_state(rows: int) -> Tensor:
    """Running moments of `rows` tokens: csrc/algebra.h RowMoments."""
    state = torch.zeros(rows, _STATE, dtype=torch.float64)
    state[:, 0] = state[:, 5] = -math.inf
    return state


def fold(tile: Tensor, start: int, head: Head, target: Tensor, state: Tensor) -> None:
    """Fold a tile that begins at vocabulary id `start` into state [n, 6]. target: [n]."""
    _C.fold_logits(
        (*tile.shape, start, head.vocab, tile.data_ptr(), DTYPE_CODE[tile.dtype], tile.stride(0)),
        0 if head.bias is None else head.bias.data_ptr(),
        head.softcap or 0.0,
        head.temperature,
        target.data_ptr(),
        state.data_ptr(),
        common.FORCED_ISA,
    )


class RowGradient(NamedTuple):
    """What turns a tile into its gradient, each fp32 [n]: the row's lse, entropy, d loss / d logp and, or None,
    d loss / d entropy."""

    lse: Tensor
    entropy: Tensor
    by_logp: Tensor
    by_entropy: Tensor | None


def differentiate(tile: Tensor, start: int, head: Head, target: Tensor, rows: RowGradient, out: Tensor) -> None:
    """out [n, columns], fp32, = d loss / d product. `out` may be the tile itself."""
    _C.logit_gradient(
        (*tile.shape, start, head.vocab, tile.data_ptr(), DTYPE_CODE[tile.dtype], tile.stride(0)),
        0 if head.bias is None else head.bias.data_ptr(),
        head.softcap or 0.0,
        head.temperature,
        target.data_ptr(),
        rows.lse.data_ptr(),
        rows.entropy.data_ptr(),
        rows.by_logp.data_ptr(),
        0 if rows.by_entropy is None else rows.by_entropy.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        common.FORCED_ISA,
    )


class Gradients:
    """Gradients of hidden, weight and bias, as far as they are wanted, summed over tiles in fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]) -> None:
        device = hidden.device
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None  # ignored rows have none
        self.weight = torch.empty(weight.shape, device=device) if wanted[1] else None
        self.bias = torch.zeros(bias.shape, device=device) if bias is not None and wanted[2] else None
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
        of_rows = torch.zeros(hidden.shape, device=hidden.device) if self.hidden is not None else None
        for start, end, gradient in tiles:
            if of_rows is not None:
                of_rows.addmm_(gradient, weight[start:end].float())
            if self.weight is not None:
                part, beta = self.weight[start:end], float(self._weight_set)
                torch.addmm(part, gradient.T, hidden.float(), beta=beta, out=part)
            if self.bias is not None:
                self.bias[start:end] += gradient.sum(0)
        self._weight_set = True
        if self.hidden is not None and of_rows is not None:
            self.hidden[rows] = of_rows.to(self.hidden.dtype)

    def results(self, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
        """In the types of the inputs; None where it was not wanted."""
        if self.weight is not None and not self._weight_set:
            self.weight.zero_()
        of_weight = None if self.weight is None else self.weight.to(weight.dtype)
        of_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return [self.hidden, of_weight, of_bias]


def finish(state: Tensor) -> TokenLogprob:
    """The fields in nats, fp64, from running moments in log2 units."""
    m, s, s2, w, target, top = state.unbind(-1)
    lse = m + s.log2()
    fields = (target - m - s.log2(), lse, 2 * m + s2.log2(), top, s.log2() - w / s)
    bad = ~lse.isfinite()
    return TokenLogprob(*((field * math.log(2)).masked_fill(bad, math.nan) for field in fields))


def kept_rows(op: str, target: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Indices of the rows that are not ignored; their targets are checked."""
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
    if not 0 < temperature < math.inf:
        fail(op, f"temperature must be a number > 0, got {temperature}")
    if softcap is not None and not 0 < softcap < math.inf:
        fail(op, f"softcap must be a number > 0 or None, got {softcap}")
