"""Token log-probabilities, their moments and entropy from logits [N, V], from tiles of them, or from a fused head.

All three share one state, fp32 [FIELDS, N, splits]: per row and split the maximum m of the log2-unit
logits x, the sums s = sum e, s2 = sum e^2 and sx = sum e (x - m) with e = 2^(x - m), and the target's x.
One exp an element yields LSE(l), LSE(2 l) and the entropy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyengine.kernels.algebra import LN2, LOG2E, NEVER, rescale
from pyengine.kernels.product import product, upcast

FIELDS = tl.constexpr(5)
TILE = tl.constexpr(4096)  # logits that a program reads at once: 16 a thread at 8 warps
SPLIT = 32768  # logits of a row that one program folds; fixed, so that a row's bits do not depend on N
HEAD_SPLIT = 2048  # vocabulary that one program of the fused head goes through
FINISH_ROWS = 16


@triton.jit
def capped(z, softcap, CAPPED: tl.constexpr):
    """softcap * tanh(z / softcap) and its derivative by z; z and 1 without a softcap."""
    if CAPPED:
        a = tl.exp2(tl.abs(z / softcap) * (-2.0 * LOG2E))
        tanh = tl.where(z < 0, a - 1, 1 - a) / (1 + a)
        return softcap * tanh, 4 * a / ((1 + a) * (1 + a))  # 1 - tanh^2, without its cancellation
    return z, tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def opened():
    """The state of a row before its first logit: m, s, s2, sx and the target's x."""
    zero = tl.zeros([1], tl.float32)
    return zero + NEVER, zero, zero, zero, zero


@triton.jit
def tile_sums(x, axis: tl.constexpr):
    """m, s, s2 and sx of a tile [ROWS, TOKENS] along its last dimension; sums of a row of -inf are 0."""
    m = tl.max(x, axis)
    shifted = x - tl.where(m == NEVER, 0.0, m)[:, None]
    e = tl.exp2(shifted)
    return m, tl.sum(e, axis), tl.sum(e * e, axis), tl.sum(tl.where(x == NEVER, 0.0, e * shifted), axis)


@triton.jit
def merge(m, s, s2, sx, other_m, other_s, other_s2, other_sx):
    """The sums of two disjoint sets of tokens as those of their union. NaN in any sum survives."""
    top = tl.maximum(m, other_m)
    keep, add = rescale(m, top), rescale(other_m, top)
    # sum e (x - top) = 2^(m - top) (sum e (x - m) + (m - top) sum e); an empty sum moves by nothing.
    moved = tl.where(s == 0, 0.0, (sx + s * (m - top)) * keep)
    moved += tl.where(other_s == 0, 0.0, (other_sx + other_s * (other_m - top)) * add)
    return top, s * keep + other_s * add, s2 * keep * keep + other_s2 * add * add, moved


@triton.jit
def load_state(state, at, step, inside):
    return (
        tl.load(state + at, mask=inside, other=NEVER),
        tl.load(state + at + step, mask=inside, other=0.0),
        tl.load(state + at + 2 * step, mask=inside, other=0.0),
        tl.load(state + at + 3 * step, mask=inside, other=0.0),
        tl.load(state + at + 4 * step, mask=inside, other=0.0),
    )


