"""tilt_sample in two launches: block sums over the whole grid, then one program a row that merges and draws.

Filters keep a prefix of the order (tilt descending, id ascending), so a row's kept set is one threshold
and the number of ties kept at it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from pyengine.kernels.algebra import (
    BLOCK,
    LN2,
    LOG2E,
    NEVER,
    TOKEN_STREAM,
    block_sums,
    finite,
    first_above,
    gumbel,
    kl_nats,
    log2_unit,
    merged,
    uniforms,
)
from pyengine.kernels.filters import CAPACITY, GROUP, kept_prefix, kept_sums, read

# What the first launch leaves for each block, fp32: the maximum and the sum of the base policy, the same of
# the policy and its sum of 2^(tilt - m) * delta, and the best key of a greedy or a Gumbel draw.
M_BASE, S_BASE, M_TILT, S_TILT, E_DELTA, KEY, FIELDS = (tl.constexpr(i) for i in range(7))

# Strides of the parameter columns are 0 or 1; specialised, each mixture of them would be compiled anew.
COLUMNS = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
STRIDES = [f"{name}_stride" for name in COLUMNS] + ["weights_row", "weights_head"]


@triton.jit(do_not_specialize=STRIDES)
def tilt_blocks_kernel(
    logits,
    logits_row,
    values,
    values_head,
    values_row,
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
    vocab,
    blocks,
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
    GUMBEL: tl.constexpr,
):
    """One warp a block of 1,024 tokens: every reduction is a shuffle, and no warp waits for another."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    t = tl.load(temperature + row * temperature_stride)
    greedy = t == 0
    unit = log2_unit(t)
    source = (
        logits + row * logits_row,
        mask + row * mask_row,
        values + row * values_row,
        values_head,
        weights + row * weights_row,
        weights_head,
        vocab,
        unit,
        1.0,
    )
    token = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    logit, delta, tilt = read(source, token, token < vocab, HEADS, MASKED)
    base = logit * unit
    m_base, s_base, m_tilt, s_tilt, e_delta = block_sums(base, tilt, delta * LOG2E)

    one = tl.arange(0, 1)
    out = sums + row * FIELDS * blocks + block + one
    tl.store(out + M_BASE * blocks, m_base)
    tl.store(out + S_BASE * blocks, s_base)
    tl.store(out + M_TILT * blocks, m_tilt)
    tl.store(out + S_TILT * blocks, s_tilt)
    tl.store(out + E_DELTA * blocks, e_delta)
    if GUMBEL or greedy:
        # Where the values forbid the whole block its best by the base policy stands by: the row may fall
        # back to that. A greedy key stays in plain units: a scale factor may round two logits to one.
        forbidden = (m_tilt == NEVER)[:, None]
        key = tl.where(forbidden, base, tilt)
        if GUMBEL:
            s = tl.load(seed + row * seed_stride + one)[:, None]
            p = tl.load(position + row * position_stride + one)[:, None]
            key += gumbel(s, p, block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :])
        key = tl.where(greedy, tl.where(forbidden, logit, logit + delta), key)
        top, at = tl.max(tl.where(key > NEVER, key, NEVER), 1, return_indices=True)  # NaN never wins
        tl.store(out + KEY * blocks, top)
        tl.store(best + row * blocks + block + one, block * BLOCK + at)


