"""The state of a row of linear_logprob and its arithmetic.

fp32 [FIELDS, N, splits]: per row and split the maximum m of the log2-unit logits x, the sums s = sum e, s2 = sum e^2
and sx = sum e (x - m) with e = 2^(x - m), and the target's x. One exp an element yields LSE(l), LSE(2 l), entropy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyengine.kernels.algebra import LN2, LOG2E, NEVER, rescale

FIELDS = tl.constexpr(5)
LANES = tl.constexpr(32)  # of a warp, which folds by itself: no barrier, and each lane has sums of its own


@triton.jit
def capped(z, softcap, CAPPED: tl.constexpr):
    """softcap * tanh(z / softcap) and its derivative by z; z and 1 without a softcap."""
    if CAPPED:
        a = tl.exp2(tl.abs(z / softcap) * (-2.0 * LOG2E))
        tanh = tl.where(z < 0, a - 1, 1 - a) / (1 + a)
        return softcap * tanh, 4 * a / ((1 + a) * (1 + a))  # 1 - tanh^2, without its cancellation
    return z, tl.full(z.shape, 1.0, tl.float32)


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
def lanes_merged(m, s, s2, sx):
    """The sums of several disjoint sets of tokens [LANES] as those of their union; of no token they are 0."""
    top = tl.max(m, 0)
    shift = tl.where(top == NEVER, 0.0, top)
    factor = tl.exp2(m - shift)
    moved = tl.where(s == 0, 0.0, (sx + s * (m - shift)) * factor)
    return top, tl.sum(s * factor, 0), tl.sum(s2 * factor * factor, 0), tl.sum(moved, 0)


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


def new_state(target: Tensor, splits: int = 1) -> Tensor:
    """Room for the sums of len(target) rows, to be opened by `fold` at start = 0; more splits suit few rows."""
    return target.new_empty((FIELDS.value, len(target), splits), dtype=torch.float32)


def finish(state: Tensor, target: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, ...]:
    """logp, lse, lse2, max_logit and entropy, fp32 [N] each, in nats; all 0 where target is ignore_index."""
    _, rows, splits = state.shape
    outputs = tuple(state.new_empty(rows) for _ in range(5))
    if rows:
        padded = triton.next_power_of_2(splits)
        together = max(1, LANES.value // padded)  # rows of a warp
        finish_kernel[(triton.cdiv(rows, together),)](
            state,
            target,
            *outputs,
            rows,
            splits,
            ignore_index,
            ROWS=together,
            SPLITS=padded,
            num_warps=1,
        )
    return outputs