@triton.jit
def store_state(state, at, step, inside, m, s, s2, sx, target_x):
    tl.store(state + at, m, mask=inside)
    tl.store(state + at + step, s, mask=inside)
    tl.store(state + at + 2 * step, s2, mask=inside)
    tl.store(state + at + 3 * step, sx, mask=inside)
    tl.store(state + at + 4 * step, target_x, mask=inside)


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
):
    """One program a (row, split): one pass over its logits, online, into its own slot of the state."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    wanted = tl.load(target + row)
    if wanted == ignore_index:
        return
    one = tl.arange(0, 1)
    at, step = row * splits + split + one, rows.to(tl.int64) * splits
    m, s, s2, sx, target_x = opened()
    if start > 0:
        m, s, s2, sx, target_x = load_state(state, at, step, one == 0)
    for first in range(split * span, tl.minimum((split + 1) * span, columns), TILE):
        column = first + tl.arange(0, TILE)[None, :]
        inside = column < columns
        z = tl.load(logits + row * logits_row + column, mask=inside, other=NEVER).to(tl.float32)
        if BIASED:
            z += tl.load(bias + start + column, mask=inside, other=0.0).to(tl.float32)
        x, _ = capped(z, softcap, CAPPED)
        x = tl.where(inside, x * scale, NEVER)
        tile_m, tile_s, tile_s2, tile_sx = tile_sums(x, 1)
        m, s, s2, sx = merge(m, s, s2, sx, tile_m, tile_s, tile_s2, tile_sx)
        target_x += tl.sum(tl.where(inside & (start + column == wanted), x, 0.0), 1)
    store_state(state, at, step, one == 0, m, s, s2, sx, target_x)


@triton.jit(do_not_specialize=["rows", "splits"])
def finish_kernel(
    state,
    target,
    logp_out,
    lse_out,
    lse2_out,
    max_out,
    entropy_out,
    rows,
    splits,
    ignore_index,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Merge the splits of ROWS rows, in their order, and turn the sums into the outputs, in nats."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)[None, :]
    kept = tl.load(target + row, mask=row < rows, other=ignore_index) != ignore_index
    inside = kept[:, None] & (split < splits)
    at = row[:, None].to(tl.int64) * splits + split
    m, s, s2, sx, target_x = load_state(state, at, rows.to(tl.int64) * splits, inside)
    top = tl.max(m, 1)
    factor = rescale(m, top[:, None])
    moved = tl.where(s == 0, 0.0, (sx + s * (m - top[:, None])) * factor)
    total = tl.sum((s * factor).to(tl.float64), 1)
    total2 = tl.sum((s2 * factor * factor).to(tl.float64), 1)
    mean = tl.sum(moved.to(tl.float64), 1) / tl.where(total == 0, 1.0, total)  # E[x] - m
    log_s = tl.log2(total)
    lse = top + log_s
    bad = total != total
    top = tl.where(bad, float("nan"), top)
    logp = tl.sum(target_x, 1) - lse
    entropy = tl.where(total == 0, 0.0, log_s - mean)
    tl.store(logp_out + row, tl.where(kept, logp * LN2, 0.0).to(tl.float32), mask=row < rows)
    tl.store(lse_out + row, tl.where(kept, lse * LN2, 0.0).to(tl.float32), mask=row < rows)
    tl.store(lse2_out + row, tl.where(kept, (2 * top + tl.log2(total2)) * LN2, 0.0).to(tl.float32), mask=row < rows)
    tl.store(max_out + row, tl.where(kept, top * LN2, 0.0).to(tl.float32), mask=row < rows)
    tl.store(entropy_out + row, tl.where(kept, entropy * LN2, 0.0).to(tl.float32), mask=row < rows)


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
    column = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    inside = column < columns
    wanted = tl.load(target + row)
    d = tl.zeros([TILE], tl.float32)
    if wanted != ignore_index:
        z = tl.load(logits + row * logits_row + column, mask=inside, other=NEVER).to(tl.float32)
        if BIASED:
            z += tl.load(bias + start + column, mask=inside, other=0.0).to(tl.float32)
        x, slope = capped(z, softcap, CAPPED)
        log_p = x / temperature - tl.load(lse + row)
        p = tl.exp2(log_p * LOG2E)
        c, c_entropy = tl.load(coef_logp + row), tl.load(coef_entropy + row)
        d = c * (tl.where(start + column == wanted, 1.0, 0.0) - p)
        # d H / d x = -p (log p + H); at p = 0 that is 0, not 0 * inf.
        d -= tl.where(p == 0, 0.0, c_entropy * p * (log_p + tl.load(entropy + row)))
        d = d * slope / temperature
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


def new_state(target: Tensor, splits: int = 1) -> Tensor:
    """Room for the sums of len(target) rows, to be opened by `fold` at start = 0; more splits suit few rows."""
    return target.new_empty((FIELDS.value, len(target), splits), dtype=torch.float32)


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
    splits = state.shape[2]
    fold_kernel[(rows * splits,)](
        logits,
        logits.stride(0),
        logits if bias is None else bias,
        target,
        state,
        start,
        columns,
        triton.cdiv(triton.cdiv(columns, splits), TILE.value) * TILE.value,
        rows,
        splits,
        softcap or 1.0,
        LOG2E.value / temperature,
        ignore_index,
        BIASED=bias is not None,
        CAPPED=softcap is not None,
        num_warps=8,
    )


def finish(state: Tensor, target: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, ...]:
    """logp, lse, lse2, max_logit and entropy, fp32 [N] each, in nats; all 0 where target is ignore_index."""
    _, rows, splits = state.shape
    outputs = tuple(state.new_empty(rows) for _ in range(5))
    if rows:
        finish_kernel[(triton.cdiv(rows, FINISH_ROWS),)](
            state,
            target,
            *outputs,
            rows,
            splits,
            ignore_index,
            ROWS=FINISH_ROWS,
            SPLITS=triton.next_power_of_2(splits),
            num_warps=4,
        )
    return outputs


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
