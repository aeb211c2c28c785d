"""Reward against KL: how much each strategy wins for what it costs, as numbers and as a picture."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pyengine import ledger
from pyengine.engine import Engine
from pyengine.errors import InputError
from pyengine.results import SamplingParams, finite, seeded
from pyengine.scorers import Scorer, ScorerLike, parts_of
from pyengine.strategies import BASE, Blockwise, Strategy, Tokenwise

COLOURS = {"base": "#7a7a7a", "tokenwise": "#1b6ca8", "blockwise": "#c8553d", "best-of-K": "#4f8f4f"}


@dataclass(frozen=True)
class Point:
    """One strategy over all prompts.

    reward: mean; gain: over the base policy, with its standard error over prompts; normalised: the gain in standard
    deviations of the base's reward. win, tie: against the base's responses to the same prompts. kl: mean, in nats;
    of a "bound", the mean of the bounds.
    """

    strategy: str
    setting: str
    reward: float
    gain: float
    error: float
    normalised: float
    win: float
    tie: float
    kl: float
    kl_kind: Literal["exact", "bound"]
    tokens_per_second: float


def label(strategy: Strategy) -> tuple[str, str]:
    """(family, setting), as tables and pictures name them."""
    if isinstance(strategy, Tokenwise):
        budget = f"{strategy.kl_budget:g} nats a {strategy.per}" if strategy.kl_budget else f"λ={strategy.weight:g}"
        return "tokenwise", budget
    soft = "" if strategy.beta is None else f", β={strategy.beta:g}"
    if isinstance(strategy, Blockwise):
        return "blockwise", f"K={strategy.k}, M={strategy.block_tokens}{soft}"
    return "best-of-K", f"K={strategy.k}{soft}"


def measure(
    engine: Engine,
    prompts: Sequence[str],
    plans: Sequence[tuple[Strategy, ScorerLike]],
    reward: ScorerLike | None = None,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    progress: bool | None = None,
) -> list[Point]:
    """The base policy first, then a point for each (strategy, the scorer that it follows), these from the same seeds.

    The base draws from seeds of its own: best-of-K has the base's response to a seed among its candidates, and would
    tie with it where an independent one may win. reward: what is measured, where that is not what is followed: the
    true reward beside a learned scorer. The engine's scorer is restored at the end.
    """
    if not plans:
        raise InputError("a curve needs at least one strategy")
    if not prompts:
        raise InputError("a curve needs prompts")
    given = seeded(prompts, sampling)
    apart = [dataclasses.replace(p, seed=(p.seed or 0) ^ 1 << 40) for p in given]
    loaded: dict[object, list[tuple[float, Scorer]]] = {}  # each path once

    def terms(scorer: ScorerLike) -> list[tuple[float, Scorer]]:
        key = str(scorer) if isinstance(scorer, (str, os.PathLike)) else id(scorer)
        if key not in loaded:
            loaded[key] = [part.term() for part in parts_of(scorer)]
        if not loaded[key]:
            raise InputError("a curve needs a scorer for every strategy")
        return loaded[key]

    points, base_rewards = [], list[float]()
    hide = None if progress is None else not progress
    with engine.following(None):
        for i, (strategy, scorer) in enumerate(
            tqdm([(BASE, plans[0][1]), *plans], unit="strategy", disable=hide, leave=False)
        ):
            followed = terms(scorer)
            measured = followed if reward is None else terms(reward)
            reported = [] if reward is None else [(0.0, one) for _, one in measured]
            engine.set_scorer([*followed, *reported])
            runs = strategy
            if isinstance(strategy, Tokenwise) and strategy.kl_budget is not None and strategy.per == "sequence":
                runs = engine.calibrate(prompts, strategy.kl_budget, given, progress=False)
            start = time.perf_counter()
            results = engine.generate(prompts, runs, given if i else apart, progress=False)
            seconds = time.perf_counter() - start
            names = [part.name for part in engine.parts[-len(measured) :]]
            rewards = [
                sum(weight * r.rewards[name] for (weight, _), name in zip(measured, names, strict=True) if weight)
                for r in results
            ]
            bad = next((j for j, r in enumerate(rewards) if math.isnan(r)), None)
            if bad is not None:
                raise InputError(f"curve: {' + '.join(names)} is NaN for prompt {bad} under {strategy}")
            base_rewards = base_rewards or rewards
            gain, wins = ledger.expected_reward(rewards, base_rewards), ledger.win_rate(rewards, base_rewards)
            points.append(
                Point(
                    *(label(strategy) if i else ("base", "")),
                    reward=gain.mean,
                    gain=gain.gain,
                    error=gain.error,
                    normalised=gain.normalised,
                    win=wins.win,
                    tie=wins.tie,
                    kl=sum(r.kl for r in results) / len(results),
                    kl_kind=results[0].kl_kind,
                    tokens_per_second=sum(len(r.tokens) for r in results) / seconds,
                )
            )
    return points


def report(points: Sequence[Point]) -> None:
    """Print the points as a table."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("strategy", no_wrap=True)
    for column in ("reward", "gain", "in std", "wins", "KL, nats", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for p in points:
        gained = (
            ("", "", "")
            if p is points[0]
            else (f"{p.gain:+.2f} ± {p.error:.2f}", f"{p.normalised:+.2f}", f"{p.win:.0%}")
        )
        kl = f"{'≤ ' if p.kl_kind == 'bound' else ''}{p.kl:.2f}"
        table.add_row(f"{p.strategy} {p.setting}", f"{p.reward:+.2f}", *gained, kl, f"{p.tokens_per_second:,.0f}")
    Console().print(table)


def save(points: Sequence[Point], path: Path, **about: object) -> None:
    """JSON: what it is `about`, then the points; a number that is not finite, which JSON lacks, becomes null."""
    record = finite({**about, "points": [dataclasses.asdict(point) for point in points]})
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def draw(points: Sequence[Point], path: Path, title: str, unit: str = "reward") -> None:
    """The points as a picture: filled where the KL is exact, hollow where it is an upper bound."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    base = points[0]
    for family, colour in COLOURS.items():
        mine = sorted((p for p in points if p.strategy == family), key=lambda p: p.kl)
        if not mine:
            continue
        line = mine if family == "base" else [base, *mine]
        bounded = any(p.kl_kind == "bound" for p in mine)
        face, name = ("white", f"{family} (KL: upper bound)") if bounded else (colour, family)
        axis.plot([p.kl for p in line], [p.reward for p in line], "-", color=colour, alpha=0.6)
        x, y, spread = ([getattr(p, field) for p in mine] for field in ("kl", "reward", "error"))
        axis.errorbar(x, y, spread, fmt="o", color=colour, markerfacecolor=face, label=name, capsize=2)
        for p in mine:
            axis.annotate(p.setting, (p.kl, p.reward), xytext=(4, -9), textcoords="offset points", fontsize=6)
    axis.set_xlabel("KL from the base policy, nats a response")
    axis.set_ylabel(unit)
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
