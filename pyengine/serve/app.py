"""The routes: what a client asks for becomes a job of the core, and what the core says becomes the answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from pyengine.serve.answers import Answer
from pyengine.serve.gate import Gate
from pyengine.serve.limits import Limits, Refused
from pyengine.serve.link import GONE, Link
from pyengine.serve.metrics import Metrics
from pyengine.serve.protocol import (
    Chat,
    Completion,
    Detokenization,
    StreamOptions,
    Tokenization,
    prompts_of,
    sampling_in,
    tilt_in,
)
from pyengine.serve.talk import Events, Talk, Whole, unless_gone
from pyengine.serve.wire import Accepted, Detokenize, Job, Tokenize

log = logging.getLogger("pyengine.serve")
# The page has all it needs in itself, and calls nobody but this server.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'"
)


class Service:
    """One server. draining: it takes no new work, and finishes what it has."""

    def __init__(
        self,
        link: Link,
        limits: Limits,
        name: str | None = None,
        api_key: str | None = None,
        log_requests: bool = False,
    ) -> None:
        self.link, self.limits, self.api_key, self.log_requests = link, limits, api_key, log_requests
        self._name = name
        self.metrics = Metrics(link)
        self.draining = False
        self.created = int(time.time())

    @property
    def name(self) -> str:
        return self._name or (self.link.ready.name if self.link.ready else "")

    def refusal(self, error: Refused, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The answer to who is refused."""
        headers = dict(headers or {})
        if error.retry is not None:
            headers["Retry-After"] = str(error.retry)
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if error.status == 408:
            headers["X-Should-Retry"] = "false"  # OpenAI's clients would ask for the same again
        if self.draining:
            headers["Connection"] = "close"
        return JSONResponse(error.body, error.status, headers)

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
        chat = isinstance(body, Chat)
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
        job = (prompts, tilt.strategy, sampling, tilt.scorers, bool(body.stream), tilt.candidates, body.priority or 0)
        talk = self.talk(Job, *job, prompts="messages" if chat else "prompt")
        try:
            accepted = await talk.first(http)
            self.metrics.prompt.inc(sum(accepted.tokens))
            answer = Answer(self.name, chat, sampling.n, echo, echo and body.max_tokens == 0, sampling.logprobs or 0)
            answer.tokens, answer.texts = accepted.tokens, accepted.texts
            answer.ids = not chat and bool(body.return_token_ids)
            count = len(prompts) * sampling.n
            if body.stream:
                options = body.stream_options or StreamOptions()
                answer.running = bool(options.continuous_usage_stats)
                return Events(talk, talk.stream(answer, count, bool(options.include_usage)))
            return Whole(talk, answer.whole(await unless_gone(http, talk.whole(count))))
        except BaseException:
            talk.end()
            raise

    def talk(self, kind: Any, *fields: Any, prompts: str) -> Talk:
        return Talk(self.link, self.limits, self.metrics, kind, *fields, prompts=prompts)

    async def ask(self, http: Request, kind: Any, *fields: Any) -> Accepted:
        """One question that the core answers at once."""
        self.check_open()
        self.limits.room(self.link.live, self.link.waiting, 1)
        talk = self.talk(kind, *fields, prompts="prompt" if kind is Tokenize else "tokens")
        try:
            return await talk.first(http)
        finally:
            talk.end()


def make_app(
    service: Service, origins: tuple[str, ...] = (), lifespan: Callable[[FastAPI], Any] | None = None
) -> FastAPI:
    """The application. origins: other sites' pages that may call it; none unless asked."""

    # No pages of FastAPI's own, which load scripts from another site.
    app = FastAPI(title="pyengine", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, service=service)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return service.refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return service.refusal(_misfit(error))

    @app.exception_handler(HTTPException)
    async def unknown(http: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
        says = error.detail if error.status_code == 413 else f"{http.method} {http.url.path}: {error.detail}"
        return service.refusal(Refused(error.status_code, says, None, codes.get(error.status_code)), error.headers)

    @app.exception_handler(Exception)
    async def broken(http: Request, error: Exception) -> JSONResponse:
        service.metrics.answer(http.url.path, 500)  # this answer goes past the gate
        return service.refusal(Refused(500, type(error).__name__, None, "internal_error"))

    @app.post("/v1/completions")
    async def completions(body: Completion, http: Request) -> Response:
        return await service.generate(body, http)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, http: Request) -> Response:
        return await service.generate(body, http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        service.check_open()
        ready = service.link.ready
        assert ready is not None
        told = {"scorers": ready.scorers, "max_k": service.limits.k, "chat": ready.templated}
        card = {"id": service.name, "object": "model", "created": service.created, "owned_by": "pyengine"}
        return {"object": "list", "data": [card | {"max_model_len": ready.context, "tilt": told}]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        service.check_model(name)
        return (await models())["data"][0]

    @app.post("/tokenize")
    async def tokenize(body: Tokenization, http: Request) -> dict[str, Any]:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise Refused(400, "give prompt or messages", "prompt", "invalid_value")
        prompt = body.prompt if body.messages is None else {"messages": body.messages}
        found = await service.ask(http, Tokenize, prompt, body.add_special_tokens, body.return_token_strs)
        assert service.link.ready is not None
        told = {"count": len(found.tokens), "max_model_len": service.link.ready.context, "tokens": found.tokens}
        return told | {"token_strs": found.texts if body.return_token_strs else None}

    @app.post("/detokenize")
    async def detokenize(body: Detokenization, http: Request) -> dict[str, str]:
        service.check_model(body.model)
        return {"prompt": (await service.ask(http, Detokenize, body.tokens)).texts[0]}

    @app.get("/metrics")
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
    """The first thing that is wrong with a body."""
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
    name = ".".join(where) if missing else where[0]
    code = "missing_field" if missing else "invalid_value"
    return Refused(400, f"{name}: {says}", where[0], code)
