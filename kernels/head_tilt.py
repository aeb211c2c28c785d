"""The LM head, the value heads, the tilt and the draw without logits in memory.

A program multiplies one tile of the vocabulary and leaves its sums and its best Gumbel key, as
`tilt_sample` does for a block; a second kernel merges the tiles. The noise depends on (seed, position,
token) alone, so the tokens are those of a matrix product followed by `tilt_sample(gumbel=True)`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyengine.kernels.algebra import LN2, LOG2E, NEVER, block_sums, finite, gumbel, kl_nats, log2_unit, merged
from pyengine.kernels.moments import capped
from pyengine.kernels.product import product, upcast

# What a tile leaves for each row, fp32: the sums of algebra.block_sums, and the best token's key, base and tilt.
M_BASE, S_BASE, M_TILT, S_TILT, E_DELTA, KEY, BASE, TILT, FIELDS = (tl.constexpr(i) for i in range(9))

TOKENS = 128  # vocabulary of one program
INNER = 128  # hidden dimensions of one step: 32 KB of bf16 weights in flight a stage


@triton.jit(do_not_specialize=["batch", "tiles", "temperature_stride", "seed_stride", "position_stride"])
def head_tilt_kernel(
    hidden,
    hidden_row,
    weight,
    weight_row,
    bias,
    width,
    value_hidden,
    value_hidden_row,
    value_weight,
    value_weight_head,
    value_weight_row,
    value_bias,
    value_bias_head,
    value_width,
    weights,
    weights_row,
    weights_head,
    mask,
    mask_row,
    temperature,
    temperature_stride,
    seed,
    seed_stride,
    position,
    position_stride,
    sums,
    best,
    batch,
    vocab,
    tiles,
    softcap,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    HEADS: tl.constexpr,
    VALUE_BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    INNER: tl.constexpr,
):
    """ROWS rows against one tile of the vocabulary; programs that share a tile follow one another."""
    row_tiles = tl.cdiv(batch, ROWS)
    tile = tl.program_id(0) // row_tiles
    row = ((tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    here, there = row < batch, token < vocab
    inner, vocab_row = tl.arange(0, INNER), token.to(tl.int64)[None, :]
    logit = product(
        hidden + row[:, None] * hidden_row + inner[None, :],
        weight + vocab_row * weight_row + inner[:, None],
        here[:, None],
        there[None, :],
        width,
        UPCAST,
        ROWS,
        TOKENS,
        INNER,
    )
    if BIASED:
        logit += tl.load(bias + token, mask=there, other=0.0).to(tl.float32)[None, :]
    logit, _ = capped(logit, softcap, CAPPED)
    allowed = here[:, None] & there[None, :]
    if MASKED:
        allowed &= tl.load(mask + row[:, None] * mask_row + token[None, :], mask=allowed, other=0) != 0
    logit = tl.where(allowed, logit, NEVER)  # zero rows of padding must not win when all logits are negative
    delta = tl.zeros([ROWS, TOKENS], tl.float32)
    for r in tl.static_range(HEADS):
        head = tl.full([], r, tl.int64)  # head * value_weight_head passes 2^31 at the fifth head of [128,256, 4096]
        value = product(
            value_hidden + row[:, None] * value_hidden_row + inner[None, :],
            value_weight + head * value_weight_head + vocab_row * value_weight_row + inner[:, None],
            here[:, None],
            there[None, :],
            value_width,
            UPCAST,
            ROWS,
            TOKENS,
            INNER,
        )
        if VALUE_BIASED:
            value += tl.load(value_bias + head * value_bias_head + token, mask=there, other=0.0).to(tl.float32)[None, :]
        scale = tl.load(weights + row * weights_row + head * weights_head, mask=here, other=0.0)[:, None]
        delta += tl.where(scale == 0, 0.0, scale * value)
    delta = tl.where(logit == NEVER, 0.0, delta)  # no value revives a forbidden token

    t = tl.load(temperature + row * temperature_stride, mask=here, other=1.0)
    greedy = (t == 0)[:, None]
    unit = log2_unit(t)[:, None]
    base, tilt = logit * unit, tl.fma(logit, unit, delta * LOG2E)
    m_base, s_base, m_tilt, s_tilt, e_delta = block_sums(base, tilt, delta * LOG2E)

    # Where the values forbid the whole tile its best by the base policy stands by: the row may fall back
    # to that. A greedy key stays in plain units: a scale factor may round two logits to one.
    forbidden = (m_tilt == NEVER)[:, None]
    s = tl.load(seed + row * seed_stride, mask=here, other=0)[:, None]
    p = tl.load(position + row * position_stride, mask=here, other=0)[:, None]
    noise = gumbel(s, p, tile * (TOKENS // 4) + tl.arange(0, TOKENS // 4)[None, :])
    key = tl.where(forbidden, base, tilt) + noise
    key = tl.where(greedy, tl.where(forbidden, logit, logit + delta), key)
    top, at = tl.max(tl.where(key > NEVER, key, NEVER), 1, return_indices=True)  # NaN never wins
    chosen = tl.arange(0, TOKENS)[None, :] == at[:, None]

    out, step = sums + row * FIELDS * tiles + tile, tiles
    tl.store(out + M_BASE * step, m_base, mask=here)
    tl.store(out + S_BASE * step, s_base, mask=here)
    tl.store(out + M_TILT * step, m_tilt, mask=here)
    tl.store(out + S_TILT * step, s_tilt, mask=here)
    tl.store(out + E_DELTA * step, e_delta, mask=here)
    tl.store(out + KEY * step, top, mask=here)
    tl.store(out + BASE * step, tl.sum(tl.where(chosen, base, 0.0), 1), mask=here)
    tl.store(out + TILT * step, tl.sum(tl.where(chosen, tilt, 0.0), 1), mask=here)
    tl.store(best + row * tiles + tile, tile * TOKENS + at, mask=here)


@triton.jit(do_not_specialize=["tiles", "temperature_stride"])
def head_merge_kernel(
    sums,
    best,
    temperature,
    temperature_stride,
    token_out,
    logp_base_out,
    logp_policy_out,
    kl_out,
    valid_out,
    tiles,
    TILES: tl.constexpr,
):
    """One program a row: merge the tiles in their order and take the best key."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, TILES)
    there = index < tiles
    tile = sums + row * FIELDS * tiles + index
    top_base = tl.load(tile + M_BASE * tiles, mask=there, other=NEVER)
    top_tilt = tl.load(tile + M_TILT * tiles, mask=there, other=NEVER)
    m_base, w_base = merged(top_base, tl.load(tile + S_BASE * tiles, mask=there, other=0.0))
    m_tilt, w_tilt = merged(top_tilt, tl.load(tile + S_TILT * tiles, mask=there, other=0.0))
    _, w_delta = merged(top_tilt, tl.load(tile + E_DELTA * tiles, mask=there, other=0.0))
    s_base, s_tilt, e_delta = tl.sum(w_base, 0), tl.sum(w_tilt, 0), tl.sum(w_delta, 0)
    valid = (s_base > 0) & finite(s_base) & finite(s_tilt) & finite(e_delta)

    fallback = (s_tilt == 0) & (s_base > 0)  # the scorer forbids all: the base policy decides
    allowed = tl.where(fallback, top_base, top_tilt) > NEVER
    keys = tl.load(tile + KEY * tiles, mask=there & allowed, other=NEVER)
    _, winner = tl.max(keys, 0, return_indices=True)
    winner = tl.where(valid, winner, 0)
    token = tl.load(best + row * tiles + winner)
    base_at = tl.load(sums + (row * FIELDS + BASE) * tiles + winner)
    tilt_at = tl.load(sums + (row * FIELDS + TILT) * tiles + winner)

    greedy = tl.load(temperature + row * temperature_stride) == 0
    lse_base = m_base + tl.log2(s_base)
    lse_tilt = tl.where(fallback, lse_base, m_tilt + tl.log2(s_tilt))
    logp_base = (base_at - lse_base) * LN2
    logp_policy = tl.where(greedy, 0.0, tl.where(fallback, logp_base, (tilt_at - lse_tilt) * LN2))
    kl = tl.where(fallback, 0.0, kl_nats(e_delta, tl.where(s_tilt == 0, 1.0, s_tilt), lse_tilt, lse_base))
    kl = tl.where(greedy, -logp_base, kl)
    bad = float("nan")
    tl.store(token_out + row, tl.where(valid, token, 0).to(tl.int64))
    tl.store(logp_base_out + row, tl.where(valid, logp_base, bad).to(tl.float32))
    tl.store(logp_policy_out + row, tl.where(valid, logp_policy, bad).to(tl.float32))
    tl.store(kl_out + row, tl.where(valid, kl, bad).to(tl.float32))
    tl.store(valid_out + row, valid)


