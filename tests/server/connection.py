"""A client that can go away: one HTTP request, spoken to the application as a server does."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import FastAPI

from tests.server.worlds import WAIT_S


class Connection:
    """One POST. `leave()` closes it; `chunks` are the parts of the answer so far."""

    def __init__(self, app: FastAPI, path: str, body: Any):
        self.status: int | None = None
        self.chunks: list[bytes] = []
        self.ended = False
        self._body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._gone = asyncio.Event()
        self._sent = False
        self._news = asyncio.Condition()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(self._body)).encode())]
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
        scope |= {"method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        scope |= {"scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "", "state": {}}
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self._gone.is_set():
            raise OSError("nobody is there")
        async with self._news:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            elif message.get("body"):
                self.chunks.append(message["body"])
            self._news.notify_all()

    async def until(self, chunks: int) -> None:
        """Wait for so many parts of the answer."""
        async with asyncio.timeout(WAIT_S), self._news:
            await self._news.wait_for(lambda: len(self.chunks) >= chunks)

    async def leave(self) -> None:
        """Close the connection, and wait until the application has noticed."""
        self._gone.set()
        async with asyncio.timeout(WAIT_S):
            await self.task
