"""What vLLM's HTTP server does beside its own routes, without a name of vLLM's: it refuses `tilt_*` where a route would
drop it, and tells /metrics how many rows were tilted."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

log = logging.getLogger("vllm.pyengine")

PLACES = ("vllm_xargs", "extra_args", "extra_body", "sampling_params")  # where a client may think that fields belong
READ = {  # the end of a path: the places there that are read, "" beside the request's own fields
    "/completions": ("", "vllm_xargs"),
    "/completions/batch": ("", "vllm_xargs"),
    "/responses": ("", "vllm_xargs"),
    "/completions/render": ("", "vllm_xargs"),
    "/responses/render": ("", "vllm_xargs"),
    "/invocations": ("", "vllm_xargs"),  # one of the first
    "/messages": ("vllm_xargs",),
    "/messages/render": ("vllm_xargs",),
}
TIMEOUT = 2.0  # seconds that /metrics waits for the engine, which answers between steps


def lost(path: str, body: Any) -> str | None:
    """The first `tilt_*` of a JSON body that the route at `path` would drop."""
    if not isinstance(body, dict):
        return None
    read = next((places for end, places in READ.items() if path.endswith(end)), ())
    found = {"": body} | {place: body[place] for place in PLACES if isinstance(body.get(place), dict)}
    names = (name for place, fields in found.items() if place not in read for name in fields)
    return next((name for name in names if name.startswith("tilt_")), None)


def refusal(path: str, body: bytes) -> bytes | None:
    """The answer to a request that would lose a `tilt_*`, as OpenAI's and Anthropic's clients both read it."""
    if b"tilt_" not in body:
        return None
    try:
        name = lost(path, json.loads(body))
    except ValueError:  # no JSON, which the route says itself
        return None
    if name is None:
        return None
    where = "vllm_xargs" if path.endswith("/messages") else "sampling_params.extra_args of a route with tokens"
    says = f"{name}: {path} would drop it there; it goes into {where}, or beside the fields of /v1/completions"
    error = {"type": "BadRequestError", "message": says, "param": name, "code": 400}
    return json.dumps({"type": "error", "error": error}).encode()


class Front:
    """An ASGI middleware. rows: of the server's engine, how many rows were tilted; None where there are no scorers."""

    def __init__(self, app: Any, rows: Callable[[Any], Awaitable[int]] | None) -> None:
        self.app, self.rows = app, rows
        if rows is not None:
            from prometheus_client import Gauge

            says = "Rows of logits that were tilted since the engine started"
            self.gauge = Gauge("pyengine_tilted_rows", says, multiprocess_mode="mostrecent")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            receive = await self._checked(scope["path"].rstrip("/"), receive, send)
        elif scope["type"] == "http" and scope["path"].rstrip("/").endswith("/metrics") and self.rows is not None:
            try:
                asked = asyncio.ensure_future(self.rows(scope["app"].state.engine_client))
                self.gauge.set(await asyncio.wait_for(asyncio.shield(asked), TIMEOUT))
            except Exception as error:  # noqa: BLE001 - vLLM's own figures are wanted all the more then
                log.warning("pyengine: /metrics has not heard how many rows are tilted: %r", error)
        if receive is not None:
            await self.app(scope, receive, send)

    async def _checked(self, path: str, receive: Any, send: Any) -> Any:
        """What gives the same body again; None where the request is answered."""
        body, message = b"", {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        if message["type"] != "http.request":  # the client has gone
            return _once(message, receive)
        answer = refusal(path, body)
        if answer is None:
            return _once({"type": "http.request", "body": body, "more_body": False}, receive)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": answer})
        return None


def _once(message: dict[str, Any], receive: Any) -> Any:
    left = [message]

    async def again() -> Any:
        return left.pop() if left else await receive()

    return again
