"""One engine as a replica: what its router asks of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from qllm.executor import EngineClosed
from qllm.server.app import answer
from qllm.server.replicas.choice import Report
from qllm.server.replicas.relay import Asked, answers
from qllm.server.service import Service

REPORT_S = 0.05  #: seconds between two reports
REST_S = 0.25  #: the same while there is nothing to do


class EngineReplica:
    """An engine's application, asked from another process or from this one.

    Args:
        app: made by `make_app`.
    """

    def __init__(self, app: FastAPI):
        self._app = app
        self._service: Service = app.state.service

    async def ask(self, asked: Asked) -> AsyncGenerator[Message, None]:
        """What the application answers; to close the generator is to go away."""
        async for message in answers(self._app, asked):
            yield message

    async def line(self, path: str, data: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The HTTP status and body that a line of a batch gets."""
        return await answer(self._service, path, data)

    async def report(self) -> Report:
        """What there is to do, after a short while."""
        service = self._service
        await asyncio.sleep(REST_S if service.idle else REPORT_S)
        try:
            stats = await service.in_background(service.engine.stats)
        except EngineClosed:
            return Report(service.name, alive=False)
        tokens: dict[int, int] = {}
        for name, one in service.settings.classes.items():
            tokens[one.priority] = tokens.get(one.priority, 0) + service.admission.waiting_tokens[name]
        return Report(service.name, service.alive, tokens, 1 - stats.free_blocks / stats.total_blocks)

    async def end_all(self) -> None:
        """End what is under way: its clients get an error."""
        self._service.end_all()
