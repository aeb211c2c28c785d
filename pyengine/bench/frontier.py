"""Reward at fixed compute: what a strategy wins over plain sampling that may take the same seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from pyengine.bench import paired, turns
from pyengine.bench.report import Column, Report, entry, ms, number
from pyengine.bench.sensors import Watch
from pyengine.engine import Engine
from pyengine.errors import InputError
from pyengine.evaluation.curve import label
from pyengine.results import Result, SamplingParams
from pyengine.scorers import ScorerLike
from pyengine.strategies import BASE, BestOfK, Strategy

PLAIN = "plain"
FAVOUR = 1.1  # of the seconds, given to plain sampling, so that noise in either time is not counted as a gain
SAMPLES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of plain sampling, of which the best is kept


class Point(NamedTuple):
    """A strategy over all prompts. seconds: of each round, a response. rewards, kl: of a prompt, means over rounds."""

    family: str
    setting: str
    seconds: list[float]
    rewards: list[float]
    kl: list[float]

    @property
    def price(self) -> float:
        return statistics.median(self.seconds)


def measure(
    engine: Engine,
    prompts: Sequence[Any],
    strategies: Sequence[Strategy],
    reward: ScorerLike,
    max_tokens: int,
    rounds: int = 6,
    max_seconds: float = 300.0,
    seed: int = 0,
    say: Callable[[str], object] = lambda line: None,
) -> list[Point]:
    """Plain sampling first, a point for each n, then the strategies, which follow the reward that is measured.

    Plain sampling draws n whole responses and keeps the one of highest reward, which is what it can do with more
    seconds. All take turns in each round, and each round has seeds of its own; none is begun that would end later.
    """
    if not prompts:
        raise InputError("bench throughput --reward needs prompts")
    plans: dict[tuple[str, str], Strategy] = {(PLAIN, f"n={n}"): BASE if n == 1 else BestOfK(n) for n in SAMPLES}
    plans |= {label(strategy): strategy for strategy in strategies}
    seconds: dict[Any, list[float]] = {key: [] for key in plans}
    found: dict[Any, list[list[Result]]] = {key: [] for key in plans}
    deadline, longest = time.monotonic() + max_seconds, 0.0
    with engine.following(reward):
        for number, order in zip(range(rounds + 1), turns.orders(list(plans), seed), strict=False):
            began = time.monotonic()
            if number > 1 and began + longest > deadline:
                break
            sampling = [SamplingParams(max_tokens, seed=seed + 10_000 * number + i) for i in range(len(prompts))]
            for key in order:
                decode = partial(engine.generate, prompts, plans[key], sampling, progress=False)
                results, took = turns.timed(decode, engine.model.device)
                if number:  # the first round warms up
                    seconds[key].append(took.wall / len(prompts))
                    found[key].append(results)
            longest = max(longest, time.monotonic() - began)
            say(f"round {number} of {rounds}: {longest:.1f} s at most" if number else "warm")
    return [Point(*key, seconds[key], _means(found[key], "reward"), _means(found[key], "kl")) for key in plans]


def _means(rounds: Sequence[Sequence[Result]], field: str) -> list[float]:
    """Of each prompt over rounds."""
    return [statistics.fmean(getattr(result, field) for result in own) for own in zip(*rounds, strict=True)]


def at_equal_seconds(point: Point, points: Sequence[Point]) -> Point:
    """Plain sampling with as many n as fit into the seconds of `point`; with one where that takes longer already."""
    plain = [p for p in points if p.family == PLAIN]
    return [plain[0], *(p for p in plain if p.price <= FAVOUR * point.price)][-1]


def rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Of each point: reward with its interval over prompts, the gain over plain sampling in the same seconds (and over
    one plain response), each with its interval, and KL a second. low, high: of the reward."""
    found, one = [], points[0]
    for point in points:
        peer = at_equal_seconds(point, points)
        mean, low, high = paired.mean_interval(point.rewards)
        row: dict[str, Any] = {"family": point.family, "setting": point.setting, "seconds": point.price}
        row |= {"reward": mean, "low": low, "high": high}
        row |= {"kl": statistics.fmean(point.kl), "kl_per_s": statistics.fmean(point.kl) / point.price}
        if point.family != PLAIN:
            row |= {"gain": _gain(point, peer), "over": peer.setting, "over_one": _gain(point, one)}
        found.append(row)
    return found


def _gain(point: Point, peer: Point) -> dict[str, float]:
    gains = [ours - theirs for ours, theirs in zip(point.rewards, peer.rewards, strict=True)]
    return dict(zip(("mean", "low", "high"), paired.mean_interval(gains), strict=True))


def report(points: Sequence[Point], settings: dict[str, Any], watch: Watch) -> Report:
    entries = [
        entry("reward at fixed compute", f"{p.family} {p.setting}", p.seconds, row | {"anchor": p is points[0]})
        for p, row in zip(points, rows(points), strict=True)
    ]
    dearest = [p for p in points if p.family == PLAIN][-1]
    said = [
        f"{p.family} {p.setting} takes longer than plain sampling with {dearest.setting}, the most that is drawn"
        for p in points
        if p.family != PLAIN and p.price > 1.25 * dearest.price
    ]
    done, asked = len(points[0].seconds), len(points[0].rewards)
    if done < settings["rounds"]:
        said.append(f"{done} of {settings['rounds']} rounds: --max-seconds was over")
    if asked < paired.FEWEST:
        said.append(f"{asked} prompts: fewer than {paired.FEWEST} tell nothing")
    return Report("reward", settings, [*watch.warnings(), *said], entries)


def gained(name: str) -> Callable[[dict[str, Any]], str]:
    def text(one: dict[str, Any]) -> str:
        gain = one["extra_info"].get(name)
        return f"{gain['mean']:+.3g} ({gain['low']:+.3g} to {gain['high']:+.3g})" if gain else ""

    return text


COLUMNS = (
    Column("ms a response", lambda one: ms(one["extra_info"], "seconds")),
    Column("reward", number("reward", "+.3f")),
    Column("gain at equal seconds", gained("gain")),
    Column("over", lambda one: one["extra_info"].get("over", "")),
    Column("gain over one", gained("over_one")),
    Column("KL, nats", number("kl", ".2f")),
    Column("nats/s", number("kl_per_s", ".2f")),
)
