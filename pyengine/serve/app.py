"""The routes: what a client asks for becomes a job of the core, and what the core says becomes the answer."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from pyengine.serve.answers import Answer, event
from pyengine.serve.gate import Gate
from pyengine.serve.limits import Limits, Refused
from pyengine.serve.link import GONE, Link
from pyengine.serve.metrics import Clock, Metrics
from pyengine.serve.protocol import (
    Chat,
    Completion,
    Detokenization,
    StreamOptions,
    Tokenization,
    field_of,
    prompts_of,
    sampling_in,
    tilt_in,
)
from pyengine.serve.wire import Accepted, Detokenize, Done, Failed, Job, Piece, Tokenize

log = logging.getLogger("pyengine.serve")
# The page has all it needs in itself, and calls nobody but this server.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
QUIET = 15.0  # seconds after which a stream that has nothing to show says that it lives
T = TypeVar("T")


class Service:
    """One server. draining: it takes no new work, and finishes what it has."""

    def __init__(self, link: Link, limits: Limits, name: str | None, api_key: str | None, log_requests: bool) -> None:
        self.link, self.limits, self.api_key, self.log_requests = link, limits, api_key, log_requests
        self._name = name
        self.metrics = Metrics(link)
        self.draining = False
        self.created = int(time.time())

    @property
    def name(self) -> str:
        return self._name or (self.link.ready.name if self.link.ready else "")

    def check_open(self) -> None:
        """Refused where nothing new is taken."""
        if self.draining:
            raise Refused(503, "this server is shutting down", None, "draining", retry=5)
        if self.link.dead is not None:
            raise Refused(503, GONE, None, "core_dead", retry=5)
        if self.link.ready is None:
            raise Refused(503, "the model is being loaded", None, "loading", retry=5)

    def check_model(self, asked: str | None) -> None:
        if asked is not None and asked != self.name:
            says = f"no model {asked!r:.80}; this server has {self.name!r}"
            raise Refused(404, says, "model", "model_not_found")

    # Text generation

    async def generate(self, body: Any, http: Request) -> Response:
        began, chat = time.monotonic(), isinstance(body, Chat)
        self.check_open()
        self.check_model(body.model)
        prompts, tilt = prompts_of(body), tilt_in(body, self.limits)
        sampling = sampling_in(body, self.limits)
        if body.stream_options is not None and not body.stream:
            raise Refused(400, "stream_options needs stream true", "stream_options", "invalid_value")
        echo = not chat and bool(body.echo)
        if echo and body.stream and sampling.prompt_logprobs is not None:
            says = "echo with logprobs gives the prompt's at once: leave out stream"
            raise Refused(400, says, "echo", "unsupported_value")
        self.limits.room(self.link.live, self.link.waiting, len(prompts) * sampling.n)
        if self.log_requests:
            log.info("%s", body.model_dump(exclude_none=True))
        listening, priority = bool(body.stream), body.priority or 0
        number, queue = self.link.ask(
            Job, prompts, tilt.strategy, sampling, tilt.scorers, listening, tilt.candidates, priority
        )
        talk = Talk(self, number, queue, began, chat)
        try:
            accepted = await talk.first(http)
            self.metrics.prompt.inc(sum(accepted.tokens))
            answer = Answer(self.name, chat, sampling.n, echo, echo and body.max_tokens == 0, sampling.logprobs or 0)
            answer.tokens, answer.texts = accepted.tokens, accepted.texts
            count = len(prompts) * sampling.n
            if listening:
                options = body.stream_options or StreamOptions()
                answer.running = bool(options.continuous_usage_stats)
                return Events(talk, talk.stream(answer, count, bool(options.include_usage)))
            return JSONResponse(answer.whole(await unless_gone(http, talk.whole(count))))
        except BaseException:
            talk.end(False)
            raise

    async def ask(self, http: Request, kind: Any, *fields: Any) -> Accepted:
        """One question that the core answers at once."""
        self.check_open()
        number, queue = self.link.ask(kind, *fields)
        talk = Talk(self, number, queue, time.monotonic(), False)
        try:
            return await talk.first(http)
        finally:
            talk.end(True)


class Talk:
    """What the core says about one job, until somebody ends it."""

    def __init__(self, service: Service, number: int, queue: asyncio.Queue[Any], began: float, chat: bool) -> None:
        self._service, self._number, self._queue, self._chat = service, number, queue, chat
        self._began, self._over = began, False

    def end(self, done: bool) -> None:
        """Once. What is not done is cancelled."""
        if not self._over:
            self._over = True
            self._service.link.forget(self._number, done)
            self._service.metrics.whole.observe(time.monotonic() - self._began)

    async def _next(self, quiet: float | None = None) -> Any:
        """The next message, None after so many quiet seconds; Refused in place of a failure, or when its time is up."""
        most = self._service.limits.request_timeout
        left = self._began + most - time.monotonic()
        try:
            message = await asyncio.wait_for(self._queue.get(), left if quiet is None else min(left, quiet))
        except TimeoutError:
            if quiet is not None and quiet < left:
                return None
            says = f"the request took longer than {most:g} seconds, this server's limit (--request-timeout)"
            raise Refused(408, says, None, "request_timeout") from None
        if isinstance(message, Failed):
            raise self._refused(message)
        return message

    def _refused(self, failed: Failed) -> Refused:
        if failed.asked:
            field, says = field_of(failed.message)
            field = field or ("messages" if self._chat else "prompt")
            return Refused(400, says, field, "invalid_value")
        if failed.message == GONE:
            return Refused(503, GONE, None, "core_dead", retry=5)
        return Refused(500, failed.message, None, "request_failed")

    async def first(self, http: Request) -> Accepted:
        accepted: Accepted = await unless_gone(http, self._next())
        return accepted

    async def whole(self, count: int) -> list[Done]:
        """The end of every choice."""
        done = [await self._next() for _ in range(count)]
        for one in done:
            self._service.metrics.done(one)
        self.end(True)
        return done

    async def stream(self, answer: Answer, count: int, usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events, one for each commit. A client that goes away ends it, and with it the job."""
        clock = Clock(self._service.metrics, self._began)
        left = count
        try:
            for index in range(count):
                if (piece := answer.first(index)) is not None:
                    yield event(piece)
            while left:
                message = await self._next(QUIET)
                if message is None:
                    yield b": decoding\n\n"
                elif isinstance(message, Piece):
                    clock.commit(message)
                    yield event(answer.piece(message))
                else:
                    self._service.metrics.done(message)
                    left -= 1
                    yield event(answer.last(message))
            if usage:
                yield event(answer.final())
            yield b"data: [DONE]\n\n"
        except Refused as refused:
            yield event(refused.body)
            yield b"data: [DONE]\n\n"
        finally:
            self.end(left == 0)


