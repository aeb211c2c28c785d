"""A run's record and what is made of it: JSON that pytest-benchmark reads too, JSON lines, Markdown, a table."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyengine.errors import InputError
from pyengine.jsonl import json_object
from pyengine.machine import about
from pyengine.results import finite

SCHEMA = 1
PACKAGES = ("transformers", "tokenizers", "numpy", "triton", "vllm", "flash-attn")


def entry(group: str, name: str, seconds: Sequence[float], extra: dict[str, Any]) -> dict[str, Any]:
    """A benchmark as pytest-benchmark writes it, with its raw samples; what else is known of it under `extra_info`."""
    from pytest_benchmark.stats import Stats

    stats = Stats()
    for one in seconds:
        stats.update(one)
    numbers = stats.as_dict() | {"data": list(seconds), "iterations": 1}
    fixed = {"group": group, "name": name, "fullname": f"{group}::{name}", "params": None, "param": None}
    return fixed | {"extra_info": extra, "options": {}, "stats": numbers}


@dataclass
class Report:
    """kind: of which command. warnings: what a reader must know before the figures. benchmarks: see `entry`."""

    kind: str
    settings: dict[str, Any]
    warnings: list[str]
    benchmarks: list[dict[str, Any]]
    machine: dict[str, Any] = field(default_factory=lambda: about(*PACKAGES))

    def document(self) -> dict[str, Any]:
        """The JSON. The fields of pytest-benchmark lie beside ours, so that its `compare` and histogram read it."""
        commit = str(self.machine["commit"] or "")
        theirs = {
            "machine_info": {"node": platform.node(), "python_version": platform.python_version(), "cpu": self.machine},
            "commit_info": {"id": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")},
            "benchmarks": self.benchmarks,
            "datetime": datetime.datetime.now(datetime.UTC).isoformat(),
            "version": "pyengine",
        }
        ours = {"schema": SCHEMA, "kind": self.kind, "settings": self.settings, "warnings": self.warnings}
        return finite(ours | {"machine": self.machine, "load": os.getloadavg()} | theirs)


def writable(out: Path) -> None:
    """InputError, before anything is measured, where OUT.json cannot be written."""
    if out.suffix != ".json":
        raise InputError(f"--out {out}: give a name that ends in .json; .jsonl, .md and .svg are written beside it")
    try:
        with out.open("a"):
            pass
        if out.stat().st_size == 0:
            out.unlink()
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}") from error


def write(report: Report, out: Path, columns: Sequence[Column]) -> None:
    """OUT.json, OUT.jsonl (a sample a line) and OUT.md."""
    out.write_text(json.dumps(report.document(), indent=1, allow_nan=False) + "\n")
    write_beside(report, out, columns)


def write_beside(report: Report, out: Path, columns: Sequence[Column]) -> None:
    """What is made of a record that is there."""
    lines = [
        {
            "benchmark": one["fullname"],
            "round": i,
            "seconds": seconds,
            "schema": SCHEMA,
            "commit": report.machine["commit"],
        }
        for one in report.benchmarks
        for i, seconds in enumerate(one["stats"]["data"])
    ]
    out.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out.with_suffix(".md").write_text(markdown(report, columns))


def read(path: Path) -> dict[str, Any]:
    """A record that was written here. InputError, naming it, for anything else."""
    try:
        found = json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if found.get("schema") != SCHEMA or not isinstance(found.get("benchmarks"), list):
        raise InputError(f'{path}: no record of `pyengine bench` ("schema": {SCHEMA} and "benchmarks")')
    return found


@dataclass(frozen=True)
class Column:
    """A figure. head: its name and unit. text: of a benchmark (see `entry`); "" where it was not measured."""

    head: str
    text: Any


def shown(report: Report, columns: Sequence[Column]) -> list[list[str]]:
    """Heads, then rows; a figure that nobody has is left out. Contenders of a throughput stand side by side, as there
    are more figures than contenders; what else there is has a row for each benchmark."""
    lines = [["", *(one["name"] for one in report.benchmarks)]]
    lines += [[c.head, *(c.text(one) for one in report.benchmarks)] for c in columns]
    kept = [line for i, line in enumerate(lines) if i == 0 or any(line[1:])]
    kept[0][0] = report.kind
    return kept if report.kind == "throughput" else [list(row) for row in zip(*kept, strict=True)]


def table(report: Report, columns: Sequence[Column], console: Console | None = None) -> None:
    """Print it, and the warnings."""
    console = console or Console()
    heads, *rows = shown(report, columns)
    found = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, head in enumerate(heads):
        found.add_column(Text(head), justify="right" if i else "left")
    for row in rows:
        found.add_row(*map(Text, row))  # a case's [name] is no markup
    console.print(found)
    for warning in report.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False)


def markdown(report: Report, columns: Sequence[Column]) -> str:
    heads, *rows = shown(report, columns)
    lines = [heads, ["---"] * len(heads), *rows]
    machine = report.machine
    text = "".join(f"| {' | '.join(row)} |\n" for row in lines)
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}"
    return text + f"\n{where}\n" + "".join(f"\n- {warning}" for warning in report.warnings)


def ms(numbers: dict[str, float] | None, *names: str) -> str:
    """Milliseconds to three digits."""
    shown = (1e3 * numbers[name] for name in names) if numbers else ()
    return " / ".join(f"{t:,.0f}" if t >= 100 else f"{t:.3g}" for t in shown)


def times(ratio: dict[str, float] | None) -> str:
    return f"{ratio['ratio']:.2f}×" if ratio else ""


def interval(ratio: dict[str, Any] | None, digits: int = 2) -> str:
    """ "" where it is not finite, or was written as null."""
    return (
        f"{ratio['low']:.{digits}f} to {ratio['high']:.{digits}f}"
        if ratio and math.isfinite(ratio["high"] or math.inf)
        else ""
    )


def number(name: str, form: str, unit: float = 1.0) -> Any:
    return lambda one: format(one["extra_info"][name] * unit, form) if name in one["extra_info"] else ""


THROUGHPUT = (
    Column("tokens/s", number("committed_tokens_per_s", ",.1f")),
    Column("drawn/s", number("drawn_tokens_per_s", ",.1f")),
    Column("first token, ms", lambda one: ms(one["extra_info"].get("first_token_s"), "p50")),
    Column("first block, ms", lambda one: ms(one["extra_info"].get("first_block_s"), "p50")),
    Column("gap p50, ms", lambda one: ms(one["extra_info"].get("commit_gap_s"), "p50")),
    Column("gap p90, ms", lambda one: ms(one["extra_info"].get("commit_gap_s"), "p90")),
    Column("gap p99, ms", lambda one: ms(one["extra_info"].get("commit_gap_s"), "p99")),
    Column("peak, MB", number("extra_peak_bytes", ",.0f", 1e-6)),
    Column("of floor", number("fraction_of_floor", ".0%")),
    Column("J/token", number("joules_per_token", ".3g")),
    Column("prefix hits", number("prefix_hit_rate", ".0%")),
    Column("takes", lambda one: times(one["extra_info"].get("times_as_long"))),
    Column("95 % interval", lambda one: interval(one["extra_info"].get("times_as_long"))),
    Column("pyengine is", lambda one: one["extra_info"].get("pyengine_is", "")),
)
