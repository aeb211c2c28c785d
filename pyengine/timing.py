"""Named spans of time: phases of the loop, passes of a model, calls of ops, work of the host.

`with timed("tilt_sample", cost):` costs a branch while nobody records. One thread is recorded at a time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from pyengine.errors import InputError


class Cost(NamedTuple):
    """What a call must at least do: bytes moved, floating-point operations of products, exponentials."""

    bytes: float = 0.0
    flops: float = 0.0
    exps: float = 0.0


class Timed(NamedTuple):
    """A span that has ended. path: the names of those around it and its own. seconds: of it; own: without those inside
    it. On a GPU both are the stream's time between the span's first and last kernel."""

    path: tuple[str, ...]
    seconds: float
    own: float
    cost: Cost | None


class Recorder:
    """device: whose time is taken. marked: spans are also ranges of torch.profiler, and of NVTX on a GPU."""

    def __init__(self, device: torch.device, marked: bool) -> None:
        self.gpu, self.marked = device.type == "cuda", marked
        self.path: tuple[str, ...] = ()
        self.ended: list[tuple[tuple[str, ...], Any, Any, Cost | None]] = []

    def now(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spans(self) -> list[Timed]:
        """All that have ended, in that order: those inside a span before it."""
        if self.gpu:
            torch.cuda.synchronize()
        inside: defaultdict[int, float] = defaultdict(float)  # seconds of what has ended at a depth, and is not counted
        found = []
        for path, began, ended, cost in self.ended:
            seconds = began.elapsed_time(ended) / 1e3 if self.gpu else ended - began
            found.append(Timed(path, seconds, seconds - inside.pop(len(path) + 1, 0.0), cost))
            inside[len(path)] += seconds
        return found


OFF: AbstractContextManager[Any] = nullcontext()
_recorder: Recorder | None = None


class _Open:
    """A span that is being recorded."""

    def __init__(self, recorder: Recorder, name: str, cost: Callable[[], Cost] | None) -> None:
        self.recorder, self.name, self.cost = recorder, name, cost
        self.range: Any = None

    def __enter__(self) -> None:
        recorder = self.recorder
        recorder.path += (self.name,)
        if recorder.marked:
            self.range = torch.autograd.profiler.record_function(self.name)
            self.range.__enter__()
            if recorder.gpu:
                torch.cuda.nvtx.range_push(self.name)
        self.began = recorder.now()

    def __exit__(self, *raised: Any) -> None:
        recorder = self.recorder
        ended = recorder.now()
        if self.range is not None:
            if recorder.gpu:
                torch.cuda.nvtx.range_pop()
            self.range.__exit__(*raised)
        counted = self.cost is not None and raised[0] is None
        if recorder.gpu and torch.cuda.is_current_stream_capturing():
            counted = False  # nothing may be read there
        cost = self.cost() if counted and self.cost is not None else None
        recorder.ended.append((recorder.path, self.began, ended, cost))
        recorder.path = recorder.path[:-1]


def timed(name: str, cost: Callable[[], Cost] | None = None) -> AbstractContextManager[Any]:
    """Around what `name` names. cost: asked for when it has ended, if somebody records."""
    return OFF if _recorder is None else _Open(_recorder, name, cost)


@contextmanager
def recording(device: torch.device, marked: bool = False) -> Iterator[Recorder]:
    """Inside, spans are recorded."""
    global _recorder
    if _recorder is not None:
        raise InputError("spans are recorded already: one profile at a time")
    _recorder = Recorder(device, marked)
    try:
        yield _recorder
    finally:
        _recorder = None
