"""Where the time of a run goes: by phase and op, beside what it must at least take."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity

from pyengine import machine
from pyengine.costs import Rates, floor
from pyengine.errors import InputError
from pyengine.ops import tilt_sample
from pyengine.ops.linear import product
from pyengine.results import Result
from pyengine.timing import Cost, Timed, recording

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
ALARM = 0.1  # of the time, unattributed


@dataclass
class Line:
    """One op in one phase. seconds: its own, without what is inside it. least: seconds that it takes at the machine's
    rates; binds: which rate sets them, or "calls" where the time is hundreds of times that, or nothing is counted."""

    phase: str
    op: str
    calls: int
    seconds: float
    bytes: float
    flops: float
    exps: float
    least: float
    binds: str


@dataclass
class Profile:
    """lines: the longest first. seconds: of the whole run; unattributed: of no op. blocks: that were committed; a token
    each where tokens are. launches, waits: of kernels, and of the host for the device, a block; None on a CPU."""

    lines: list[Line]
    seconds: float
    unattributed: float
    tokens: int
    blocks: int
    rates: Rates
    launches: float | None = None
    waits: float | None = None
    machine: dict[str, object] = field(default_factory=machine.about)


def lines_of(spans: Sequence[Timed], rates: Rates) -> list[Line]:
    """The spans inside phases, summed by phase and op; the longest first."""
    calls: dict[tuple[str, str], list[Timed]] = defaultdict(list)
    for span in spans:
        if len(span.path) > 1:
            calls[span.path[0], span.path[-1]].append(span)
    found = []
    for (phase, op), some in calls.items():
        costs = [span.cost for span in some if span.cost is not None]
        total = Cost(*(sum(column) for column in zip(*costs, strict=True))) if costs else Cost()
        least = sum(floor(cost, rates)[0] for cost in costs)
        seconds = sum(span.own for span in some)
        binds = floor(total, rates)[1] if least > 0.01 * seconds else "calls" if costs else "host"
        found.append(Line(phase, op, len(some), seconds, *total, least, binds))
    return sorted(found, key=lambda line: -line.seconds)


def measured_rates(device: torch.device, dtype: torch.dtype, best_of: int = 20) -> Rates:
    """This machine's, each the best of a few: of a sum over 256 MB, of a product of 256 rows, and of the exponentials
    in `tilt_sample` over logits that lie in a cache (torch's `exp` is slower)."""

    def best(run: Callable[[], object]) -> float:
        found = []
        for _ in range(best_of):
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - began)
        return min(found)

    large, logits = torch.ones(2**26, device=device), torch.zeros(2, 2**17, device=device)
    few, square = (torch.ones(rows, 1024, device=device, dtype=dtype) for rows in (256, 1024))
    with torch.inference_mode():
        return Rates(
            4 * large.numel() / best(large.sum),
            2 * 256 * 1024**2 / best(lambda: product(few, square)),
            logits.numel() / best(lambda: tilt_sample(logits)),
        )


def profile(decode: Callable[[], list[Result]], device: torch.device, out: Path) -> Profile:
    """Runs `decode` three times: to warm up, to time its spans, and under torch.profiler for the trace.

    out: a directory; profile.json and trace.json.gz, which Perfetto and chrome://tracing open, are written there.
    InputError where it cannot be written, before anything runs.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}") from error
    decode()
    with recording(device) as recorder:
        began = time.perf_counter()
        results = decode()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    rates = measured_rates(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    lines = lines_of(recorder.spans(), rates)
    tokens = sum(len(result.tokens) for result in results)
    blocks = sum(len(result.blocks) or len(result.tokens) for result in results)
    found = Profile(lines, seconds, max(0.0, seconds - sum(line.seconds for line in lines)), tokens, blocks, rates)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as trace, recording(device, marked=True):
        decode()
    trace.export_chrome_trace(str(out / "trace.json.gz"))
    if device.type == "cuda":
        counts = {event.key: event.count for event in trace.key_averages()}
        found.launches = sum(counts.get(name, 0) for name in LAUNCHES) / max(1, blocks)
        found.waits = sum(counts.get(name, 0) for name in WAITS) / max(1, blocks)
    (out / "profile.json").write_text(json.dumps({"schema": 1} | dataclasses.asdict(found), indent=1) + "\n")
    return found


def report(found: Profile, console: Any = None) -> None:
    """Print the table, and what it warns of."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("phase", "op"):
        table.add_column(column, no_wrap=True)
    for column in ("calls", "ms", "%", "GB", "GB/s", "of floor"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    for line in found.lines:
        moved = (f"{line.bytes / 1e9:.3f}", f"{line.bytes / 1e9 / line.seconds:.2f}") if line.bytes else ("", "")
        share = f"{line.least / line.seconds:.0%}" if line.least else ""
        spent = f"{1e3 * line.seconds:.1f}", f"{100 * line.seconds / found.seconds:.1f}"
        table.add_row(line.phase, line.op, str(line.calls), *spent, *moved, share, line.binds)
    unattributed = found.unattributed / found.seconds
    table.add_row("", "(unattributed)", "", f"{1e3 * found.unattributed:.1f}", f"{100 * unattributed:.1f}")
    console = console or Console()
    console.width = max(console.width, 100)  # where nobody watches it is 80, and columns would be cut
    console.print(table)
    rates = found.rates
    console.print(
        f"{found.seconds:.3f} s, {found.tokens / found.seconds:,.0f} tokens/s committed, "
        f"{1e3 * found.seconds / max(1, found.blocks):.2f} ms a block of {found.blocks}\n"
        f"floors at this machine's {rates.bytes / 1e9:.1f} GB/s read, {rates.flops / 1e9:,.0f} GFLOP/s of a product, "
        f"{rates.exps / 1e9:.2f} G exponentials/s, measured now"
    )
    if found.launches is not None and found.waits is not None:
        console.print(f"{found.launches:.1f} launches and {found.waits:.1f} waits of the host a block")
    if unattributed > ALARM:
        console.print(f"warning: {unattributed:.0%} of the time belongs to no op (see (unattributed))")
