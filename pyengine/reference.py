"""Every op as plain PyTorch in fp64: the executable specification that all backends are tested against.

Nothing here is tuned. Each function states the mathematics once, in the order in which the
definition gives it, and draws with the same counter-based random numbers as the kernels, so that a
kernel's token can be compared with the reference's token and not only its law.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1024  # tokens; csrc/algebra.h kBlock
TOKEN_STREAM, SELECT_STREAM = 0, 1


class TiltSample(NamedTuple):
    """What `tilt_sample` returns; every field has shape [B]."""

    token: Tensor
    logp_base: Tensor
    logp_policy: Tensor
    kl: Tensor
    valid: Tensor


class BlockSelection(NamedTuple):
    """What `select_block` returns: index [B], probability [B, K], utility [B, K]."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    probability: Tensor
    utility: Tensor


def uniforms(seed: Tensor, position: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Two fp64 uniforms in [0, 1) for each (seed, position): Philox4x32-10, 53 bits each.

    seed, position: int64 [B]. The same pair always gives the same numbers.
    """
    low = 0xFFFFFFFF
    c0, c1 = position & low, (position >> 32) & low
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps like uint64
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low

    def uniform(high: Tensor, rest: Tensor) -> Tensor:
        return ((high << 21) | (rest >> 11)).double() * 2.0**-53

    return uniform(c0, c1), uniform(c2, c3)


def _first_above(weights: Tensor, target: Tensor) -> Tensor:
    """Index of the first entry at which the running sum exceeds target; weights [B, N], target [B].

    Entries of weight 0 are never chosen; where rounding keeps the sum below target, the last
    positive entry is.
    """
    above = (weights.cumsum(-1) > target[:, None]) & (weights > 0)
    positive = weights > 0
    last = positive.shape[-1] - 1 - positive.flip(-1).to(torch.int8).argmax(-1)
    return torch.where(above.any(-1), above.to(torch.int8).argmax(-1), last)


def _kept(tilted: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Boolean [B, V]: what top-k, then top-p, then min-p leave, ties to the lowest id."""
    ordered, order = tilted.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(tilted.shape[-1], device=tilted.device)
    k = torch.where(top_k > 0, top_k, tilted.shape[-1])
    weight = torch.where(rank < k[:, None], (ordered - ordered[:, :1]).exp(), 0.0)
    before = weight.cumsum(-1) - weight
    within = (before < top_p[:, None] * weight.sum(-1, keepdim=True)) | (top_p >= 1)[:, None] | (rank == 0)
    likely = ordered - ordered[:, :1] >= min_p[:, None].log()
    keep = (rank < k[:, None]) & within & likely & (ordered > -math.inf)
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def tilt_sample(
    logits: Tensor,
    values: Tensor | None,
    weights: Tensor | None,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> TiltSample:
    """`pyengine.ops.tilt_sample` in fp64; all per-row parameters have shape [B]."""
    x = logits.double()
    vocab = x.shape[-1]
    greedy = temperature == 0
    base = x / torch.where(greedy, 1.0, temperature.double())[:, None]
    delta = torch.zeros_like(x)
    if values is not None and weights is not None:
        w = weights.double().T[:, :, None]
        delta = torch.where(w == 0, 0.0, w * values.double()).sum(0)
    delta = torch.where(x == -math.inf, 0.0, delta)  # no value revives a forbidden token
    forbidden = (base + delta == -math.inf).all(-1) & (base > -math.inf).any(-1)
    delta = torch.where(forbidden[:, None], 0.0, delta)  # the scorer forbids all: the base policy decides
    tilted = base + delta

    lse_base, lse_tilted = base.logsumexp(-1), tilted.logsumexp(-1)
    valid = lse_base.isfinite() & lse_tilted.isfinite()
    filtered = (((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0)) & ~greedy
    safe = torch.where(valid[:, None], tilted, 0.0)
    keep = _kept(safe, torch.where(filtered, top_k, 0), top_p, min_p) | ~filtered[:, None]
    kept = torch.where(keep, safe, -math.inf)
    weight = (kept - kept.amax(-1, keepdim=True)).exp()

    # Hierarchical inverse CDF: a block of 1,024 tokens, then a token in it. A filtered row draws from
    # its kept tokens at once.
    u_block, u_token = uniforms(seed, position, TOKEN_STREAM)
    blocks = torch.nn.functional.pad(weight, (0, -vocab % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1)
    block = _first_above(sums, u_block * sums.sum(-1))
    chosen = blocks[torch.arange(len(block), device=block.device), block]
    in_block = _first_above(chosen, u_token * chosen.sum(-1))
    flat = _first_above(weight, u_block * weight.sum(-1))
    token = torch.where(filtered, flat, block * BLOCK + in_block)
    token = torch.where(greedy, (torch.where(valid[:, None], x, 0.0) + delta).argmax(-1), token)
    token = torch.where(valid, token, 0)

    def at(row: Tensor) -> Tensor:
        return row.gather(-1, token[:, None])[:, 0]

    lse_kept = kept.logsumexp(-1)
    logp_base, logp_policy = at(base) - lse_base, at(tilted) - lse_kept
    policy = weight / weight.sum(-1, keepdim=True)
    kl = torch.where(weight > 0, policy * delta, 0.0).sum(-1) - lse_kept + lse_base
    logp_policy = torch.where(greedy, 0.0, logp_policy)
    kl = torch.where(greedy, -logp_base, kl)
    invalid = ~valid
    return TiltSample(
        token,
        logp_base.masked_fill(invalid, math.nan).float(),
        logp_policy.masked_fill(invalid, math.nan).float(),
        kl.masked_fill(invalid, math.nan).float(),
        valid,
    )


def select_block(scores: Tensor, weights: Tensor, *, beta: float, seed: Tensor, position: Tensor) -> BlockSelection:
    """`pyengine.ops.select_block` in fp64: utility = scores . weights, then argmax or a softmax draw."""
    w = weights.double()
    utility = torch.where(w == 0, 0.0, scores.double() * w).sum(-1)
    utility = torch.where(utility.isnan(), -math.inf, utility)
    best = utility.argmax(-1)
    if beta == 0:
        probability = torch.nn.functional.one_hot(best, utility.shape[-1]).double()
        return BlockSelection(best, probability.float(), utility.float())
    top = utility.amax(-1, keepdim=True)
    gap = torch.where(utility == top, 0.0, utility - top)  # -inf - -inf: every candidate is equally bad
    probability = (gap / beta).softmax(-1)
    u, _ = uniforms(seed, position, SELECT_STREAM)
    return BlockSelection(_first_above(probability, u), probability.float(), utility.float())
