"""One connection, and how long its client may keep it without a need."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from qllm.server.errors import ApiError
from qllm.server.surroundings import REFUSAL, Behind

log = logging.getLogger(__name__)


def connection(service: Behind) -> type[H11Protocol]:
    """HTTP over one connection, within the bounds of the service's settings.

    It is closed where a request's head does not come within `body_timeout`, and where its client takes nothing of an
    answer for `send_timeout`; a request that is under way then ends as if the client had gone. Beyond
    `max_connections` of them, requests are refused.
    """
    settings = service.settings

    class Connection(H11Protocol):
        head_due: asyncio.TimerHandle | None = None
        taking_due: asyncio.TimerHandle | None = None

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.app = self._within_limits

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # writing is paused while anything waits for the client
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._rest()
            self._taken()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait_until_taken()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._taken()

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP: as uvicorn does, but in the format of all other errors, and counted."""
            error = ApiError(400, msg, code="invalid_http")
            service.meter.rejected("invalid_http")
            kind = [(b"content-type", b"application/json"), (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=kind, reason=b"Bad Request"),
                h11.Data(data=json.dumps(error.body()).encode()),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        async def _within_limits(self, scope: Scope, receive: Receive, send: Send) -> None:
            app: Any = self.config.loaded_app
            if max(len(self.connections), len(self.tasks)) <= settings.max_connections:
                await app(scope, receive, send)
                return

            async def last(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
                await send(message)

            scope["state"][REFUSAL] = ApiError(
                503,
                f"too many connections; allowed: {settings.max_connections}",
                kind="service_unavailable_error",
                code="too_many_connections",
                retry_after=1,
            )
            await app(scope, receive, last)

        def _watch(self) -> None:
            """Only while no request is known; what waits for a following one ends by itself (keep-alive)."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._rest()
            elif self.head_due is None:
                self.head_due = self.loop.call_later(settings.body_timeout, self._too_slow)

        def _rest(self) -> None:
            if self.head_due is not None:
                self.head_due.cancel()
                self.head_due = None

        def _too_slow(self) -> None:
            self.head_due = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

        def _wait_until_taken(self) -> None:
            waiting = self.transport.get_write_buffer_size()
            self.taking_due = self.loop.call_later(settings.send_timeout, self._takes_nothing, waiting)

        def _takes_nothing(self, before: int) -> None:
            """It may be slow, and it may have been closed by us; what it has not taken is lost where it takes none."""
            if self.transport.get_write_buffer_size() < before:
                self._wait_until_taken()
                return
            log.info("a client took nothing for %g s; its connection is closed", settings.send_timeout)
            self.transport.abort()

        def _taken(self) -> None:
            if self.taking_due is not None:
                self.taking_due.cancel()
                self.taking_due = None

    return Connection