def head_tilt_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value_hidden: Tensor | None,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.head_tilt_sample` without filters, on arguments that are already checked.

    Args:
        hidden, weight: [B, D] and [V, D] of one type, fp32, bf16 or fp16; bias: [V] or None.
        value_hidden, value_weight: [B, Dv] and [R, V, Dv] of one type, or None; value_bias: [R, V] or None.
        weights: fp32 [B, R] or None. mask: bool [B, V] or None.
        temperature: fp32 [B]; seed, position: int64 [B]; stride 0 is fine.
        All but the last dimensions may be strided.

    Returns:
        token int64 [B], logp_base, logp_policy and kl fp32 [B], valid bool [B]. Up to 64 rows read the weights
        once; a row's bits depend on its batch only in whether that has more than 16 rows, by the shape of
        the product.
    """
    batch, width = hidden.shape
    vocab = len(weight)
    tiles = triton.cdiv(vocab, TOKENS)
    outputs = (
        hidden.new_empty(batch, dtype=torch.int64),
        *(hidden.new_empty(batch, dtype=torch.float32) for _ in range(3)),
        hidden.new_empty(batch, dtype=torch.bool),
    )
    if batch == 0:
        return outputs
    sums = hidden.new_empty((batch, FIELDS.value, tiles), dtype=torch.float32)
    best = hidden.new_empty((batch, tiles), dtype=torch.int32)
    rows = 16 if batch <= 16 else 64
    heads = 0
    values = (hidden, 0, weight, 0, 0, weight, 0, width, temperature, 0, 0)  # read by no one
    if value_hidden is not None and value_weight is not None and weights is not None:
        heads = len(value_weight)
        offset = (value_weight, 0) if value_bias is None else (value_bias, value_bias.stride(0))
        values = (
            value_hidden,
            value_hidden.stride(0),
            value_weight,
            *value_weight.stride()[:2],
            *offset,
            value_hidden.shape[1],
            weights,
            *weights.stride(),
        )
    head_tilt_kernel[(triton.cdiv(batch, rows) * tiles,)](
        hidden,
        hidden.stride(0),
        weight,
        weight.stride(0),
        weight if bias is None else bias,
        width,
        *values,
        *((hidden, 0) if mask is None else (mask, mask.stride(0))),
        temperature,
        temperature.stride(0),
        seed,
        seed.stride(0),
        position,
        position.stride(0),
        sums,
        best,
        batch,
        vocab,
        tiles,
        softcap or 1.0,
        BIASED=bias is not None,
        CAPPED=softcap is not None,
        HEADS=heads,
        VALUE_BIASED=value_bias is not None,
        MASKED=mask is not None,
        UPCAST=upcast(hidden),
        ROWS=rows,
        TOKENS=TOKENS,
        INNER=INNER // 4 if hidden.dtype == torch.float32 else INNER,
        num_warps=8,
        num_stages=3,
    )
    head_merge_kernel[(batch,)](
        sums,
        best,
        temperature,
        temperature.stride(0),
        *outputs,
        tiles,
        TILES=triton.next_power_of_2(tiles),
        num_warps=4,
    )
    return outputs
