"""The server's process: a socket, signals, and an end at which everybody is answered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from ipaddress import ip_address
from types import FrameType

import uvicorn
from fastapi import FastAPI

from qllm.server.process.connection import connection
from qllm.server.service import Service
from qllm.server.settings import ServerSettings

log = logging.getLogger(__name__)

LAST_WORDS_S = 5.0  #: seconds in which the last answers have to reach their clients


class Server(uvicorn.Server):
    """Ends in order: admission closes, what was accepted goes on for a while, and what is left then hears of it.

    Args:
        app: made by `make_app`.
        settings: of the server.
        host: address to listen at.
        port: the same; 0 for any that is free.
    """

    def __init__(self, app: FastAPI, settings: ServerSettings, host: str, port: int):
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=connection(app.state.service),
                access_log=False,
                log_level="warning",
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=int(LAST_WORDS_S),
            )
        )
        self._service: Service = app.state.service
        self._drain_seconds = settings.drain_seconds
        self._signals = 0
        self._deadline: float | None = None  # by the monotonic clock

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one lets what was accepted end, the second ends it."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; whether to stop listening."""
        if self._signals and self._deadline is None:
            self._service.close_admission()
            self._deadline = time.monotonic() + self._drain_seconds
            log.info("about to end: no more requests; those that were accepted have %g s", self._drain_seconds)
        if self._deadline is not None and (
            self._service.idle or self._signals > 1 or time.monotonic() >= self._deadline
        ):
            self._service.end_all()
            self.should_exit = True
        return await super().on_tick(counter)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(app: FastAPI, settings: ServerSettings, host: str, port: int, listening: Callable[[str], None]) -> None:
    """Serve until a signal comes. `listening` is told the address once the server can be reached."""

    async def serve() -> None:
        server = Server(app, settings, host, port)
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.02)
        if server.started and server.servers:
            bound = server.servers[0].sockets[0].getsockname()[1]
            listening(f"http://{f'[{host}]' if ':' in host else host}:{bound}")
        await task

    asyncio.run(serve())
