"""One request's talk with the core: what it says until it is done, its time is up, or the client has gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from pyengine.serve.answers import Answer, event
from pyengine.serve.limits import Limits, Refused
from pyengine.serve.link import GONE, Link
from pyengine.serve.metrics import Clock, Metrics
from pyengine.serve.protocol import field_of
from pyengine.serve.wire import Accepted, Done, Failed, Piece

QUIET = 15.0  # seconds after which a stream that has nothing to show says that it lives
T = TypeVar("T")


class Talk:
    """What the core says about one job, until somebody ends it. prompts: the field that they came in."""

    def __init__(self, link: Link, limits: Limits, metrics: Metrics, kind: Any, *fields: Any, prompts: str) -> None:
        self._link, self._metrics, self._prompts = link, metrics, prompts
        self._began, self._most = time.monotonic(), limits.request_timeout
        self._done = self._over = False
        self._number, self._queue = link.ask(kind, *fields)

    def end(self) -> None:
        """Once. What is not done is cancelled."""
        if not self._over:
            self._over = True
            self._link.forget(self._number, self._done)

    @property
    def left(self) -> float:
        """Seconds."""
        return self._began + self._most - time.monotonic()

    async def _next(self, quiet: float | None = None) -> Any:
        """The next message, None after so many quiet seconds; Refused in place of a failure, or when its time is up."""
        left = self.left
        try:
            message = await asyncio.wait_for(self._queue.get(), left if quiet is None else min(left, quiet))
        except TimeoutError:
            if quiet is not None and quiet < left:
                return None
            says = f"the request took longer than {self._most:g} seconds, this server's limit (--request-timeout)"
            raise Refused(408, says, None, "request_timeout") from None
        if isinstance(message, Failed):
            raise self._refused(message)
        return message

    def _refused(self, failed: Failed) -> Refused:
        if failed.asked:
            field, says = field_of(failed.message)
            return Refused(400, says, field or self._prompts, "invalid_value")
        if failed.message == GONE:
            return Refused(503, GONE, None, "core_dead", retry=5)
        return Refused(500, failed.message, None, "request_failed")

    async def first(self, http: Request) -> Accepted:
        """What the core answers at once."""
        accepted: Accepted = await unless_gone(http, self._next())
        return accepted

    async def whole(self, count: int) -> list[Done]:
        """The end of every choice."""
        done = [await self._next() for _ in range(count)]
        self._finished(done)
        return done

    def _finished(self, done: list[Done]) -> None:
        self._done = True
        for one in done:
            self._metrics.done(one)
        self._metrics.whole.observe(time.monotonic() - self._began)

    async def stream(self, answer: Answer, count: int, usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events, one for each commit."""
        clock, done = Clock(self._metrics, self._began), list[Done]()
        try:
            for index in range(count):
                if (piece := answer.first(index)) is not None:
                    yield event(piece)
            while len(done) < count:
                message = await self._next(QUIET)
                if message is None:
                    yield b": decoding\n\n"
                elif isinstance(message, Piece):
                    clock.commit(message)
                    yield event(answer.piece(message))
                else:
                    done.append(message)
                    yield event(answer.last(message))
            self._finished(done)
            if usage:
                yield event(answer.final())
            yield b"data: [DONE]\n\n"
        except Refused as refused:
            yield event(refused.body)
            yield b"data: [DONE]\n\n"


class Whole(JSONResponse):
    """An answer whose job is over once it is sent."""

    def __init__(self, talk: Talk, content: Any) -> None:
        super().__init__(content)
        self._talk = talk

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._talk.end()


class Events(StreamingResponse):
    """A stream whose job ends with it: when it is done, its client goes away, or does not read it within its time."""

    def __init__(self, talk: Talk, stream: AsyncIterator[bytes]) -> None:
        # What lies between must not keep back what is streamed, as nginx does unless told.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(stream, media_type="text/event-stream", headers=headers)
        self._talk = talk

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(self._talk.left + 1):  # a moment more, in which the stream itself says so
                await super().__call__(scope, receive, send)
        finally:
            self._talk.end()


async def unless_gone(http: Request, wanted: Awaitable[T]) -> T:
    """What is awaited; Refused, which nobody hears, once the client has gone."""
    task, gone = asyncio.ensure_future(wanted), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the client has gone", None, "client_closed")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
