"""The one harness: clocks, contenders that take turns, and the memory that one takes."""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Took(NamedTuple):
    """Seconds by the wall, and of this process's threads on a processor."""

    wall: float
    cpu: float


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, Took]:
    """What it returns, and what it took; a GPU has done all of it."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, Took(time.perf_counter() - wall, time.process_time() - cpu)


def orders(names: Sequence[T], seed: int) -> Iterator[list[T]]:
    """An order for each round, endlessly: drawn at random, so that no contender always follows the same other."""
    draw = random.Random(seed)
    while True:
        yield draw.sample(names, len(names))


def race(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    sample: Callable[[Callable[[], object]], float] | None = None,
    warm: bool = False,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Samples of each run, a round at a time, all in a new order in every round; their i-th samples are a pair.

    Taking turns keeps a machine's drift out of the ratios. sample: takes one, by default the seconds of a call. warm:
    calls each once more, untimed, before its turn, so that all find their inputs in the same cache: for what takes
    microseconds.
    """
    take = sample or seconds_of
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _, order in zip(range(rounds), orders(list(runs), seed), strict=False):
        for name in order:
            if warm:
                runs[name]()
            samples[name].append(take(runs[name]))
    return samples


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def medians(samples: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in samples.items()}


def extra_peak(run: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """What it returns, and by how many bytes memory rose above where it stood, at its highest, while it ran: the
    device's for a GPU, else the process's."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return run(), torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # else memory that earlier work freed would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS:")
    result = run()
    return result, _status("VmHWM:") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
