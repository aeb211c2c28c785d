"""Who steps the schedule: whoever waits for a request, or a thread of the engine's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pyengine.attention import let_go
from pyengine.decode.request import Handle, Request
from pyengine.decode.schedule import Schedule
from pyengine.errors import InputError

Tick = Callable[[], object]


class Core:
    """One thread steps at a time; the others wait for what its steps bring."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._changed = threading.Condition()
        self._driver: int | None = None  # the thread that steps
        self._thread: threading.Thread | None = None  # the engine's own
        self._closing = False  # nothing more is taken
        self._dead: Exception | None = None  # why the engine's own thread ended
        self._numbers = 0

    # Requests

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Inside, nobody else looks or writes; an interrupt leaves no lock held."""
        try:
            with self._changed:
                yield
        except BaseException:
            let_go(self._changed)
            raise

    def submit(self, request: Request, tell: Callable[[int], object] | None = None) -> Handle:
        """tell: called with the request's index once it is done, by whoever steps."""
        request.handle = Handle(request, self.wait, tell)
        with self._held():
            if self._dead is not None:
                raise InputError(f"this engine has stopped: {self._dead}") from self._dead
            if self._closing:
                raise InputError("this engine is closed: it takes no more requests")
            self._numbers += 1
            request.number, request.arrived = self._numbers, time.monotonic()
            self.schedule.incoming.append(request)
            self._changed.notify_all()
        return request.handle

    def wait(self, ready: Callable[[], bool], timeout: float | None = None, tick: Tick = int) -> None:
        """Until it is ready; whoever waits steps the schedule, unless somebody does. TimeoutError after so many
        seconds. InputError for a scorer that waits for the engine that waits for it."""
        until = None if timeout is None else time.monotonic() + timeout
        me = threading.get_ident()
        while not ready():
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(f"not done after {timeout:g} seconds")
            with self._held():
                if self._driver == me:
                    raise InputError("this engine is decoding, and waits for the scorer that asks it: take another one")
                mine = self._driver is None and self._thread is None
                if not mine and not ready():
                    left = 0.5 if until is None else until - time.monotonic()
                    self._changed.wait(max(0.0, min(0.5, left)))
            if mine:
                self._step(me, tick)

    def _step(self, me: int, tick: Tick) -> None:
        """One step by this thread, if nobody else steps. What cuts it short ends the requests that were under way."""
        # Given back once more where an interrupt cuts the first time short.
        try:
            try:
                with self._changed:
                    if self._driver is None:
                        self._driver = me
                if self._driver == me:
                    self.schedule.step(tick)
            except BaseException as error:
                if self._driver == me:
                    self.schedule.abort(error)
                raise
            finally:
                self._yield(me)
        except BaseException as error:
            if self._driver == me or not self.schedule.whole:
                self.schedule.abort(error)
            self._yield(me)
            let_go(self._changed)
            let_go()
            raise

    def _yield(self, me: int) -> None:
        if self._driver == me:
            with self._changed:
                self._driver = None
                self._changed.notify_all()

    def turn(self) -> None:
        """One step by this thread, unless another steps."""
        self._step(threading.get_ident(), int)

    def sweep(self) -> None:
        """Requests that were cancelled leave at once, where nobody is stepping who would see to it."""
        if self._driver is None and self._thread is None:
            self.turn()

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Nobody decodes inside; InputError where somebody does."""
        with self._held():
            if not self.schedule.idle or self._driver is not None:
                raise InputError(f"this engine is decoding: end or close what is open before {what}")
            yield

    # The engine's own thread

    def start(self) -> None:
        """A thread of the engine's own steps from now on, until `close`."""
        with self._held():
            if self._thread is not None:
                return
            self._closing = False
            # A new thread has torch's default number of threads, and with it other last bits.
            self._thread = threading.Thread(
                target=self._run, args=(torch.get_num_threads(),), name="pyengine", daemon=True
            )
        self._thread.start()

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        me = threading.get_ident()
        try:
            while True:
                with self._changed:
                    while self.schedule.idle and not self._closing:
                        self._changed.wait()
                    if self.schedule.idle:
                        return
                self._step(me, int)
        except Exception as error:  # noqa: BLE001 - every handle has it already
            self._dead = error
        finally:
            with self._changed:
                self._thread = None
                self._changed.notify_all()

    def drain(self, timeout: float | None = None) -> bool:
        """Take nothing more, and finish what is there; False where it is not done after so many seconds."""
        with self._held():
            self._closing = True
            self._changed.notify_all()
        try:
            self.wait(lambda: self.schedule.idle, timeout)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Cancel what is there, and take nothing more."""
        with self._held():
            self._closing = True
            for request in self.schedule.requests():
                request.cancelled = True
            self._changed.notify_all()
        if self._driver != threading.get_ident():
            self.wait(lambda: self.schedule.idle)

    def stats(self) -> dict[str, Any]:
        """Requests by where they are, rows, pages and leaves in use, and counts since the engine was made."""
        return self.schedule.stats()
