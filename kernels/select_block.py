"""select_block in one launch, one program a row: scores, utility, and argmax or a soft draw over K candidates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyengine.kernels.algebra import NEVER, SELECT_STREAM, first_above, uniforms

STATES = 4096  # hidden numbers that a probe reads at once, over all branches: 32 a thread


@triton.jit
def log_sigmoid(x):
    """In fp64; the series takes over where log(1 + a) would lose a, so that saturated scores keep their order."""
    a = tl.exp(-tl.abs(x))
    log1p = tl.where(a < 1e-4, a * (1 - a * (0.5 - a / 3)), tl.log(1 + a))
    return tl.minimum(x, 0.0) - log1p


@triton.jit(do_not_specialize=["seed_stride", "position_stride", "weights_stride", "branches"])
def select_block_kernel(
    scores,
    scores_row,
    scores_branch,
    scores_head,
    hidden,
    hidden_row,
    hidden_branch,
    probe,
    probe_head,
    width,
    weights,
    weights_stride,
    reference,
    reference_row,
    reference_head,
    beta,
    seed,
    seed_stride,
    position,
    position_stride,
    index_out,
    probability_out,
    utility_out,
    branches,
    HEADS: tl.constexpr,
    PROBED: tl.constexpr,
    LSC: tl.constexpr,
    REFERRED: tl.constexpr,
    SOFT: tl.constexpr,
    BRANCHES: tl.constexpr,
    INNER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    branch = tl.arange(0, BRANCHES).to(tl.int64)
    there = branch < branches
    utility = tl.zeros([BRANCHES], tl.float64)
    for r in tl.static_range(HEADS):
        head = tl.full([], r, tl.int64)
        if PROBED:
            total = tl.zeros([BRANCHES, INNER], tl.float32)
            for first in range(0, width, INNER):
                inner = first + tl.arange(0, INNER)
                at = hidden + row * hidden_row + branch[:, None] * hidden_branch + inner[None, :]
                state = tl.load(at, mask=there[:, None] & (inner < width)[None, :], other=0.0).to(tl.float32)
                direction = tl.load(probe + head * probe_head + inner, mask=inner < width, other=0.0).to(tl.float32)
                total += state * direction[None, :]
            score = tl.sum(total, 1).to(tl.float64)
        else:
            at = scores + row * scores_row + branch * scores_branch + head * scores_head
            score = tl.load(at, mask=there, other=0.0).to(tl.float64)
        if REFERRED:
            score -= tl.load(reference + row * reference_row + head * reference_head).to(tl.float64)
        if LSC:
            score = log_sigmoid(score)
        weight = tl.load(weights + head * weights_stride).to(tl.float64)
        utility += tl.where(weight == 0, 0.0, weight * score)  # skipped, not multiplied: 0 * inf
    utility = tl.where((utility != utility) | (branch >= branches), NEVER, utility)
    top, best = tl.max(utility, 0, return_indices=True)
    if SOFT:
        gap = tl.where(utility == top, 0.0, utility - top)  # inf - inf: equally good or bad
        weight = tl.where(there, tl.exp(gap / beta), 0.0)
        probability = weight / tl.sum(weight, 0)
        u, _ = uniforms(tl.load(seed + row * seed_stride), tl.load(position + row * position_stride), SELECT_STREAM)
        best, _ = first_above(probability, u)
    else:
        probability = tl.where(branch == best, 1.0, 0.0)
    tl.store(index_out + row, best.to(tl.int64))
    tl.store(probability_out + row * branches + branch, probability.to(tl.float32), mask=there)
    tl.store(utility_out + row * branches + branch, utility.to(tl.float32), mask=there)


def select_block(
    scores: Tensor | None,
    hidden: Tensor | None,
    probe: Tensor | None,
    weights: Tensor,
    reference: Tensor | None,
    lsc: bool,
    beta: float,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`pyengine.ops.select_block` in Triton, on arguments that are already checked.

    Args:
        scores: [B, K, R], or None and then hidden [B, K, D] and probe [R, D]; fp32, bf16 or fp16. The last
            dimension of hidden and probe has unit stride; all other strides are free.
        weights: fp32 [R]; reference: fp32 [B, R] or None. seed, position: int64 [B]. Stride 0 is fine.
        lsc: log sigmoid(score - reference) instead of the score.
        beta: 0 is argmax; > 0 draws from softmax(utility / beta).

    Returns:
        index int64 [B], probability and utility fp32 [B, K].
    """
    given = hidden if scores is None else scores
    assert given is not None
    batch, branches = given.shape[:2]
    index = given.new_empty(batch, dtype=torch.int64)
    probability = given.new_empty((batch, branches), dtype=torch.float32)
    utility = given.new_empty((batch, branches), dtype=torch.float32)
    if batch == 0:
        return index, probability, utility
    direct = (weights, 0, 0, 0) if scores is None else (scores, *scores.stride())
    probed = (weights, 0, 0, weights, 0, 0)
    if hidden is not None and probe is not None:
        probed = (hidden, *hidden.stride()[:2], probe, probe.stride(0), probe.shape[1])
    select_block_kernel[(batch,)](
        *direct,
        *probed,
        weights,
        weights.stride(0),
        *((weights, 0, 0) if reference is None else (reference, *reference.stride())),
        beta,
        seed,
        seed.stride(0),
        position,
        position.stride(0),
        index,
        probability,
        utility,
        branches,
        HEADS=len(weights),
        PROBED=scores is None,
        LSC=lsc,
        REFERRED=reference is not None,
        SOFT=beta > 0,
        BRANCHES=triton.next_power_of_2(branches),
        INNER=max(1, STATES // triton.next_power_of_2(branches)),
        num_warps=4,
    )
    return index, probability, utility
