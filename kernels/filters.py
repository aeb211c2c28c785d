"""Top-k, top-p and min-p of one row, exactly and without a sort.

The filters keep a prefix of the order (tilt descending, id ascending): all tokens above a threshold and the
first few ties at it. The threshold is bisected over the order of fp32 bit patterns, so every search ends
whatever the logits hold. Block maxima from the first launch spare the blocks below a probe, and the tokens
that matter, usually tens to hundreds, are searched in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyengine.kernels.algebra import BLOCK, LOG2E, NEVER, gumbel

GROUP = tl.constexpr(4)  # blocks that a pass over the row reads at once: 16 tokens a thread at 8 warps
CAPACITY = tl.constexpr(4096)  # tokens searched in registers: 16 a thread at 8 warps
LOWEST = tl.constexpr(-0x7F800001)  # key_of(-inf)
DEPTH = tl.constexpr(12.0)  # log2 units below the maximum in which a nucleus is expected


@triton.jit
def read(row, token, wanted, HEADS: tl.constexpr, MASKED: tl.constexpr):
    """Logits, delta = sum_r weights[r] * values[r] and the tilt in log2 units, of the tokens of one row.

    Tokens that are unwanted, masked or beyond the vocabulary have logit and tilt -inf. The tilt is formed
    here alone, by explicit fused multiply-adds: passes that rounded differently would disagree on ties.
    """
    logits, mask, values, values_head, weights, weights_head, vocab, unit, use_values = row
    wanted &= token < vocab
    logit = tl.load(logits + token, mask=wanted, other=NEVER).to(tl.float32)
    if MASKED:
        logit = tl.where(tl.load(mask + token, mask=wanted, other=0) != 0, logit, NEVER)
    delta = tl.zeros_like(logit)
    for r in tl.static_range(HEADS):
        head = tl.full([], r, tl.int64)  # head * values_head passes 2^31 at a few thousand rows
        weight = tl.load(weights + head * weights_head) * use_values
        # A head of weight 0 is skipped, not multiplied: its NaN must not show, nor its bytes be read.
        readable = wanted & (token < tl.where(weight == 0, 0, vocab))
        value = tl.load(values + head * values_head + token, mask=readable, other=0.0)
        delta = tl.fma(value.to(tl.float32), weight, delta)
    delta = tl.where(logit == NEVER, 0.0, delta)  # no value revives a forbidden token
    return logit, delta, tl.fma(logit, unit, delta * LOG2E)


@triton.jit
def read_group(row, tops, group, least, HEADS: tl.constexpr, MASKED: tl.constexpr):
    """Tokens, deltas and tilts [GROUP * BLOCK] of the group's blocks; those with a maximum below least are not read.

    The tile is loaded in two dimensions: a mask that is visibly the same along a block keeps 16-byte loads.
    """
    block = group * GROUP + tl.arange(0, GROUP)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    top = tl.load(tops + block, mask=block * BLOCK < row[6], other=NEVER)
    _, delta, tilt = read(row, token, (top >= least)[:, None], HEADS, MASKED)
    flat: tl.constexpr = [GROUP * BLOCK]
    return tl.reshape(token, flat), tl.reshape(delta, flat), tl.reshape(tilt, flat)


@triton.jit
def key_of(x):
    """The rank of an fp32 scalar among all floats, as int64; value_of inverts it."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def value_of(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def bisect(x, amount, above, goal, low, high):
    """The highest key in [low, high) at which above + the amounts of x at or over it reach goal; low if none."""
    while high - low > 1:
        middle = (low + high) >> 1
        reached = above + tl.sum(tl.where(x >= value_of(middle), amount, 0.0), 0) >= goal
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
    return low


@triton.jit
def gather(row, tops, survivors, least, below, highest, HEADS: tl.constexpr, MASKED: tl.constexpr):
    """Count and mass, relative to highest, of the tokens with least <= tilt < below.

    Their tilts go to `survivors` as far as it holds them; its sole owner is this program.
    """
    count = tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.float64)
    tl.debug_barrier()  # every thread is done with the survivors of the last gather
    for group in range(0, tl.cdiv(row[6], GROUP * BLOCK)):
        _, _, tilt = read_group(row, tops, group, least, HEADS, MASKED)
        chosen = (tilt >= least) & (tilt < below) & (tilt > NEVER)
        place = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(survivors + place, tilt, mask=chosen & (place < CAPACITY))
        count += tl.sum(chosen.to(tl.int32), 0)
        mass += tl.sum(tl.where(chosen, tl.exp2(tilt - highest), 0.0), 0)
    tl.debug_barrier()  # the survivors that other threads stored are visible
    return count, mass


