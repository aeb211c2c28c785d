"""KL accounting: what a strategy costs in nats from the base policy, what it wins, what weight a budget buys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyengine.errors import InputError, whole

STEPS = 24  # of the search for a weight; 6 are enough where nothing is extreme


def best_of_k_bound(k: int) -> float:
    """b(K) = log K - (K - 1) / K, an upper bound on KL(best-of-K || base), in nats.

    It holds for softmax selection too, at any beta: the selected candidate's density ratio increases with
    utility and is majorised by the maximum's, K u^(K-1), and sum g log g is Schur-convex.
    Source: Controlled Decoding; the bound is proved in arXiv 2401.01879. b(1) = 0, b(8) = 1.2044.
    """
    k = whole(k, "best_of_k_bound: k", 1)
    return math.log(k) - (k - 1) / k


def blockwise_bound(k: int, length: int, block_tokens: int, blocks: Literal["ceil", "paper"] = "ceil") -> float:
    """An upper bound on the KL of blockwise best-of-K over a response of `length` tokens, in nats.

    blocks="ceil": b(K) * ceil(length / block_tokens), one b(K) for each block that was selected.
    blocks="paper": b(K) * length / block_tokens as printed in Controlled Decoding; false when the block
    does not divide the length (two one-token responses, K = 2, M = 4: KL .1308, printed .0483).
    """
    if length < 0 or block_tokens < 1:
        raise InputError(f"blockwise_bound: need length >= 0 and block_tokens >= 1, got {length}, {block_tokens}")
    count = -(-length // block_tokens) if blocks == "ceil" else length / block_tokens
    return best_of_k_bound(k) * count


def best_of_k_law(probability: Tensor, reward: Tensor, k: int) -> Tensor:
    """The exact law of best-of-K over N outcomes whose base probabilities and rewards are known, fp64 [N].

    A reward level v of base mass F(v) - F(v-) gets F(v)^K - F(v-)^K, shared within the level in proportion to the
    base: the selection keeps the first of equal candidates, which are exchangeable.

    Raises InputError for probabilities that do not sum to 1 and for a reward that is NaN.
    """
    p, r = torch.as_tensor(probability).double(), torch.as_tensor(reward).double()
    k = whole(k, "best_of_k_law: k", 1)
    if p.dim() != 1 or p.shape != r.shape:
        raise InputError(f"best_of_k_law: probability and reward must be [N], got {list(p.shape)} and {list(r.shape)}")
    if not bool((p >= 0).all()) or abs(p.sum().item() - 1) > 1e-6:
        raise InputError(f"best_of_k_law: probabilities must not be negative and sum to 1, not {p.sum().item():.6g}")
    if r.isnan().any():
        raise InputError(f"best_of_k_law: the reward of outcome {int(r.isnan().nonzero()[0])} is NaN")
    levels, level = r.unique(return_inverse=True)
    mass = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, level, p)
    above = mass.cumsum(0).clamp(max=1)
    above[-1] = 1.0
    won = above**k - torch.cat([above.new_zeros(1), above[:-1]]) ** k
    return torch.where(mass > 0, won / mass, 0.0)[level] * p


def divergence(policy: Tensor, base: Tensor) -> float:
    """KL(policy || base) of two distributions [N], in nats; infinite where the policy goes and the base does not."""
    p, q = torch.as_tensor(policy).double(), torch.as_tensor(base).double()
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum().item()


class WinRate(NamedTuple):
    """win: P(reward > baseline), strictly; tie: P(equal); error: standard error of `win` over prompts.

    A policy against itself wins (1 - tie) / 2. Best-of-K wins at most K / (K + 1).
    """

    win: float
    tie: float
    error: float


def win_rate(rewards: Sequence[float] | Tensor, baseline: Sequence[float] | Tensor) -> WinRate:
    """How often a response has a higher reward than the baseline's to the same prompt.

    rewards, baseline: [N] with one response for each of N prompts, or [N, S] and [N, S'] with several; then every
    response is compared with every response of the baseline to its prompt.
    """
    ours, theirs = _rewards(rewards, "rewards"), _rewards(baseline, "baseline")
    if len(ours) != len(theirs):
        raise InputError(f"win_rate: {len(ours)} prompts against {len(theirs)} of the baseline")
    wins = (ours[:, :, None] > theirs[:, None]).double().mean((1, 2))
    ties = (ours[:, :, None] == theirs[:, None]).double().mean((1, 2))
    return WinRate(wins.mean().item(), ties.mean().item(), _error(wins))


class Gain(NamedTuple):
    """mean: E_policy[r]; gain: E_policy[r] - E_base[r]; normalised: the gain in standard deviations of the base's
    rewards (NaN where those are all equal); error: standard error of the gain over prompts."""

    mean: float
    gain: float
    normalised: float
    error: float


def expected_reward(rewards: Sequence[float] | Tensor, baseline: Sequence[float] | Tensor) -> Gain:
    """The reward of a policy beside its base's on the same N prompts; shapes as in `win_rate`."""
    ours, theirs = _rewards(rewards, "rewards"), _rewards(baseline, "baseline")
    if len(ours) != len(theirs):
        raise InputError(f"expected_reward: {len(ours)} prompts against {len(theirs)} of the baseline")
    gains = ours.mean(1) - theirs.mean(1)
    spread = theirs.std().item() if theirs.max() > theirs.min() else 0.0  # rounding gives equal ones a std above 0
    gain = gains.mean().item()
    return Gain(ours.mean().item(), gain, gain / spread if spread else math.nan, _error(gains))


def _rewards(rewards: Sequence[float] | Tensor, name: str) -> Tensor:
    """fp64 [N, S]."""
    r = torch.as_tensor(rewards, dtype=torch.float64)
    r = r[:, None] if r.dim() == 1 else r
    if r.dim() != 2 or not r.numel():
        raise InputError(f"{name} must be [N] or [N, S] and not empty, got {list(r.shape)}")
    if r.isnan().any():
        raise InputError(f"{name} of prompt {int(r.isnan().nonzero()[0, 0])}: a reward is NaN")
    return r


def _error(values: Tensor) -> float:
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


def solve_weight(logits: Tensor, values: Tensor, budget: Tensor | float, temperature: Tensor | float = 1.0) -> Tensor:
    """The weight λ > 0 at which softmax(logits / T + λ values) is `budget` nats from softmax(logits / T), fp32 [N].

    logits, values: [N, V]; budget, temperature: a number or [N], both positive. Relative error of the KL below 1 %
    wherever the budget can be met. Where it cannot (the most that a tilt can cost is -log of the base's mass on the
    best tokens; tokens of value -inf cost at least -log of the mass on the others), the λ returned comes as near as
    λ > 0 can; where every value is equal it is 0. Nothing passes between host and device, so that a CUDA graph can
    hold it.

    KL(λ) = λ E_λ[v] - log E_0[exp(λ v)] has the derivative λ Var_λ(v), so sqrt(2 KL) is nearly linear in λ: Newton's
    method on it, inside a bracket.
    """
    logits, values = logits.double(), values.double()

    def column(given: Tensor | float) -> Tensor:
        if isinstance(given, Tensor):
            return given.to(logits).expand(len(logits))
        return torch.full((len(logits),), float(given), dtype=torch.float64, device=logits.device)

    temperature, wanted = column(temperature), (2 * column(budget)).sqrt()
    base = torch.log_softmax(logits / temperature[:, None], -1)
    there = (base > -torch.inf) & (values > -torch.inf)
    best = values.masked_fill(~there, -torch.inf).amax(-1, keepdim=True)
    below = torch.where(there, values - best, 0.0)  # a shift of the values changes nothing
    reach = -below.amin(-1)

    def moments(weight: Tensor) -> tuple[Tensor, Tensor]:
        """(KL, Var of the values) at a weight [N]."""
        tilted = torch.where(there, base + weight[:, None] * below, -torch.inf)
        total = tilted.logsumexp(-1, keepdim=True)
        p = (tilted - total).exp()
        mean = (p * below).sum(-1)
        return weight * mean - total[:, 0], (p * (below - mean[:, None]).square()).sum(-1)

    flat = ~(reach > 0)  # NaN, too: the draw reports such rows
    reach = torch.where(flat, 1.0, reach)
    # Beyond `high` no mass is left but on the best tokens; the nearest value below them says where that is.
    nearest = -below.masked_fill(below == 0, -torch.inf).amax(-1)
    low, high = torch.zeros_like(wanted), 1e3 / torch.where(flat, 1.0, nearest)
    least = torch.minimum(1e-6 / reach, 1e-3 * high)
    _, variance = moments(low)
    weight = torch.minimum(wanted / variance.sqrt(), high / 4)
    for _ in range(STEPS):
        kl, variance = moments(weight)
        root = (2 * kl).clamp(min=0).sqrt()
        low, high = torch.where(root < wanted, weight, low), torch.where(root < wanted, high, weight)
        newton = weight + (wanted - root) * root / (weight * variance)
        # Else the geometric middle, since a weight may be off by many orders of magnitude.
        other = torch.where((newton > low) & (newton < high), newton, (torch.maximum(low, least) * high).sqrt())
        weight = torch.where((root - wanted).abs() <= 1e-6 * wanted, weight, other)
    # A token of value -inf is forbidden at any weight above 0, which fp32 must not round to 0.
    forbids = ((base > -torch.inf) & ~there).any(-1) & there.any(-1)
    return torch.where(flat & ~forbids, 0.0, weight.clamp(min=1e-30)).float()
