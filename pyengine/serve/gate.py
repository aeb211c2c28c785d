"""What every request passes: its body has a size that is looked at as it comes, and its answer is counted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

Scope = MutableMapping[str, Any]


class Gate:
    """most: bytes of a body, by its Content-Length or as soon as more has come. count(route, status): each answer."""

    def __init__(self, app: Callable[..., Awaitable[None]], most: int, count: Callable[[str, int], object]) -> None:
        self._app, self._most, self._count = app, most, count

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Callable[..., Any]) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
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
                self._count(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        await self._app(scope, measured, counted)
