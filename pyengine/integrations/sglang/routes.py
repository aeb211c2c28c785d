"""Where a request over HTTP says `tilt_*`: read before SGLang's routes, which drop what they do not know."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from pyengine.errors import InputError
from pyengine.vocabulary import FieldError

# The routes that hand custom_params on, and where in the body these lie.
CARRY: dict[str, tuple[str, ...]] = {
    "/v1/completions": ("custom_params",),
    "/v1/chat/completions": ("custom_params",),
    "/invocations": ("custom_params",),
    "/generate": ("sampling_params", "custom_params"),
    os.environ.get("AIP_PREDICT_ROUTE", "/vertex_generate"): ("parameters", "sampling_params", "custom_params"),
}
# Where clients put fields for a server, besides the body itself. Messages and tools may say tilt_ as they like.
LOOKED = {"custom_params", "sampling_params", "parameters", "instances", "options", "vllm_xargs", "extra_body"}

Place = tuple[str, ...]
App = Callable[[Any, Any, Any], Awaitable[None]]


def lifted(path: str, body: bytes) -> bytes:
    """The body of a request to a route, with each `tilt_*` that lies between the body itself and `custom_params` moved
    into these. FieldError for one that the route would drop. What is no JSON object is the route's to refuse."""
    if b"tilt_" not in body:
        return body
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        form = re.search(rb'name="?(tilt_\w+)', body)
        if form:
            raise _dropped(form[1].decode(), path) from None
        return body
    if not isinstance(fields, dict):
        return body
    target = CARRY.get(path)
    found = list(_found((), fields))
    for place, holder, name in found:
        if target is None:
            raise _dropped(name, path)
        if place != target[: len(place)]:
            where = ".".join(target)
            raise FieldError(name, f"{name} in {'.'.join(place)} would be dropped by {path}: give it in {where}")
        if place != target:
            _move(name, holder, target[len(place) :])
    return json.dumps(fields).encode() if found else body


def _dropped(name: str, path: str) -> FieldError:
    return FieldError(name, f"{name}: {path} would drop it; what carries it is custom_params of {', '.join(CARRY)}")


def _found(place: Place, part: Any) -> Iterator[tuple[Place, dict[str, Any], str]]:
    """(where, in what, name) of each `tilt_*` with a value."""
    for one in part if isinstance(part, list) else [part]:
        for name, value in one.items() if isinstance(one, dict) else ():
            if name.startswith("tilt_") and value is not None:
                yield place, one, name
            elif name in LOOKED:
                yield from _found((*place, name), value)


def _move(name: str, holder: dict[str, Any], steps: Place) -> None:
    inner = holder
    for step in steps:
        if inner.get(step) is None:
            inner[step] = {}
        inner = inner[step]
        if not isinstance(inner, dict):
            raise FieldError(name, f"{name}: {step} is no object that could take it; give it in each custom_params")
    if inner.get(name) is not None:
        raise FieldError(name, f"{name} is given twice, in custom_params and beside them")
    inner[name] = holder.pop(name)


class Lift:
    """An ASGI middleware: `lifted`, and a 400 that names the field."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            return await self.app(scope, receive, send)
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        try:
            whole = [lifted(path, bytes(body))]
        except InputError as error:
            return await _refuse(send, error)

        async def replayed() -> Any:
            return {"type": "http.request", "body": whole.pop()} if whole else await receive()

        return await self.app(scope, replayed, send)


async def _refuse(send: Any, error: InputError) -> None:
    """In the one form that clients of OpenAI's and of Anthropic's routes both read."""
    said = {"type": "invalid_request_error", "message": str(error), "param": getattr(error, "field", None), "code": 400}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"type": "error", "error": said}).encode()})
