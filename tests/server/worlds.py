"""A server without a socket, and what the tests say to it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from fastapi import FastAPI

from qllm.executor import Engine
from qllm.server.app import make_app
from qllm.server.settings import ServerSettings

WAIT_S = 60.0  #: for what should take no time at all


def server(engine: Engine, **settings: Any) -> FastAPI:
    """The application with these settings."""
    return make_app(engine, ServerSettings.model_validate({"model_name": "tiny", **settings}))


def client(app: FastAPI, **headers: str) -> httpx.AsyncClient:
    """A client of it, in this process."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers, timeout=WAIT_S)


def ask(app: FastAPI, path: str, body: Any = None, **headers: str) -> httpx.Response:
    """One request: POST with a body, GET without."""

    async def send() -> httpx.Response:
        async with client(app, **headers) as http:
            return await (http.get(path) if body is None else http.post(path, json=body))

    return asyncio.run(send())


def complete(app: FastAPI, prompt: Any = "Hello", **fields: Any) -> httpx.Response:
    """A text completion, greedy unless told otherwise."""
    return ask(app, "/v1/completions", {"prompt": prompt, "temperature": 0, **fields})


def chat(app: FastAPI, text: str = "Hello", **fields: Any) -> httpx.Response:
    """A chat completion, greedy unless told otherwise."""
    messages = [{"role": "user", "content": text}]
    return ask(app, "/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 8, **fields})


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, parsed; the last one has to be [DONE], and is left out."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines]


def refusal(response: httpx.Response, status: int, param: str | None = None) -> str:
    """The message of an error in OpenAI's format."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    return str(error["message"])


def wait_for(what: Callable[[], bool], seconds: float = WAIT_S) -> None:
    """Return once `what` holds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def is_empty(engine: Engine) -> bool:
    """Whether nothing is left in the engine: no request, no block."""
    stats = engine.stats()
    return stats.requests == 0 and stats.free_blocks == stats.total_blocks


async def eventually(what: Callable[[], Awaitable[bool]]) -> None:
    """Return once `what` holds, and let others go on meanwhile."""
    async with asyncio.timeout(WAIT_S):
        while not await what():
            await asyncio.sleep(0.005)
