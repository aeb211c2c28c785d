"""Two commits against each other: both built, run in turns in processes of their own, and told apart or not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyengine.bench import paired, worker
from pyengine.bench.records import verdict
from pyengine.bench.report import Column, Report, entry, interval
from pyengine.bench.sensors import Watch
from pyengine.errors import InputError
from pyengine.machine import ROOT

BUILT = ROOT / "build" / "bench"
SOURCES = ("CMakeLists.txt", "csrc", "kernels", "pyengine", "pyproject.toml")
# How the memory of a process happens to be laid out moves a case by a percent or two for as long as it lives: pairs of
# processes are what is counted, and ten are the fewest whose p-value Holm leaves below .025 for seven rows.
PAIRS, TURNS = 10, 5
SAMPLE = 0.04  # seconds of a turn, at least


class Outcome(NamedTuple):
    """Of a case: new / old processor time, a number for each pair of processes, and why there are none."""

    ratios: list[float]
    seconds: list[float]
    same: bool
    error: str | None = None


def commit_of(ref: str) -> str:
    """InputError, naming it, where there is no such commit, or no checkout."""
    if _git("rev-parse", "--git-dir") is None:
        raise InputError(f"bench compare --against {ref}: {ROOT} is no git checkout: compare two records instead")
    found = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if found is None:
        raise InputError(f"--against {ref}: git knows no such commit")
    return found


def current() -> str:
    """HEAD, or a commit of the tracked files as they are now, which nothing points to."""
    made = _git("stash", "create")
    if made is None:
        raise InputError("bench compare: git could not make a commit of the working tree (a merge, or git add -N?)")
    return made or commit_of("HEAD")


def built(commit: str) -> Path:
    """A folder with the package of this commit, built once for the same sources, with what is installed here."""
    trees = [_git("rev-parse", f"{commit}:{name}") or name for name in SOURCES]
    site = BUILT / hashlib.sha1(" ".join([*trees, sys.version]).encode()).hexdigest()[:16]
    if site.is_dir():
        return site
    source, part = BUILT / f"src-{os.getpid()}", BUILT / f"part-{os.getpid()}"
    BUILT.mkdir(parents=True, exist_ok=True)
    if _git("worktree", "add", "--detach", "--force", str(source), commit) is None:
        raise InputError(f"bench compare: git could not check out {commit} in {source}")
    try:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        install += ["--no-build-isolation", "--target", str(part), "-C", f"build-dir={source}/build", str(source)]
        done = subprocess.run(install, capture_output=True, text=True, check=False, cwd=BUILT)
        if done.returncode:
            raise InputError(f"bench compare: {commit} does not build: {' '.join(done.stderr.split()[-60:])}")
        part.replace(site)
    finally:
        _git("worktree", "remove", "--force", str(source))
        shutil.rmtree(part, ignore_errors=True)
    return site


def compare(
    old: Path,
    new: Path,
    cases: Sequence[str] = worker.CASES,
    pairs: int = PAIRS,
    turns: int = TURNS,
    seed: int = 0,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Outcome]:
    """Each case of two built versions, the controls first: in each of `pairs` fresh pairs of processes `turns` turns,
    the order drawn anew. By the processor time of one thread, as the wall's is also what else the machine does.

    A pair's ratio is the median of its turns'. InputError where a version does not start.
    """
    draw, named = random.Random(seed), (*worker.CONTROLS, *cases)
    ratios: dict[str, list[float]] = {name: [] for name in named}
    seconds: dict[str, list[float]] = {name: [] for name in named}
    answers: dict[str, set[str]] = {name: set() for name in named}
    failed, calls = dict[str, str](), dict[str, int]()
    for number in range(pairs):
        with ExitStack() as stack:
            sides = {side: stack.enter_context(_worker(site)) for side, site in (("old", old), ("new", new))}
            for name in named:
                if name in failed:
                    continue
                if name not in calls:
                    first = [_ask(sides[side], name, 1) for side in sides]
                    told = zip(sides, first, strict=True)
                    wrong = next((f"{side}: {one['error']}" for side, one in told if "error" in one), None)
                    if wrong is not None:
                        failed[name] = wrong
                        continue
                    calls[name] = max(1, round(SAMPLE / max(1e-6, min(one["cpu"] for one in first))))
                found = [_turn(sides, name, calls[name], draw) for _ in range(turns)]
                ratios[name].append(statistics.median(one["new"]["cpu"] / one["old"]["cpu"] for one in found))
                seconds[name].append(statistics.median(one["new"]["cpu"] for one in found))
                answers[name] |= {side["digest"] for one in found for side in one.values()}
        say(f"{number + 1} of {pairs} pairs of processes")
    return {n: Outcome(ratios[n], seconds[n], len(answers[n]) == 1, failed.get(n)) for n in named}


def report(outcomes: dict[str, Outcome], threshold: float, old: str, new: str, watch: Watch) -> Report:
    """A row for each case. Those that are slower by more than the threshold, Holm over all but controls, and those that
    fail in the new version alone are named in `settings["regressions"]`. threshold: of the old's time."""
    timed = {name: one for name, one in outcomes.items() if one.error is None}
    rows = [name for name in timed if name not in worker.CONTROLS]
    tests = [paired.exceeds(timed[n].ratios, [1.0] * len(timed[n].ratios), 1 + threshold) for n in rows]
    slower = [name for name, p in zip(rows, paired.holm(tests), strict=True) if p <= paired.ALARM]
    slower += [name for name, one in outcomes.items() if (one.error or "").startswith("new: ")]  # works no more
    warnings = [f"{name}: {one.error}" for name, one in outcomes.items() if one.error is not None]
    warnings += [f"{name}: the two versions give other results" for name, one in timed.items() if not one.same]
    entries = []
    for name, one in timed.items():
        ratio = paired.ratio(one.ratios, [1.0] * len(one.ratios))
        if name in worker.CONTROLS and (ratio.low > 1 + threshold or ratio.high < 1 - threshold):
            warnings.append(f"{name}, which is the same in both, moved: the two did not meet the same machine")
        told = verdict(ratio, threshold, name in slower)
        extra = {"new_takes": ratio._asdict(), "ratios": one.ratios, "verdict": told}
        entries.append(entry("compare", name, one.seconds, extra | {"anchor": name == worker.CONTROLS[0]}))
    settings = {"against": old, "commit": new, "threshold": threshold, "regressions": slower, "clock": "processor"}
    return Report("compare", settings, [*watch.warnings(), *warnings], entries)


