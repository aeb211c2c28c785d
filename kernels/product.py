"""The matrix product inside the fused heads: a tile of hidden states against a tile of the vocabulary."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def product(
    rows,
    tokens,
    row_there,
    token_there,
    width,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    INNER: tl.constexpr,
):
    """fp32 [ROWS, TOKENS] from pointers to the rows [ROWS, INNER] and to the tokens [INNER, TOKENS]."""
    inner = tl.arange(0, INNER)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for first in range(0, width, INNER):
        there = inner < width - first
        a = tl.load(rows + first, mask=row_there & there[None, :], other=0.0)
        b = tl.load(tokens + first, mask=token_there & there[:, None], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        # Three TF32 products keep fp32 inputs at fp32 precision on tensor cores; other types ignore it.
        total = tl.dot(a, b, total, input_precision="tf32x3")
    return total


def upcast(x: Tensor) -> bool:
    """Whether products must widen their operands: the interpreter, which alone takes CPU tensors, has no bf16 dot."""
    return x.device.type == "cpu"
