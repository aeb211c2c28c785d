"""`pyengine demo`: every strategy on the same prompts and seeds, with exact reward and KL."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import pyengine
from pyengine.engine import Engine
from pyengine.results import Result, SamplingParams
from pyengine.strategies import BASE, BestOfK, Blockwise, Strategy, Tokenwise
from pyengine.worlds import reviews


@dataclass
class Row:
    """One strategy's outcome; sentiment is the exact reward, in (-1, 1)."""

    name: str
    scorer: str
    results: list[Result]
    seconds: float

    @cached_property
    def sentiments(self) -> list[float]:
        return [reviews.sentiment_of(r.text) for r in self.results]

    @cached_property
    def mean(self) -> float:
        return sum(self.sentiments) / len(self.results)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        n = len(self.results)
        return math.sqrt(sum((s - self.mean) ** 2 for s in self.sentiments) / max(n - 1, 1) / n)


def compare(prompts: int, k: int, block: int, weight: float, seed: int) -> list[Row]:
    """Run base, tokenwise, blockwise, best-of-K and Q-Probe on the embedded model."""
    plans: list[tuple[str, str, Any, Strategy]] = [
        ("base", "", None, BASE),
        (f"tokenwise λ={weight:g}", "prefix", "prefix", Tokenwise(weight)),
        (f"blockwise {k}×{block}", "prefix", "prefix", Blockwise(k, block)),
        (f"best-of-{k}", "reward model", "reward-model", BestOfK(k)),
        (f"Q-Probe {k}, β=0.1", "probe", "probe", BestOfK(k, "softmax", 0.1)),
    ]
    engine = Engine.from_pretrained(pyengine.embedded("policy"))
    texts = reviews.prompts(prompts)
    # Prompts repeat after 96; with a seed of its own each repetition is a new draw.
    sampling = [SamplingParams(max_tokens=128, seed=seed + i // 96) for i in range(prompts)]
    rows = []
    for name, label, scorer, strategy in plans:
        engine.set_scorer(pyengine.embedded(scorer) if scorer else None)
        start = time.perf_counter()
        results = engine.generate(texts, strategy, sampling)
        rows.append(Row(name, label, results, time.perf_counter() - start))
    return rows


def run(prompts: int, k: int, block: int, weight: float, seed: int, svg: Path | None) -> None:
    """Print the comparison; with `svg`, also write it as a picture."""
    rows = compare(prompts, k, block, weight, seed)
    console = Console(record=svg is not None, width=100 if svg else None)
    table = Table(title=f"{prompts} reviews by one frozen model, decoded in five ways from one seed", box=SIMPLE_HEAD)
    for column in ("strategy", "scored by"):
        table.add_column(column, no_wrap=True)
    for column in ("sentiment", "gain", "KL, nats", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        kl = sum(r.kl for r in row.results) / len(row.results)
        sign = "≤ " if row.results[0].kl_kind == "bound" else ""
        table.add_row(
            row.name,
            row.scorer,
            f"{row.mean:+.2f} ± {row.error:.2f}",
            "" if row is rows[0] else f"{row.mean - rows[0].mean:+.2f}",
            f"{sign}{kl:.2f}",
            f"{sum(len(r.tokens) for r in row.results) / row.seconds:,.0f}",
        )
    console.print(table)
    example = max(range(prompts), key=lambda i: rows[2].sentiments[i] - rows[0].sentiments[i])
    console.print(f"[bold]{rows[0].results[example].prompt}[/bold]")
    for row in rows:
        score = row.sentiments[example]
        console.print(
            f"  [cyan]{row.name}[/cyan] ({score:+.2f})[dim]{row.results[example].text}[/dim]", highlight=False
        )
    console.print(
        "\n[bold]What to see:[/bold] the weights never change, and every strategy raises the exact sentiment "
        "(-1 to 1); KL says how far each strayed from the base for it: exact for tokenwise, else an upper bound (≤).",
        highlight=False,
    )
    if svg:
        picture = console.export_svg(title="pyengine demo")
        svg.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))  # no font from elsewhere