def run(ref: str, threshold: float, say: Callable[[str], object]) -> Report:
    """The working tree against `ref`."""
    old, new = commit_of(ref), current()
    watch = Watch(torch.device("cpu"))
    say(f"building {ref} and the working tree (a minute or two each, the first time)")
    return report(compare(built(old), built(new), say=say), threshold, old, new, watch)


COLUMNS = (
    Column("takes", lambda one: f"{one['extra_info']['new_takes']['ratio']:.3f}×"),
    Column("95 % interval", lambda one: interval(one["extra_info"]["new_takes"], 3)),
    Column("verdict", lambda one: one["extra_info"]["verdict"]),
)


def _turn(sides: dict[str, Any], name: str, calls: int, draw: random.Random) -> dict[str, Any]:
    found = {side: _ask(sides[side], name, calls) for side in draw.sample(list(sides), 2)}
    for side, one in found.items():
        if "error" in one:
            raise InputError(f"bench compare: {name} failed in the {side} version: {one['error']}")
    return found


def _ask(process: subprocess.Popen[str], name: str, calls: int) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps([name, calls]) + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise InputError(f"bench compare: a version ended at {name!r} with exit code {process.wait()}")
    return json.loads(line)


@contextmanager
def _worker(site: Path) -> Any:
    command = [sys.executable, "-P", worker.__file__, str(site)]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryFile("w+") as log:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        process = subprocess.Popen(command, text=True, env=os.environ | own, **pipes)
        assert process.stdout is not None
        try:
            if not process.stdout.readline():
                log.seek(0)
                said = log.read().strip().splitlines()
                raise InputError(f"bench compare: {site} does not start: {said[-1] if said else process.wait()}")
            yield process
        finally:
            process.kill()
            process.wait()


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else None
