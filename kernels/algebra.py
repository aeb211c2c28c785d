"""The Triton twin of csrc/algebra.h: block accumulators, their merge, the final formulas, the random numbers.

Logits live in log2 units here too (x = logit * log2(e) / temperature). A tile is [ROWS, TOKENS], and
every sum runs along its last dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(1024)  # tokens; csrc/algebra.h kBlock
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(float("-inf"))  # the logit of a token that is forbidden or does not exist

TOKEN_STREAM = tl.constexpr(0)
SELECT_STREAM = tl.constexpr(1)
GUMBEL_STREAM = tl.constexpr(2)


@triton.jit
def rescale(source, target):
    """2^(source - target) for rescaling a sum; 1 between equal shifts, infinite ones included."""
    return tl.where(source == target, 1.0, tl.exp2(source - target))


@triton.jit
def log2_unit(temperature):
    """log2(e) / temperature, by which a logit is scaled; greedy rows, those at temperature 0, as at 1."""
    return (temperature * 0 + LOG2E) / tl.where(temperature == 0, 1.0, temperature)


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def block_sums(base, tilt, delta):
    """Sums of 2^(x - m) over each row of a tile: m_base, s_base, m_tilt, s_tilt, sum 2^(tilt - m_tilt) * delta.

    A row without an allowed token has sums of 0 and merges as the identity; NaN and +inf make a sum NaN.
    """
    m_base, m_tilt = tl.max(base, 1), tl.max(tilt, 1)
    e_base = tl.exp2(base - tl.where(m_base == NEVER, 0.0, m_base)[:, None])
    e_tilt = tl.exp2(tilt - tl.where(m_tilt == NEVER, 0.0, m_tilt)[:, None])
    # A delta of -inf sits on a weight of 0: 0 * inf must not poison the sum.
    e_delta = tl.where(tilt == NEVER, 0.0, e_tilt * delta)
    return m_base, tl.sum(e_base, 1), m_tilt, tl.sum(e_tilt, 1), tl.sum(e_delta, 1)


@triton.jit
def merged(m, s):
    """The maximum of a vector of block maxima and the blocks' sums relative to it, in fp64.

    NaN in any sum survives: it is how a bad row is recognised.
    """
    m_row = tl.max(m, 0)
    return m_row, (s * rescale(m, m_row)).to(tl.float64)


@triton.jit
def kl_nats(e_delta, s_tilt, lse2_tilt, lse2_base):
    """KL(policy || base) in nats from log2-unit sums: E_policy[tilt - base] - LSE(tilt) + LSE(base)."""
    return (e_delta / s_tilt - lse2_tilt + lse2_base) * LN2


@triton.jit
def philox(seed, position, stream: tl.constexpr, counter):
    """Philox4x32-10: four uint32 words, a pure function of int64 (seed, position), the stream and the counter."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    x0, x1 = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    x3 = counter.to(tl.uint32)
    x2 = x3 * 0 + stream
    for _ in tl.static_range(10):
        hi0, lo0 = tl.umulhi(x0, 0xD2511F53), x0 * 0xD2511F53
        hi1, lo1 = tl.umulhi(x2, 0xCD9E8D57), x2 * 0xCD9E8D57
        x0, x1, x2, x3 = hi1 ^ x1 ^ k0, lo1, hi0 ^ x3 ^ k1, lo0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return x0, x1, x2, x3


@triton.jit
def uniform53(high, low):
    """A uniform in [0, 1) with 53 bits: fp32's 24 bits lose tail tokens (vllm#43150)."""
    return ((high.to(tl.int64) << 21) | (low >> 11).to(tl.int64)).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def uniforms(seed, position, stream: tl.constexpr):
    """Two uniforms for each (seed, position)."""
    x0, x1, x2, x3 = philox(seed, position, stream, position * 0)
    return uniform53(x0, x1), uniform53(x2, x3)


@triton.jit
def exponential(word):
    """-log1p(-u), u = (word + 1/2) / 2^32, in fp32 to 1e-6 of its value at both ends.

    Below 1/16 the series keeps the relative precision of small values, where unlikely tokens win (its
    first neglected term is 2e-9 of the sum); above, 1 - u is formed exactly from the complement.
    """
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6 + u / 7))))))
    return tl.where(u < 0.0625, series, -tl.log(rest))


@triton.jit
def gumbel(seed, position, counter):
    """Gumbel noise in log2 units [ROWS, 4 N] for the tokens of counters [1 or ROWS, N]; seed, position: [ROWS, 1].

    Token i takes word i % 4 of counter i // 4, whatever tile it lies in.
    """
    w0, w1, w2, w3 = philox(seed, position, GUMBEL_STREAM, counter)
    return -tl.log2(exponential(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))))


@triton.jit
def first_above(weights, target):
    """Index of the first entry at which the running sum exceeds target, and the sum before it; weights fp64 [N].

    Entries of weight 0 are never chosen; where rounding keeps the sum below target, the last positive
    entry is. 0 where no entry is positive.
    """
    index = tl.arange(0, weights.shape[0])
    running = tl.cumsum(weights, 0)
    positive = weights > 0
    first = tl.min(tl.where(positive & (running > target), index, weights.shape[0]), 0)
    last = tl.max(tl.where(positive, index, 0), 0)
    chosen = tl.where(first < weights.shape[0], first, last)
    return chosen, tl.sum(tl.where(index == chosen, running - weights, 0.0), 0)