@triton.jit(do_not_specialize=STRIDES)
def tilt_draw_kernel(
    logits,
    logits_row,
    values,
    values_head,
    values_row,
    weights,
    weights_row,
    weights_head,
    mask,
    mask_row,
    temperature,
    temperature_stride,
    top_k,
    top_k_stride,
    top_p,
    top_p_stride,
    min_p,
    min_p_stride,
    seed,
    seed_stride,
    position,
    position_stride,
    sums,
    best,
    survivors,
    token_out,
    logp_base_out,
    logp_policy_out,
    kl_out,
    valid_out,
    vocab,
    blocks,
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
    GUMBEL: tl.constexpr,
    BLOCKS: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """One program a row: merge the blocks in their order, apply the filters, draw a block, then a token in it."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCKS)
    there = index < blocks
    t = tl.load(temperature + row * temperature_stride)
    greedy = t == 0
    unit = log2_unit(t)
    k = tl.load(top_k + row * top_k_stride)
    k = tl.where(k < vocab, k, 0)
    mass_kept, least_p = tl.load(top_p + row * top_p_stride), tl.load(min_p + row * min_p_stride)
    s, p = tl.load(seed + row * seed_stride), tl.load(position + row * position_stride)
    u_block, u_token = uniforms(s, p, TOKEN_STREAM)
    if OVERLAPPED:
        gdc_wait()  # for the sums: what is above needs none
    row_sums = sums + row * FIELDS * blocks
    block = row_sums + index
    top_base = tl.load(block + M_BASE * blocks, mask=there, other=NEVER)
    top_tilt = tl.load(block + M_TILT * blocks, mask=there, other=NEVER)
    # All five before the first maximum, whose barriers no load passes.
    sum_base = tl.load(block + S_BASE * blocks, mask=there, other=0.0)
    sum_tilt = tl.load(block + S_TILT * blocks, mask=there, other=0.0)
    sum_delta = tl.load(block + E_DELTA * blocks, mask=there, other=0.0)
    m_base, w_base = merged(top_base, sum_base)
    m_tilt, w_tilt = merged(top_tilt, sum_tilt)
    _, w_delta = merged(top_tilt, sum_delta)
    s_base, s_tilt, e_delta = tl.sum(w_base, 0), tl.sum(w_tilt, 0), tl.sum(w_delta, 0)

    fallback = (s_tilt == 0) & (s_base > 0)  # the scorer forbids all: the base policy decides
    top, highest = tl.where(fallback, top_base, top_tilt), tl.where(fallback, m_base, m_tilt)
    weight = tl.where(fallback, w_base, w_tilt)
    s_tilt = tl.where(fallback, s_base, s_tilt)
    e_delta = tl.where(fallback, 0.0, e_delta)
    valid = (s_base > 0) & finite(s_base) & finite(s_tilt) & finite(e_delta)

    source = (
        logits + row * logits_row,
        mask + row * mask_row,
        values + row * values_row,
        values_head,
        weights + row * weights_row,
        weights_head,
        vocab,
        unit,
        tl.where(fallback, 0.0, 1.0),
    )
    tops = row_sums + tl.where(fallback, M_BASE, M_TILT) * blocks
    token = tl.zeros([], tl.int32)
    if GUMBEL or greedy:
        keys = tl.load(block + KEY * blocks, mask=there & (top > NEVER), other=NEVER)
        _, winner = tl.max(keys, 0, return_indices=True)
        token = tl.load(best + row * blocks + winner, mask=valid, other=0)

    filtered = ((k > 0) | (mass_kept < 1) | (least_p > 0)) & (t != 0) & valid
    threshold, least = tl.full([], NEVER, tl.float32), tl.full([], NEVER, tl.float32)
    last_tie = tl.full([], -1, tl.int32)
    drawn, before = tl.zeros([], tl.int32), tl.zeros([], tl.float64)
    if filtered:
        list_row = survivors + row * CAPACITY
        threshold, ties, least = kept_prefix(
            source, tops, list_row, top, highest, s_tilt, k, mass_kept, least_p, HEADS, MASKED
        )
        kept_weight, e_delta, last_tie, winner = kept_sums(
            source, tops, threshold, ties, least, highest, blocks, s, p, HEADS, MASKED, GUMBEL, BLOCKS
        )
        s_tilt = tl.sum(kept_weight.to(tl.float64), 0)
        drawn, before = first_above(kept_weight.to(tl.float64), u_block * s_tilt)
        if GUMBEL:
            token = winner
    elif not GUMBEL:
        drawn = first_above(weight, u_block * s_tilt)[0]

    if not GUMBEL:
        drawn = tl.where(valid, drawn, 0)
        m_block = tl.load(tops + drawn)
        s_block = tl.load(tops + blocks + drawn).to(tl.float64)  # a block's sum lies behind its maximum
        tokens = drawn * BLOCK + tl.arange(0, BLOCK)
        _, _, tilt = read(source, tokens, tokens < vocab, HEADS, MASKED)
        kept = ((tilt > threshold) | ((tilt == threshold) & (tokens <= last_tie))) & (tilt >= least) & (tilt > NEVER)
        e = tl.where(kept, tl.exp2(tilt - m_block), 0.0).to(tl.float64)
        # A filtered row spends one uniform on all its kept tokens, another row a second one within the block.
        rest = (u_block * s_tilt - before) * tl.exp2(highest - m_block)
        in_block = first_above(e, tl.where(filtered, rest, u_token * s_block))[0]
        token = tl.where(greedy, token, drawn * BLOCK + in_block)

    logit, _, tilt_at = read(source, token, valid, HEADS, MASKED)
    base_at = logit * unit
    lse_base, lse_tilt = m_base + tl.log2(s_base), highest + tl.log2(s_tilt)
    logp_base = (base_at - lse_base) * LN2
    logp_policy = tl.where(greedy, 0.0, (tilt_at - lse_tilt) * LN2)
    kl = tl.where(greedy, -logp_base, kl_nats(e_delta, s_tilt, lse_tilt, lse_base))
    bad = float("nan")
    tl.store(token_out + row, tl.where(valid, token, 0).to(tl.int64))
    tl.store(logp_base_out + row, tl.where(valid, logp_base, bad).to(tl.float32))
    tl.store(logp_policy_out + row, tl.where(valid, logp_policy, bad).to(tl.float32))
    tl.store(kl_out + row, tl.where(valid, kl, bad).to(tl.float32))
    tl.store(valid_out + row, valid)


def tilt_sample(
    logits: Tensor,
    values: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    gumbel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`pyengine.ops.tilt_sample` in Triton, on arguments that are already checked.

    Args:
        logits: [B, V], fp32, bf16 or fp16; rows may be strided, the last dimension may not.
        values, weights: [R, B, V] of the same types and fp32 [B, R], or None.
        mask: bool [B, V] or None.
        temperature, top_p, min_p: fp32 [B]; top_k, seed, position: int64 [B]; stride 0 is fine.
        gumbel: draw by Gumbel noise of (seed, position, token) instead of the hierarchical inverse CDF.

    Returns:
        token int64 [B], logp_base, logp_policy and kl fp32 [B], valid bool [B]. No synchronisation with the
        host: it may be captured in a CUDA graph, and replays read seeds and positions anew.
    """
    batch, vocab = logits.shape
    blocks = triton.cdiv(vocab, BLOCK.value)
    outputs = (
        logits.new_empty(batch, dtype=torch.int64),
        *(logits.new_empty(batch, dtype=torch.float32) for _ in range(3)),
        logits.new_empty(batch, dtype=torch.bool),
    )
    if batch == 0:
        return outputs
    sums = logits.new_empty((batch, FIELDS.value, blocks), dtype=torch.float32)
    best = logits.new_empty((batch, blocks), dtype=torch.int32)
    survivors = logits.new_empty((batch, CAPACITY.value), dtype=torch.float32)
    heads = (logits, 0, 0, temperature, 0, 0)  # read by no one
    if values is not None and weights is not None:
        heads = (values, *values.stride()[:2], weights, *weights.stride())
    masks = (logits, 0) if mask is None else (mask, mask.stride(0))
    source = (logits, logits.stride(0), *heads, *masks)
    counts = {"HEADS": 0 if values is None else len(values), "MASKED": mask is not None, "GUMBEL": gumbel}
    draws = (seed, seed.stride(0), position, position.stride(0))
    filters = (top_k, top_k.stride(0), top_p, top_p.stride(0), min_p, min_p.stride(0))
    scale = (temperature, temperature.stride(0))
    tilt_blocks_kernel[(batch * blocks,)](
        *source, *scale, *draws, sums, best, vocab, blocks, **counts, num_warps=1 + gumbel
    )
    # Launched while the kernel before it ends: 1 us of latency is hidden. The interpreter knows no such option.
    overlapped = logits.device.type != "cpu" and torch.cuda.get_device_capability(logits.device)[0] >= 9
    tilt_draw_kernel[(batch,)](
        *source,
        *scale,
        *filters,
        *draws,
        sums,
        best,
        survivors,
        *outputs,
        vocab,
        blocks,
        **counts,
        BLOCKS=max(GROUP.value, triton.next_power_of_2(blocks)),
        OVERLAPPED=overlapped,
        num_warps=8,
        **({"launch_pdl": True} if overlapped else {}),
    )
    return outputs
