"""Token log-probabilities, their moments and entropy from logits [N, V], from tiles of them, or from a fused head.

All three share one state, that of `moments.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyengine.kernels.algebra import LN2, LOG2E, NEVER
from pyengine.kernels.moments import (
    LANES,
    capped,
    finish,
    lanes_merged,
    load_state,
    merge,
    new_state,
    store_state,
    tile_sums,
)
from pyengine.kernels.product import product, upcast

SLICES = tl.constexpr(4)  # loads of 16 bytes that a lane has under way
SPLIT = 4096  # logits of a row that one program folds; fixed, so that a row's bits do not depend on N
TILE = tl.constexpr(4096)  # logits of a program of the gradient: 16 a thread at 8 warps
HEAD_SPLIT = 2048  # vocabulary that one program of the fused head goes through


@triton.jit
def fold_turn(
    logits,
    bias,
    first,
    columns,
    softcap,
    scale,
    m,
    s,
    s2,
    sx,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The sums of each lane after SLICES * LANES * VECTOR more logits; a lane's are reduced where they lie.

    m is in the logits' own units: their difference is scaled, as scaled ones, contracted into one instruction with the
    subtraction, would differ by the rounding of m, which at 1e10 makes the largest e 0 or infinite.
    """
    vector = tl.arange(0, SLICES)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    column = first + vector * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    if TAIL:
        inside = column < columns
        z = tl.load(logits + column, mask=inside, other=NEVER).to(tl.float32)
    else:
        z = tl.load(logits + column).to(tl.float32)
    if BIASED:
        z += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    z, _ = capped(z, softcap, CAPPED)
    if TAIL:
        z = tl.where(inside, z, NEVER)
    top = tl.maximum(m, tl.max(tl.max(z, 2), 0))
    shift = tl.where(top == NEVER, 0.0, top)
    by = (m - shift) * scale
    keep = tl.exp2(by)
    # sum e (x - top) = 2^(m - top) (sum e (x - m) + (m - top) sum e); an empty sum moves by nothing.
    sx = tl.where(s == 0, 0.0, (sx + s * by) * keep)
    x = (z - shift[None, :, None]) * scale
    e = tl.exp2(x)
    s = s * keep + tl.sum(tl.sum(e, 2), 0)
    s2 = s2 * keep * keep + tl.sum(tl.sum(e * e, 2), 0)
    sx += tl.sum(tl.sum(e * tl.maximum(x, -1e38), 2), 0)  # 0 * -inf must be 0
    return top, s, s2, sx


