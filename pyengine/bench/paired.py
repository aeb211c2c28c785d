"""Whether one of two is faster, from samples that were taken in turns: the statistics of every benchmark here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from pyengine.errors import InputError

Verdict = Literal["faster", "slower", "cannot tell"]
LEVEL = 0.95
ALARM = (1 - LEVEL) / 2  # one-sided: the interval's end lies beyond the limit
RESAMPLES = 20_000
# The widest interval of a median, from the smallest sample to the largest, covers it with probability 1 - 2^(1 - n).
FEWEST = 6


class Ratio(NamedTuple):
    """ratio: the median over rounds of theirs / ours; [low, high] holds that of all rounds to come in 95 of 100 runs.
    Of fewer than six rounds nothing can be said: [0, inf]."""

    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def verdict(self) -> Verdict:
        """Of ours, where samples are times."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "cannot tell"


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Seconds of two contenders, a pair a round; both met the same machine in a round, so that its drift cancels.

    The interval is the expanded percentile bootstrap of the median (Hesterberg, "What Teachers Should Know About the
    Bootstrap", 2015, 3.3), whose levels make up for how narrow a resample of few rounds is. Of the mean it would have
    the same width on a quiet machine and miss the truth in 8 of 100 runs where spikes fall on one of the two.
    """
    ratios = _ratios(theirs, ours)
    return _told(float(np.median(ratios)), _medians(ratios), len(ratios))


def exceeds(theirs: Sequence[float], ours: Sequence[float], limit: float) -> float:
    """p-value of "the ratio is at most `limit`", by the same bootstrap: below 0.025 the interval lies above it."""
    ratios = _ratios(theirs, ours)
    return _beyond(_medians(ratios), len(ratios), limit)


def change(new: Sequence[float], old: Sequence[float]) -> Ratio:
    """Of two runs that did not meet the same machine: the median of `new` over that of `old`, whose samples are ratios
    to an anchor of their own run. rounds: of the shorter."""
    top, bottom = _alone(new), _alone(old)
    middle = float(np.median(top) / np.median(bottom))
    return _told(middle, _resampled(top, bottom), min(len(top), len(bottom)))


def change_exceeds(new: Sequence[float], old: Sequence[float], limit: float) -> float:
    """p-value of "the change is at most `limit`"."""
    top, bottom = _alone(new), _alone(old)
    return _beyond(_resampled(top, bottom), min(len(top), len(bottom)), limit)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are (Holm 1979): those below a level are false together with at most its
    probability, however they depend on each other."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of differences that are paired already, by the same bootstrap of the mean; [-inf, inf] of
    fewer than six."""
    given = np.asarray(values, dtype=float)
    n = len(given)
    if n < FEWEST:
        return float(given.mean()), -math.inf, math.inf
    return float(given.mean()), *_interval(given[_draws(n, RESAMPLES)].mean(1), n)


def _told(middle: float, resampled: np.ndarray, n: int) -> Ratio:
    return Ratio(middle, *((0.0, math.inf) if n < FEWEST else _interval(resampled, n)), n)


def _interval(resampled: np.ndarray, n: int) -> tuple[float, float]:
    tail = ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - LEVEL) / 2))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _beyond(resampled: np.ndarray, n: int, limit: float) -> float:
    """The level whose interval would begin at the limit."""
    if n < FEWEST:
        return 1.0
    return _level((np.count_nonzero(resampled <= limit) + 1) / (len(resampled) + 2), n)


def least(rounds: int) -> float:
    """The smallest p-value that so many rounds can give."""
    return 1.0 if rounds < FEWEST else _level(1 / (RESAMPLES + 2), rounds)


def _level(share: float, n: int) -> float:
    return float(stdtr(n - 1, ndtri(share) / math.sqrt(n / (n - 1))))


def _alone(ratios: Sequence[float]) -> np.ndarray:
    return _ratios(ratios, [1.0] * len(ratios))


def _ratios(theirs: Sequence[float], ours: Sequence[float]) -> np.ndarray:
    if len(theirs) != len(ours) or len(ours) == 0:
        raise InputError(f"pairs are wanted: {len(theirs)} samples beside {len(ours)}")
    top, bottom = np.asarray(theirs, dtype=float), np.asarray(ours, dtype=float)
    if not (np.isfinite(top).all() and np.isfinite(bottom).all() and (top > 0).all() and (bottom > 0).all()):
        raise InputError("samples are positive and finite")
    return top / bottom


@lru_cache(maxsize=2)
def _draws(n: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, n, (resamples, n))  # the same interval from the same samples


def _medians(ratios: np.ndarray) -> np.ndarray:
    return np.median(ratios[_draws(len(ratios), RESAMPLES)], 1)


def _resampled(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Ratios of medians; those of one draw are told from those of the other, though both have the same seed."""
    return _medians(top) / np.random.default_rng(1).permutation(_medians(bottom))
