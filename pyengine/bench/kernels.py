"""The ops' own benches, which lie in the checkout, through one command; and how their races are recorded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyengine.bench import paired
from pyengine.bench.report import Column, Report, entry, interval, ms, read, times
from pyengine.errors import InputError
from pyengine.machine import ROOT

OURS, ANCHOR = "pyengine", "plain sum"


def raced(case: str, samples: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The entries of a race, seconds of each contender; a plain sum, else the first peer, is the anchor of
    `bench compare`."""
    peers = [name for name in samples if name != OURS]
    anchor = next((name for name in peers if ANCHOR in name), peers[0] if peers else None)
    found = []
    for name, seconds in samples.items():
        extra: dict[str, Any] = {"anchor": name == anchor}
        if name != OURS:
            ratio = paired.ratio(seconds, samples[OURS])
            extra |= {"times_as_long": ratio._asdict(), "pyengine_is": ratio.verdict}
        found.append(entry(case, name, seconds, extra))
    return found


def benches() -> dict[str, Path]:
    """By op. InputError where this is no checkout."""
    found = {path.stem.removeprefix("bench_"): path for path in sorted((ROOT / "bench").glob("bench_*.py"))}
    if not found:
        raise InputError(f"bench kernels: there are no benches of ops in {ROOT / 'bench'}: run it in a clone")
    return found


def run(op: str | None, out: Path) -> list[Report]:
    """Each op's bench in a process of its own, its record in OUT/<op>.json. InputError for an op that has none, and
    where a bench fails (of an op whose tests are red nothing is timed)."""
    there = benches()
    if op is not None and op not in there:
        raise InputError(f"bench kernels {op}: there are {', '.join(there)}")
    reports = []
    for name in there if op is None else [op]:
        command = [sys.executable, "-P", "-m", "pytest", str(there[name]), "-q", "--records", str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        record = out / f"{name}.json"
        if done.returncode or not record.is_file():
            said = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
            raise InputError(f"bench kernels {name}: {said[-1]}")
        found = read(record)
        if not found["benchmarks"]:
            raise InputError(f"bench kernels {name}: it is no race of pairs: `pytest {there[name]}` writes its figures")
        reports.append(Report(*(found[field] for field in ("kind", "settings", "warnings", "benchmarks", "machine"))))
    return reports


COLUMNS = (
    Column("case", lambda one: one["group"]),
    Column("median, ms", lambda one: ms(one["stats"], "median")),
    Column("takes", lambda one: times(one["extra_info"].get("times_as_long"))),
    Column("95 % interval", lambda one: interval(one["extra_info"].get("times_as_long"))),
    Column("pyengine is", lambda one: one["extra_info"].get("pyengine_is", "")),
)