@triton.jit(do_not_specialize=["start", "rows", "splits"])
def fold_kernel(
    logits,
    logits_row,
    bias,
    target,
    state,
    start,
    columns,
    span,
    rows,
    splits,
    softcap,
    scale,
    ignore_index,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One warp a (row, split): one pass over its logits, online, into its own slot of the state."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    wanted = tl.load(target + row)
    if wanted == ignore_index:
        return
    logits += row * logits_row
    bias += start
    turn: tl.constexpr = SLICES * LANES * VECTOR
    first, last = split * span, tl.minimum((split + 1) * span, columns)
    m = tl.full([LANES], NEVER, tl.float32)
    s, s2, sx = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    whole = first + tl.maximum(last - first, 0) // turn * turn
    for begin in range(first, whole, turn):
        m, s, s2, sx = fold_turn(
            logits, bias, begin, columns, softcap, scale, m, s, s2, sx, BIASED, CAPPED, False, VECTOR
        )
    if whole < last:
        m, s, s2, sx = fold_turn(
            logits, bias, whole, columns, softcap, scale, m, s, s2, sx, BIASED, CAPPED, True, VECTOR
        )
    one = tl.arange(0, 1)
    m, s, s2, sx = lanes_merged(m * scale, s, s2, sx)
    m, s, s2, sx = m + one, s + one, s2 + one, sx + one
    at, step = row * splits + split + one, rows.to(tl.int64) * splits
    column = wanted - start + one
    here = (column >= first) & (column < last)
    z = tl.load(logits + column, mask=here, other=0.0).to(tl.float32)
    if BIASED:
        z += tl.load(bias + column, mask=here, other=0.0).to(tl.float32)
    x, _ = capped(z, softcap, CAPPED)
    target_x = tl.where(here, x * scale, 0.0)
    if start > 0:
        known_m, known_s, known_s2, known_sx, known_x = load_state(state, at, step, one == 0)
        m, s, s2, sx = merge(known_m, known_s, known_s2, known_sx, m, s, s2, sx)
        target_x += known_x
    store_state(state, at, step, one == 0, m, s, s2, sx, target_x)


@triton.jit(do_not_specialize=["start"])
def grad_kernel(
    logits,
    logits_row,
    grad,
    grad_row,
    bias,
    target,
    lse,
    entropy,
    coef_logp,
    coef_entropy,
    start,
    columns,
    softcap,
    temperature,
    ignore_index,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """d loss / d z of TILE logits of a row; grad may be logits itself, each element being read before it is written."""
    tiles = tl.cdiv(columns, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column_of_tile = (tl.program_id(0) % tiles) * TILE
    column = column_of_tile + tl.arange(0, TILE)
    inside = column < columns
    wanted = tl.load(target + row)
    d = tl.zeros([TILE], tl.float32)
    if wanted != ignore_index:
        z = tl.load(logits + row * logits_row + column, mask=inside, other=NEVER).to(tl.float32)
        if BIASED:
            z += tl.load(bias + start + column, mask=inside, other=0.0).to(tl.float32)
        z, slope = capped(z, softcap, CAPPED)
        log2_p = (z - tl.load(lse + row) * temperature) * (LOG2E / temperature)
        c, c_entropy = tl.load(coef_logp + row) / temperature, tl.load(coef_entropy + row) / temperature
        # c (1 at the target - p) - c_entropy p (log p + H), d H / d l being -p (log p + H); that is 0 at p = 0, where
        # log p is not: every p under 2^-149 is 0.
        by_p = (c + c_entropy * tl.load(entropy + row)) + (c_entropy * LN2) * tl.maximum(log2_p, -200.0)
        d = -(tl.exp2(log2_p) * by_p)
        hit = (wanted - start - column_of_tile).to(tl.int32)
        if (hit >= 0) & (hit < TILE):  # one tile of a row: the others compare nothing
            d += tl.where(tl.arange(0, TILE) == hit, c, 0.0)
        d *= slope
    tl.store(grad + row * grad_row + column, d.to(grad.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def head_kernel(
    hidden,
    hidden_row,
    weight,
    weight_row,
    bias,
    target,
    state,
    rows,
    vocab,
    width,
    splits,
    softcap,
    scale,
    SPAN: tl.constexpr,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    INNER: tl.constexpr,
):
    """ROWS rows against SPAN tokens of the vocabulary: a matrix product whose tiles never leave the registers.

    Programs that share a span follow one another, so that its weights are read from memory once.
    """
    row_tiles = tl.cdiv(rows, ROWS)
    split = tl.program_id(0) // row_tiles
    row = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, INNER)
    wanted = tl.load(target + row, mask=row < rows, other=-1)
    m, s, s2 = tl.full([ROWS], NEVER, tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    sx, target_x = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(split * SPAN, tl.minimum((split + 1) * SPAN, vocab), TOKENS):
        token = first + tl.arange(0, TOKENS)
        z = product(
            hidden + row.to(tl.int64)[:, None] * hidden_row + inner[None, :],
            weight + token.to(tl.int64)[None, :] * weight_row + inner[:, None],
            (row < rows)[:, None],
            (token < vocab)[None, :],
            width,
            UPCAST,
            ROWS,
            TOKENS,
            INNER,
        )
        if BIASED:
            z += tl.load(bias + token, mask=token < vocab, other=0.0).to(tl.float32)[None, :]
        x, _ = capped(z, softcap, CAPPED)
        x = tl.where((token < vocab)[None, :], x * scale, NEVER)  # padding must not add exp(0)
        tile_m, tile_s, tile_s2, tile_sx = tile_sums(x, 1)
        m, s, s2, sx = merge(m, s, s2, sx, tile_m, tile_s, tile_s2, tile_sx)
        target_x += tl.sum(tl.where(token[None, :] == wanted[:, None], x, 0.0), 1)
    at, step = row.to(tl.int64) * splits + split, rows.to(tl.int64) * splits
    store_state(state, at, step, row < rows, m, s, s2, sx, target_x)


def fold(
    logits: Tensor,
    start: int,
    target: Tensor,
    state: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> None:
    """Add the logits of the tokens start, start + 1, … to the state, in one pass; the tile at 0 comes first.

    Args:
        logits: [N, T], fp32, bf16 or fp16, before bias, softcap and temperature; rows may be strided.
        target: int64 [N].
        state: from `new_state`.
        bias: [V] of the whole vocabulary, or None.
    """
    rows, columns = logits.shape
    if rows == 0:
        return
    splits, vector = state.shape[2], 16 // logits.element_size()
    turn = SLICES.value * LANES.value * vector
    fold_kernel[(rows * splits,)](
        logits,
        logits.stride(0),
        logits if bias is None else bias,
        target,
        state,
        start,
        columns,
        triton.cdiv(triton.cdiv(columns, splits), turn) * turn,
        rows,
        splits,
        softcap or 1.0,
        LOG2E.value / temperature,
        ignore_index,
        BIASED=bias is not None,
        CAPPED=softcap is not None,
        VECTOR=vector,
        num_warps=1,
    )


def grad_tile(
    logits: Tensor,
    start: int,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    coef_logp: Tensor,
    coef_entropy: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    out: Tensor | None = None,
) -> Tensor:
    """d loss / d z, z the logits before softcap and temperature, into `out` or in place of the logits.

    Args:
        logits, start, target, bias: as in `fold`.
        lse, entropy: what `finish` gave, fp32 [N].
        coef_logp, coef_entropy: d loss / d logp and d loss / d entropy, fp32 [N].
        out: [N, T] of any float type; None overwrites the logits.
    """
    rows, columns = logits.shape
    out = logits if out is None else out
    if rows == 0:
        return out
    grad_kernel[(rows * triton.cdiv(columns, TILE.value),)](
        logits,
        logits.stride(0),
        out,
        out.stride(0),
        logits if bias is None else bias,
        target,
        lse,
        entropy,
        coef_logp,
        coef_entropy,
        start,
        columns,
        softcap or 1.0,
        temperature,
        ignore_index,
        BIASED=bias is not None,
        CAPPED=softcap is not None,
        num_warps=8,
    )
    return out


def logits_logprob(
    logits: Tensor, target: Tensor, *, temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100
) -> tuple[Tensor, ...]:
    """logp, lse, lse2, max_logit and entropy, fp32 [N] each, of logits [N, V] that lie in memory; see `finish`.

    Its backward is `grad_tile` at start = 0 with `out`.
    """
    state = new_state(target, triton.cdiv(logits.shape[1], SPLIT))
    fold(logits, 0, target, state, temperature=temperature, softcap=softcap, ignore_index=ignore_index)
    return finish(state, target, ignore_index=ignore_index)


def fused_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, ...]:
    """logp, lse, lse2, max_logit and entropy, fp32 [N] each, without logits in memory; see `finish`.

    Args:
        hidden: [N, D], fp32, bf16 or fp16; weight: [V, D] of the same type. Rows of both may be strided.
        bias: [V] or None; target: int64 [N].
    """
    rows, width = hidden.shape
    vocab = len(weight)
    state = new_state(target, triton.cdiv(vocab, HEAD_SPLIT))
    if rows:
        wide = hidden.dtype == torch.float32
        tile = {"ROWS": 64, "TOKENS": 64, "INNER": 32} if wide else {"ROWS": 128, "TOKENS": 128, "INNER": 64}
        head_kernel[(triton.cdiv(rows, tile["ROWS"]) * state.shape[2],)](
            hidden,
            hidden.stride(0),
            weight,
            weight.stride(0),
            weight if bias is None else bias,
            target,
            state,
            rows,
            vocab,
            width,
            state.shape[2],
            softcap or 1.0,
            LOG2E.value / temperature,
            SPAN=HEAD_SPLIT,
            BIASED=bias is not None,
            CAPPED=softcap is not None,
            UPCAST=upcast(hidden),
            **tile,
            num_warps=8,
            num_stages=3,
        )
    return finish(state, target, ignore_index=ignore_index)
