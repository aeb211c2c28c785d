"""The papers' claims in worlds with exact answers, and again through the engine: python -m bench.claims.

Each claim has two columns: EXACT, by dynamic programming or order statistics, and ENGINE, sampled through
`pyengine.Engine` from a GPT-2 that represents the world, with its standard error. A sampled figure further than four
standard errors from its exact one is a failure too. Seeds are fixed here; nothing is drawn again until it passes.

The rows W4, O4 and R1 to R3 have no exact answer: they are about the embedded review model, whose rewards are exact
for any text. O3 is about cost.

Writes bench/results/claims.json, docs/claims.svg, docs/claims_reviews.svg and docs/claims_training.svg; --small takes
reduced sizes and --only some rows, and then nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from pyengine.machine import about

HERE = Path(__file__).parent
# The neighbours by their names, also under `python -m`, which has the repository root on the path instead.
sys.path.insert(0, str(HERE))

import claims_cost  # noqa: E402
import claims_decoding  # noqa: E402
import claims_offline  # noqa: E402
import claims_plot  # noqa: E402
import claims_reviews  # noqa: E402
import claims_rewards  # noqa: E402
import claims_trainers  # noqa: E402
import claims_weights  # noqa: E402
from claims_rig import SMALL, Row, Sizes  # noqa: E402

MODULES = (
    claims_decoding,
    claims_rewards,
    claims_weights,
    claims_offline,
    claims_cost,
    claims_trainers,
    claims_reviews,
)
CLAIMS = {claim.__name__.upper(): claim for module in MODULES for claim in module.CLAIMS}


def machine() -> dict[str, Any]:
    """What the figures were made on, and the commit."""
    versions = {name: metadata.version(name) for name in ("transformers", "numpy")}
    return about() | versions


def run(sizes: Sizes, only: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of the table, in order; `only` those named, if any are."""
    for name, function in CLAIMS.items():
        if only and name not in only:
            continue
        start = time.perf_counter()
        row = function(sizes)
        row.seconds = round(time.perf_counter() - start, 2)
        row.checks = {name: bool(held) for name, held in row.checks.items()}  # NumPy's are no JSON
        yield row


def table(rows: Sequence[Row]) -> Table:
    """CD: Controlled Decoding; LSC: Transforming and Combining Rewards; QP: Q-Probe; WPO: Weighted Preference
    Optimization; OA: offline alignment (arXiv:2308.12050)."""
    title = "The papers' claims in exact worlds, and on the embedded model (sampled ± standard error)"
    out = Table(title=title, show_lines=True)
    for name in ("", "claim", "paper", "exact world, or setting", "engine", "asserted", "verdict"):
        out.add_column(name)
    for row in rows:
        style = "red" if row.verdict.startswith("does") else "green" if row.verdict.startswith("holds") else ""
        exact = f"{row.exact}\nCaveat: {row.caveat}" if row.caveat else row.exact
        out.add_row(row.id, row.claim, row.paper, exact, row.engine, row.asserted, Text(row.verdict, style))
    return out


def report(rows: Sequence[Row], sizes: Sizes) -> dict[str, Any]:
    """What claims.json holds."""
    claims = [asdict(row) | {"verdict": row.verdict} for row in rows]
    seconds = round(sum(row.seconds for row in rows), 1)
    return {"machine": machine(), "sizes": asdict(sizes), "seconds": seconds, "claims": claims}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="reduced sizes; nothing is written")
    parser.add_argument("--only", metavar="R1,R2", default="", help="these rows; nothing is written")
    options = parser.parse_args(arguments)
    only = [name.strip().upper() for name in options.only.split(",") if name.strip()]
    unknown = [name for name in only if name not in CLAIMS]
    if unknown:
        parser.error(f"--only: no claim {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    sizes = SMALL if options.small else Sizes()
    logging.disable_progress_bar()
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("claims", total=len(only or CLAIMS))
        for row in run(sizes, only):
            rows.append(row)
            bar.update(task, advance=1, description=f"{row.id} took {row.seconds:.0f} s")
    Console(width=None if Console().is_terminal else 200).print(table(rows))
    if not options.small and not only:
        found = report(rows, sizes)
        (HERE / "results" / "claims.json").write_text(json.dumps(found, indent=1) + "\n")
        print(*(draw(found) for draw in claims_plot.PLOTS))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
