"""The front's end of the wire: it starts the core, sends it jobs, and hands each answer to whoever waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import pickle
import socket
import subprocess
import sys
from typing import Any

from pyengine.errors import InputError
from pyengine.serve.limits import Refused
from pyengine.serve.wire import HEADER, Cancel, CoreOptions, Failed, Job, Ready, Stats, framed

log = logging.getLogger("pyengine.serve")
GONE = "the core has stopped"


class Link:
    """queues: what each job that is under way is told. live: samples under way. ready: what the core is, once it is."""

    def __init__(self, options: CoreOptions) -> None:
        self._options = options
        self._numbers = itertools.count(1)
        self._queues: dict[int, asyncio.Queue[Any]] = {}
        self._sizes: dict[int, int] = {}
        self._sent = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self.live = 0
        self.ready: Ready | None = None
        self.dead: str | None = None
        self.stats = Stats(0, {})
        self.changed = asyncio.Event()  # ready, or dead

    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pyengine.serve.core", str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._writer.write(framed(self._options))
        self._task = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
                for message in pickle.loads(await reader.readexactly(size)):
                    self._hear(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._die(self.dead or GONE)
        except Exception:  # nobody would be told anything any more
            log.exception("what the core says cannot be read")
            self._die(GONE)

    def _hear(self, message: Any) -> None:
        if isinstance(message, Stats):
            self.stats = message
        elif isinstance(message, Ready):
            self.ready = message
            self.changed.set()
        elif isinstance(message, Failed) and message.number == 0:
            self._die(message.message)
        elif message.number in self._queues:  # else it was cancelled
            self._queues[message.number].put_nowait(message)

    def _die(self, why: str) -> None:
        self.dead = why
        self.changed.set()
        for number, queue in self._queues.items():
            queue.put_nowait(Failed(number, GONE, False))

    @property
    def waiting(self) -> int:
        """Samples that have no rows yet: in the core's queue, or on their way there."""
        return int(self.stats.engine.get("waiting", 0)) + self._sent - self.stats.taken

    def ask(self, make: Any, *fields: Any) -> tuple[int, asyncio.Queue[Any]]:
        """Send a message of this kind; its number, and the queue of what comes back until `forget`. Refused where it is
        nested deeper than can be sent, and then nothing is under way."""
        number = next(self._numbers)
        message = make(number, *fields)
        try:
            data = framed(message)
        except RecursionError:
            raise Refused(400, "the body is nested too deeply", None, "invalid_body") from None
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._queues[number] = queue
        job = isinstance(message, Job)
        self._sizes[number] = len(message.prompts) * message.sampling.n if job else 1
        self.live += self._sizes[number]
        self._sent += self._sizes[number] if job else 0
        if self.dead is None:
            self._writer.write(data)
        else:
            queue.put_nowait(Failed(number, GONE, False))
        return number, queue

    def forget(self, number: int, done: bool) -> None:
        """Nobody waits for it any more; what is not done gives its rows and pages back."""
        self._queues.pop(number)
        self.live -= self._sizes.pop(number)
        if not done and self.dead is None:
            self._writer.write(framed(Cancel(number)))

    async def until_ready(self) -> Ready:
        """InputError where the core could not be made."""
        await self.changed.wait()
        if self.ready is None:
            raise InputError(self.dead or GONE)
        return self.ready

    async def close(self) -> None:
        """The core ends once its socket has; it has a few seconds for it."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._writer.close()
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, 10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
