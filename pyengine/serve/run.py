"""The server as a process: it listens, loads the model beside, and on SIGTERM finishes what it has."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from pyengine.errors import InputError
from pyengine.serve.app import Service, make_app
from pyengine.serve.limits import Limits
from pyengine.serve.link import Link
from pyengine.serve.wire import CoreOptions

log = logging.getLogger("pyengine.serve")


@dataclass(frozen=True)
class ServeOptions:
    """name: what clients call the model; None is the checkpoint's. shutdown_timeout: seconds that requests under way
    have after SIGTERM."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    log_requests: bool = False
    shutdown_timeout: float = 25.0


def serve(core: CoreOptions, options: ServeOptions, limits: Limits) -> None:
    """Until SIGTERM or SIGINT. InputError where it cannot listen, or the core cannot be made."""
    if options.api_key is None and not _local(options.host):
        raise InputError(
            f"--host {options.host}: others can reach it, give --api-key (or PYENGINE_API_KEY), which they must send"
        )
    listening = _listen(options.host, options.port)
    link = Link(core)
    service = Service(link, limits, options.name, options.api_key, options.log_requests)
    failed: list[InputError] = []

    async def start(url: str) -> None:
        try:
            await link.until_ready()
            log.info("%s is served at %s", service.name, url)
        except InputError as error:
            if not server.should_exit:
                failed.append(error)
                server.should_exit = True

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        host, port = listening.getsockname()[:2]
        await link.start()
        starting = asyncio.create_task(start(f"http://{f'[{host}]' if ':' in host else host}:{port}"))
        yield
        starting.cancel()
        await link.close()

    app = make_app(service, options.origins, lifespan)
    config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=1, server_header=False)
    server = Draining(config, service, options.shutdown_timeout)
    server.run(sockets=[listening])
    if failed:
        raise failed[0]


class Draining(uvicorn.Server):
    """Told to end, it goes on answering: 503 to new work, and whole answers to those that it had begun."""

    def __init__(self, config: uvicorn.Config, service: Service, patience: float) -> None:
        super().__init__(config)
        self._service, self._patience = service, patience

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """By a signal. A second one does not wait."""
        if self._service.draining or self._service.link.ready is None:
            self.should_exit = True
        else:
            self._service.draining = True
            log.info("shutting down: %d requests under way", self._service.link.live)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._service.draining:
            self._patience -= 0.1
            if not self._service.link.live or self._patience <= 0:
                # What was written last is sent to its end before the sockets close.
                self.config.timeout_graceful_shutdown = max(1, int(self._patience))
                self.should_exit = True
        return bool(await super().on_tick(counter))


def _local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise InputError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
    return sock