@triton.jit
def search(
    row,
    tops,
    survivors,
    probe,
    low,
    goal,
    highest,
    BY_MASS: tl.constexpr,
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The highest key >= low at or above which the tokens' count (or mass) reaches goal, low if none does.

    Returns the key with the count and the mass strictly above it. A first gather at `probe` usually ends
    it; otherwise the interval is halved, at most 33 times, until its tokens fit the registers.
    """
    high = key_of(highest) + 1
    count_above = tl.zeros([], tl.int32)
    mass_above = tl.zeros([], tl.float64)
    held = tl.full([], CAPACITY + 1, tl.int32)  # tokens in [low, high), once they lie in survivors
    opening = tl.full([], True, tl.int1)
    while (held > CAPACITY) & (high - low > 1):
        count, mass = gather(row, tops, survivors, value_of(probe), value_of(high), highest, HEADS, MASKED)
        amount = mass_above + mass if BY_MASS else (count_above + count).to(tl.float64)
        reached = (amount >= goal) | (probe <= low)  # that low reaches it is given, whatever rounding says
        held = tl.where(reached, count, CAPACITY + 1)
        count_above += tl.where(reached, 0, count)
        mass_above += tl.where(reached, 0.0, mass)
        low, high = tl.where(reached, probe, low), tl.where(reached, high, probe)
        # After a first miss take the rest at once: a row that a grammar leaves few tokens ends there.
        probe = tl.where(opening & (reached == 0), low, (low + high) >> 1)
        opening = opening & False
    index = tl.arange(0, CAPACITY)
    tilt = tl.load(survivors + index, mask=index < tl.where(held > CAPACITY, 0, held), other=NEVER)
    weight = tl.exp2(tilt - highest)
    one = tl.where(tilt > NEVER, 1.0, 0.0)
    if BY_MASS:
        low = bisect(tilt, weight, mass_above, goal, low, high)
    else:
        low = bisect(tilt, one, count_above.to(tl.float64), goal, low, high)
    above = tilt > value_of(low)
    count_above += tl.sum(tl.where(above, one, 0.0), 0).to(tl.int32)
    return low, count_above, mass_above + tl.sum(tl.where(above, weight, 0.0), 0)


@triton.jit
def kept_prefix(
    row,
    tops,
    survivors,
    top,
    highest,
    mass,
    top_k,
    top_p,
    min_p,
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What top-k, then top-p, then min-p keep, as (threshold, ties, least).

    Kept are the tokens above the threshold and, of those at it, the first `ties` by id, provided that they
    reach `least`. `top` holds the maxima of the blocks, `tops` points to them, `mass` is the row's sum
    relative to its maximum, `highest`; top_k = 0 is off.
    """
    vocab = row[6]
    low = tl.full([], LOWEST, tl.int64)
    ties = vocab + tl.zeros([], tl.int32)
    near = key_of(highest - DEPTH)
    if top_k > 0:
        # The k-th largest block maximum: at least k tokens reach it, and rarely many more.
        goal = top_k.to(tl.float64)
        one = tl.where(top > NEVER, 1.0, 0.0)
        probe = bisect(top, one, 0.0, goal, low, key_of(highest) + 1)
        probe = tl.where(probe == low, near, probe)
        low, count, mass = search(row, tops, survivors, probe, low, goal, highest, False, HEADS, MASKED)
        ties = (top_k - count).to(tl.int32)
        at_threshold = tl.exp2(value_of(low) - highest)
        mass += tl.where(at_threshold > 0, ties * at_threshold, 0.0)
    if top_p < 1:
        goal = top_p.to(tl.float64) * mass
        probe = tl.where(top_k > 0, low, near)
        found, _, mass_above = search(row, tops, survivors, probe, low, goal, highest, True, HEADS, MASKED)
        # Ties weigh the same: the prefix ends with the first that brings the mass to the goal.
        at_threshold = tl.exp2(value_of(found) - highest).to(tl.float64)
        needed = (goal - mass_above) / tl.where(at_threshold > 0, at_threshold, 1.0)
        needed = tl.where(at_threshold > 0, tl.minimum(tl.maximum(tl.ceil(needed), 1.0), vocab), vocab).to(tl.int32)
        ties = tl.where(found == low, tl.minimum(needed, ties), needed)
        low = found
    return value_of(low), ties, tl.where(min_p > 0, highest + tl.log2(min_p), NEVER)


@triton.jit
def kept_sums(
    row,
    tops,
    threshold,
    ties,
    least,
    highest,
    blocks,
    seed,
    position,
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
    GUMBEL: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The row's sums over its kept tokens alone.

    Returns the sums of the blocks [BLOCKS] relative to highest, sum e * delta, the last tie that is kept,
    and the token of the best Gumbel key.
    """
    groups = tl.arange(0, BLOCKS // GROUP)[:, None]
    sums = tl.zeros([BLOCKS // GROUP, GROUP], tl.float32)
    e_delta = tl.zeros([], tl.float64)
    tied = tl.zeros([], tl.int32)
    last_tie = tl.full([], -1, tl.int32)
    best, best_key = tl.zeros([], tl.int32), tl.full([], NEVER, tl.float32)
    for group in range(0, tl.cdiv(blocks, GROUP)):
        token, delta, tilt = read_group(row, tops, group, tl.maximum(threshold, least), HEADS, MASKED)
        tie = (tilt == threshold).to(tl.int32)
        first_ties = (tie > 0) & (tied + tl.cumsum(tie, 0) <= ties)
        kept = ((tilt > threshold) | first_ties) & (tilt >= least) & (tilt > NEVER)
        tied += tl.sum(tie, 0)
        last_tie = tl.maximum(last_tie, tl.max(tl.where(first_ties, token, -1), 0))
        e = tl.where(kept, tl.exp2(tilt - highest), 0.0)
        e_delta += tl.sum(tl.where(kept, e * (delta * LOG2E), 0.0), 0)
        block_sums = tl.sum(tl.reshape(e, [GROUP, BLOCK]), 1)
        sums = tl.where(groups == group, block_sums[None, :], sums)
        if GUMBEL:
            counter = group * (GROUP * BLOCK // 4) + tl.arange(0, GROUP * BLOCK // 4)
            noise = gumbel(seed, position, counter[None, :])
            key = tl.where(kept, tilt, NEVER) + tl.reshape(noise, [GROUP * BLOCK])
            group_key, at = tl.max(key, 0, return_indices=True)
            best = tl.where(group_key > best_key, group * GROUP * BLOCK + at, best)
            best_key = tl.maximum(best_key, group_key)
    return tl.reshape(sums, [BLOCKS]), e_delta, last_tie, best
