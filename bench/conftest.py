"""What all benchmarks share: they refuse while their op's tests are red, run peers in turn with ours in one run,
and write medians and raw samples to bench/results/<stem>.json.

    make bench                                         # everything, a quiet machine wanted
    pytest bench --benchmark-disable -k "not peers"    # smoke run at small sizes, as in `make test`
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyengine.machine import about

HERE = Path(__file__).parent
Rows = list[dict[str, object]]
Race = tuple[dict[str, float], dict[str, list[float]]]


@pytest.fixture(scope="module")
def rows(request):
    """Rows of the report. Refuses to time an op whose tests are red; writes what was collected at the end."""
    stem = request.module.__name__.rpartition("bench_")[2]
    timing = not request.config.getoption("benchmark_disable")
    if timing:
        files = [str(HERE.parent / "tests" / f"test_{name}.py") for name in getattr(request.module, "TESTS", [stem])]
        tests = [sys.executable, "-P", "-m", "pytest", "-q", "-x", *files]
        if subprocess.run(tests, capture_output=True, cwd=HERE.parent, check=False).returncode:
            pytest.exit(f"the tests of {stem} are red: nothing is timed", returncode=1)
    # glibc gives every half-megabyte result back to the kernel and page-faults it in again, which makes the
    # peers up to 4x slower, until one larger block was freed: free one, so that they run at their best.
    torch.ones(7 * 1024 * 1024)
    collected: Rows = []
    yield collected
    if timing and collected:
        report = {"machine": about(), "rows": collected}
        (HERE / "results" / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
        for row in collected:
            print(json.dumps({k: v for k, v in row.items() if k != "samples"}))


@pytest.fixture
def race(benchmark):
    """race(ours, peers, rounds, warm): seconds of each, the peers timed once before each round of ours.

    Taking turns keeps a machine's drift out of the ratios. `warm` calls each once more, untimed, before its turn,
    so that all find their inputs in the same cache: for what takes microseconds. Returns (medians, samples), keyed
    by the peers' names and "pyengine"; None when timing is disabled.
    """

    def run(
        ours: Callable[[], object], peers: dict[str, Callable[[], object]], rounds: int, warm: bool = False
    ) -> Race | None:
        samples: dict[str, list[float]] = {name: [] for name in peers}

        def take_turns():
            for name, peer in peers.items():
                if warm:
                    peer()
                start = time.perf_counter()
                peer()
                samples[name].append(time.perf_counter() - start)
            if warm:
                ours()
            return (), {}

        benchmark.pedantic(ours, setup=take_turns, rounds=rounds, warmup_rounds=1 if rounds > 1 else 0)
        if benchmark.stats is None:
            return None
        samples["pyengine"] = list(benchmark.stats.stats.data)
        kept = {name: [round(t, 7) for t in times[-rounds:]] for name, times in samples.items()}
        return {name: statistics.median(times) for name, times in kept.items()}, kept

    return run


@pytest.fixture
def peak():
    return _peak_extra_bytes


def _peak_extra_bytes(work: Callable[[], object]) -> int:
    """By how much the process's memory rises above where it stood, at its highest, while `work` runs."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

    ctypes.CDLL(None).malloc_trim(0)  # else memory that earlier work freed would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS:")
    work()
    return status("VmHWM:") - before
