"""What all benchmarks share: they refuse while their op's tests are red, run peers in turn with ours in one run,
and write a record, medians and raw samples, to bench/results/<stem>.json.

    make bench                                         # everything, a quiet machine wanted
    pyengine bench kernels tilt                        # one op's, the record elsewhere
    pytest bench --benchmark-disable -k "not peers"    # smoke run at small sizes, as in `make test`
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyengine.bench import turns
from pyengine.bench.kernels import raced
from pyengine.bench.report import Report
from pyengine.bench.sensors import Watch

HERE = Path(__file__).parent
CPU = torch.device("cpu")
Rows = list[dict[str, object]]
Race = tuple[dict[str, float], dict[str, list[float]]]


def pytest_addoption(parser):
    parser.addoption("--records", type=Path, default=HERE / "results", help="folder for <stem>.json")


@pytest.fixture(scope="module")
def entries():
    """What `race` has timed in this file."""
    return []


@pytest.fixture(scope="module")
def rows(request, entries):
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
    watch = Watch(CPU)
    yield collected
    if timing and collected:
        report = Report("kernels", {"op": stem}, watch.warnings(), entries).document() | {"rows": collected}
        (request.config.getoption("records") / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
        for row in collected:
            print(json.dumps({k: v for k, v in row.items() if k != "samples"}))


@pytest.fixture
def race(request, entries):
    """race(ours, peers, rounds, warm): seconds of each, in turns as `pyengine.bench.turns.race` takes them.

    Returns (medians, samples), keyed by the peers' names and "pyengine"; None when timing is disabled.
    """

    def run(
        ours: Callable[[], object], peers: dict[str, Callable[[], object]], rounds: int, warm: bool = False
    ) -> Race | None:
        runs = {**peers, "pyengine": ours}
        turns.race(runs, 1)  # warms up, and fills the allocator
        if request.config.getoption("benchmark_disable"):
            return None
        samples = turns.race(runs, rounds, warm=warm)
        entries.extend(raced(request.node.name, samples))
        return turns.medians(samples), {name: [round(t, 7) for t in times] for name, times in samples.items()}

    return run


@pytest.fixture
def peak():
    return lambda work: turns.extra_peak(work, CPU)[1]
