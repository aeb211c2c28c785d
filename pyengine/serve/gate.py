"""What every request passes: who may come in, how large a body may be, and the count of the answers."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException

from pyengine.serve.limits import Refused

if TYPE_CHECKING:
    from pyengine.serve.app import Service

Scope = MutableMapping[str, Any]
OPEN = ("/", "/health", "/ready")  # to whoever has no key
OURS = ("localhost", "127.0.0.1", "[::1]")


class Gate:
    """Who has no key is refused before its body is read; a body, as soon as more has come than may."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: Service) -> None:
        self._app, self._service = app, service
        self._most = service.limits.body_bytes

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        key = self._service.api_key
        if key is None:
            # Without a key it listens at this machine's own address. A page of another site that has its name lead
            # here (DNS rebinding) still sends that name.
            host = headers.get(b"host", b"").decode("latin-1")
            name = host if host.endswith("]") else host.rsplit(":", 1)[0]
            if name not in OURS:
                raise Refused(403, f"host {name!r:.80} is not this machine: give the server a key", None, "wrong_host")
        elif scope["path"] not in OPEN:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
                raise Refused(401, "a wrong or no API key: send Authorization: Bearer KEY", None, "invalid_api_key")

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Callable[..., Any]) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        seen = int(length) if length.isdigit() and int(length) > self._most else 0

        async def measured() -> Any:
            nonlocal seen
            message = None if seen > self._most else await receive()
            seen += 0 if message is None else len(message.get("body", b""))
            if seen > self._most:  # from here it goes the way of any error of a route
                says = f"the body is larger than {self._most} bytes, this server's limit (--max-body-bytes)"
                raise HTTPException(413, says, {"Connection": "close"})
            return message

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._service.metrics.answer(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        try:
            self._check(scope, headers)
        except Refused as error:
            return await self._service.refusal(error, {"Connection": "close"})(scope, receive, counted)
        await self._app(scope, measured, counted)