class Events(StreamingResponse):
    """A stream whose job ends with it, wherever a client that goes away cuts it short."""

    def __init__(self, talk: Talk, stream: AsyncIterator[bytes]) -> None:
        super().__init__(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._talk = talk

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._talk.end(False)


async def unless_gone(http: Request, wanted: Awaitable[T]) -> T:
    """What is awaited; CancelledError once the client has gone."""
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


def make_app(
    service: Service, origins: tuple[str, ...] = (), lifespan: Callable[[FastAPI], Any] | None = None
) -> FastAPI:
    """The application. origins: other sites' pages that may call it; none unless asked."""

    async def authorised(http: Request) -> None:
        key = service.api_key
        if key is not None:
            given = http.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
                raise Refused(
                    401, "the API key is wrong or missing: Authorization: Bearer KEY", None, "invalid_api_key"
                )

    # No pages of FastAPI's own, which load scripts from another site.
    app = FastAPI(title="pyengine", lifespan=lifespan, docs_url=None, redoc_url=None)
    closed: dict[str, Any] = {"dependencies": [Depends(authorised)]}
    app.add_middleware(Gate, most=service.limits.body_bytes, count=service.metrics.answer)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])

    def refusal(error: Refused) -> JSONResponse:
        headers = {} if error.retry is None else {"Retry-After": str(error.retry)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if service.draining:
            headers["Connection"] = "close"
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return refusal(_misfit(error))

    @app.exception_handler(HTTPException)
    async def unknown(http: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
        says = error.detail if error.status_code == 413 else f"{http.method} {http.url.path}: {error.detail}"
        return refusal(Refused(error.status_code, says, None, codes.get(error.status_code)))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return refusal(Refused(500, f"{type(error).__name__}", None, "internal_error"))

    @app.post("/v1/completions", **closed)
    async def completions(body: Completion, http: Request) -> Response:
        return await service.generate(body, http)

    @app.post("/v1/chat/completions", **closed)
    async def chat(body: Chat, http: Request) -> Response:
        return await service.generate(body, http)

    @app.get("/v1/models", **closed)
    async def models() -> dict[str, Any]:
        service.check_open()
        ready = service.link.ready
        assert ready is not None
        told = {"scorers": ready.scorers, "max_k": service.limits.k, "chat": ready.templated}
        card = {"id": service.name, "object": "model", "created": service.created, "owned_by": "pyengine"}
        return {"object": "list", "data": [card | {"max_model_len": ready.context, "tilt": told}]}

    @app.get("/v1/models/{name:path}", **closed)
    async def model(name: str) -> Any:
        service.check_model(name)
        return (await models())["data"][0]

    @app.post("/tokenize", **closed)
    async def tokenize(body: Tokenization, http: Request) -> dict[str, Any]:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise Refused(400, "give prompt or messages", "prompt", "invalid_value")
        prompt = body.prompt if body.messages is None else {"messages": body.messages}
        found = await service.ask(http, Tokenize, prompt, body.add_special_tokens)
        assert service.link.ready is not None
        told = {"count": len(found.tokens), "max_model_len": service.link.ready.context, "tokens": found.tokens}
        return told | {"token_strs": found.texts if body.return_token_strs else None}

    @app.post("/detokenize", **closed)
    async def detokenize(body: Detokenization, http: Request) -> dict[str, str]:
        service.check_model(body.model)
        return {"prompt": (await service.ask(http, Detokenize, body.tokens)).texts[0]}

    @app.get("/metrics", **closed)
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if service.link.dead is not None:
            raise Refused(503, GONE, None, "core_dead")
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        service.check_open()
        return {"status": "ok"}

    @app.get("/")
    async def page() -> HTMLResponse:
        file = resources.files("pyengine.serve") / "page.html"
        return HTMLResponse(file.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    return app


def _misfit(error: RequestValidationError) -> Refused:
    """The first thing that is wrong with a body, and how many there are."""
    first = error.errors()[0]
    where = [str(place) for place in first["loc"] if place != "body"]
    if first["type"] == "json_invalid":
        return Refused(
            400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", None, "invalid_json"
        )
    if not where:
        return Refused(400, "the body must be a JSON object, with Content-Type: application/json", None, "invalid_body")
    if first["type"] == "extra_forbidden":
        return Refused(400, f"unknown field {'.'.join(where)}", where[0], "unknown_field")
    missing = first["type"] == "missing"
    says = "is missing" if missing else f"{first['msg'][0].lower()}{first['msg'][1:]}, got {first.get('input')!r:.80}"
    name = where[0] if first["type"] != "missing" else ".".join(where)
    code = "missing_field" if missing else "invalid_value"
    return Refused(400, f"{name}: {says}", where[0], code)
