"""Finite sets of outcomes: the exact law of best-of-K and of a Gibbs tilt; and world C, two rewards at odds.

World C has many prompts with thousands of one-token outcomes each. The gold rewards of an outcome correlate
negatively, every prompt shifts both, and a decoder sees them through proxies with noise. All figures of fp64 NumPy.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyengine.errors import InputError

Array = NDArray[np.float64]
Noise = Literal["none", "gaussian", "t"]

CORRELATION, SPREAD, SHIFT = -0.5, 2.0, 3.0  # of the gold rewards; the shifts differ between prompts
FREEDOM = 2.5  # of Student's t: its variance is finite, its fourth moment is not


class Levels(NamedTuple):
    """Outcomes grouped by equal score: level [N] of each one, lowest first; mass [L] of a level and all below.

    Scores count as equal if they agree to nine decimals.
    """

    level: NDArray[np.intp]
    mass: Array
    below: Array


def levels(base: Array, score: Array) -> Levels:
    """The levels of outcomes with probability base [N] (sums to 1) and score [N]."""
    _, level = np.unique(np.round(score, 9), return_inverse=True)
    mass = np.bincount(level, weights=base).astype(np.float64)
    return Levels(level, mass, np.cumsum(mass) - mass)


def best_of_k_ratio(groups: Levels, k: float) -> Array:
    """π(y) / p0(y) [N] of the best of k iid draws: (F(v)^k - F(v-)^k) / (F(v) - F(v-)), in a level proportional to p0.

    Real k >= 1 interpolates between whole ones. Outcomes of a level without mass get 1.
    """
    if not k >= 1:
        raise InputError(f"best_of_k_ratio: k must be at least 1, got {k}")
    upper = np.minimum(groups.below + groups.mass, 1.0)
    mass = np.where(groups.mass > 0, groups.mass, 1.0)
    return np.where(groups.mass > 0, (upper**k - np.minimum(groups.below, upper) ** k) / mass, 1.0)[groups.level]


def best_of_k_law(base: Array, score: Array, k: float) -> Array:
    """Probability [N] of each outcome to be the best of k iid draws from base [N]; ties are broken at random."""
    return base * best_of_k_ratio(levels(base, score), k)


def gibbs_law(base: Array, utility: Array, weight: float) -> Array:
    """The KL-regularised optimum p0 exp(weight u) / Z over the last axis (Controlled Decoding, Theorem 2.1)."""
    if weight == 0:  # 0 * -inf is no utility
        return base / base.sum(-1, keepdims=True)
    tilted = base * np.exp(weight * (utility - utility.max(-1, keepdims=True)))
    return tilted / tilted.sum(-1, keepdims=True)


def divergence(law: Array, base: Array) -> Array:
    """KL(law || base) in nats over the last axis."""
    ratio = np.where(law > 0, law, 1.0) / np.where(law > 0, base, 1.0)
    return (law * np.log(ratio)).sum(-1)


def weight_at_kl(base: Array, utility: Array, kl: float) -> float:
    """The weight of `gibbs_law` whose KL, averaged over prompts [X, N], is `kl`."""
    low, high = 0.0, 1.0
    while divergence(gibbs_law(base, utility, high), base).mean() < kl:
        high *= 2
        if high > 1e9:
            raise InputError(f"weight_at_kl: no weight costs {kl} nats here, all mass is on the best outcomes before")
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(gibbs_law(base, utility, middle), base).mean() < kl else (low, middle)
    return (low + high) / 2


class TwoRewards(NamedTuple):
    """World C: gold and proxy rewards [2, X, Y] of Y outcomes of X prompts; the base policy is uniform."""

    gold: Array
    proxy: Array

    @property
    def base(self) -> Array:
        """[X, Y]"""
        return np.full(self.gold.shape[1:], 1 / self.gold.shape[2])


def two_rewards(prompts: int = 60, outcomes: int = 4000, noise: Noise = "none", seed: int = 0) -> TwoRewards:
    """World C. One seed has one gold reward, whatever the noise; Gaussian and t noise have scale 1."""
    rng = np.random.default_rng(seed)
    plain = rng.standard_normal((2, prompts, outcomes))
    other = CORRELATION * plain[0] + np.sqrt(1 - CORRELATION**2) * plain[1]
    gold = SPREAD * np.stack([plain[0], other]) + SHIFT * rng.standard_normal((2, prompts, 1))
    if noise == "none":
        return TwoRewards(gold, gold)
    if noise == "gaussian":
        return TwoRewards(gold, gold + rng.standard_normal(gold.shape))
    if noise == "t":
        return TwoRewards(gold, gold + rng.standard_t(FREEDOM, gold.shape))
    raise InputError(f'two_rewards: noise must be "none", "gaussian" or "t", got {noise!r}')


def lsc(reward: Array, reference: Array | float) -> Array:
    """u = log sigmoid(r - r_ref), without overflow: `pyengine.lsc` in fp64, for the exact column."""
    return -np.logaddexp(0.0, reference - reward)


def reference(reward: Array, quantile: float) -> Array:
    """[..., 1]: the empirical quantile of the last axis, one for each prompt."""
    return np.quantile(reward, quantile, axis=-1, keepdims=True)


def lsc_sum(proxy: Array) -> Array:
    """u = Σ lsc(r_i, median of r_i) [X, Y], the logical AND of proxies [2, X, Y]."""
    return lsc(proxy, reference(proxy, 0.5)).sum(0)


def both_above_median(gold: Array) -> Array:
    """1.0 where both gold rewards [2, X, Y] are above the base policy's medians for the prompt: [X, Y]."""
    return (gold > reference(gold, 0.5)).all(0).astype(float)


def best_of_k_mean(score: Array, outcome: Array, k: float) -> Array:
    """E of outcome [X, Y] for each prompt [X] under the exact best of k by score [X, Y], with a uniform base policy."""
    base = np.full(score.shape[1], 1 / score.shape[1])
    return np.array([best_of_k_law(base, s, k) @ o for s, o in zip(score, outcome, strict=True)])


def gibbs_mean(utility: Array, outcome: Array, weight: float) -> Array:
    """E of outcome [X, Y] for each prompt [X] under the Gibbs tilt by utility [X, Y], with a uniform base policy."""
    base = np.full(utility.shape, 1 / utility.shape[1])
    return (gibbs_law(base, utility, weight) * outcome).sum(-1)
