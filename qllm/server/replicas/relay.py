"""An HTTP request as a value that goes to another process, and the answer of an application message by message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope


@dataclass(frozen=True)
class Asked:
    """An HTTP request with its whole body."""

    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""

    def scope(self) -> Scope:
        """For an application."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": list(self.headers),
        }


async def answers(app: ASGIApp, asked: Asked) -> AsyncGenerator[Message, None]:
    """What `app` answers. Where the generator is closed or cancelled, `app` hears that its client is gone."""
    queue: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    bodies = [asked.body]

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(asked.scope(), receive, queue.put)
        finally:
            queue.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (message := await queue.get()) is not None:
            yield message
        await task
    finally:
        left.set()
        await asyncio.wait([task])
