"""The statistics of the benchmarks, on samples whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyengine import InputError
from pyengine.bench import paired
from pyengine.bench.paired import exceeds, holm, mean_interval, ratio

NOISES = {  # of a ratio's logarithm
    "normal": lambda draw, n: 0.05 * draw.normal(size=n),
    "heavy tails": lambda draw, n: 0.05 * draw.standard_t(3, size=n),
    "spikes": lambda draw, n: 0.03 * draw.normal(size=n) + (draw.random(n) < 0.1) * draw.normal(size=n) / 2,
}


@pytest.fixture
def fewer(monkeypatch):
    monkeypatch.setattr(paired, "RESAMPLES", 300)


@pytest.mark.parametrize(("noise", "rounds"), [("normal", 6), *((noise, 12) for noise in NOISES)])
def test_the_interval_holds_the_truth_as_often_as_it_says(fewer, noise, rounds):
    """On a machine that drifts by a fifth meanwhile. 600 runs at .95: .93 lies 2.2 deviations below."""
    draw, held = np.random.default_rng(rounds), 0
    for _ in range(600):
        drift = np.exp(0.2 * draw.normal(size=rounds))
        found = ratio(1.3 * drift * np.exp(NOISES[noise](draw, rounds)), drift)
        held += found.low <= 1.3 <= found.high
    assert 0.93 <= held / 600 <= 0.995


def test_the_verdict_needs_the_whole_interval():
    ours = [1.0, 1.1, 0.9, 1.02, 0.97, 1.05, 1.0]
    assert ratio([2 * t for t in ours], ours).verdict == "faster"
    assert ratio([0.5 * t for t in ours], ours).verdict == "slower"
    assert ratio(ours[::-1], ours).verdict == "cannot tell"
    assert ratio([2 * t for t in ours], ours)[:3] == pytest.approx((2.0, 2.0, 2.0))


def test_five_rounds_say_nothing():
    assert ratio([3.0] * 5, [1.0] * 5) == (3.0, 0.0, math.inf, 5)
    assert exceeds([3.0] * 5, [1.0] * 5, 1.0) == 1.0
    assert mean_interval([1.0] * 5) == (1.0, -math.inf, math.inf)


def test_a_p_value_and_the_interval_say_the_same():
    """One-sided 0.025 is where the interval's lower end crosses the limit."""
    draw = np.random.default_rng(3)
    ours = np.exp(0.1 * draw.normal(size=15))
    theirs = 1.05 * np.exp(0.1 * draw.normal(size=15))
    low = ratio(theirs, ours).low
    assert exceeds(theirs, ours, low - 1e-3) < 0.03
    assert exceeds(theirs, ours, low + 1e-3) > 0.02
    limits = [exceeds(theirs, ours, limit) for limit in (0.9, 1.0, 1.1, 1.3)]
    assert limits == sorted(limits)


def test_false_alarms_are_as_rare_as_they_should_be(monkeypatch):
    """No change, seven rows, Holm: at most 5 of 100 families raise any alarm beyond a threshold of 0."""
    monkeypatch.setattr(paired, "RESAMPLES", 4000)  # so that Holm's p of .0071 can be reached
    draw, alarms = np.random.default_rng(5), 0
    for _ in range(60):
        p = [exceeds(np.exp(0.02 * draw.normal(size=10)), np.ones(10), 1.0) for _ in range(7)]
        alarms += min(holm(p)) < 0.05
    assert alarms <= 6  # of 60, where 3 are expected of the best of tests


def test_holm_by_hand():
    """Holm's steps: 4 x .01, 3 x .02, 2 x .03, 1 x .04, each at least the one before."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_mean_of_differences_has_an_interval():
    draw = np.random.default_rng(9)
    values = 0.3 + draw.normal(size=50)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    half = 2.01 * values.std(ddof=1) / 50**0.5  # Student's
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.05)


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ([1.0], [1.0, 2.0], "1 samples beside 2"),
        ([], [], "pairs are wanted"),
        ([0.0], [1.0], "positive and finite"),
        ([1.0], [math.inf], "positive and finite"),
    ],
)
def test_samples_that_are_no_pairs_are_refused(theirs, ours, words):
    with pytest.raises(InputError, match=words):
        ratio(theirs, ours)
