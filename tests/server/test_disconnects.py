"""A client that goes away frees what it holds, wherever its request stands."""

from __future__ import annotations

import asyncio

import pytest

from qllm.executor import Engine
from tests.server.connection import Connection
from tests.server.worlds import eventually, is_empty, server, wait_for

LONG = {"prompt": "Hello", "max_tokens": 3000, "ignore_eos": True}


@pytest.fixture
def app(engine: Engine):
    yield server(engine)
    wait_for(lambda: is_empty(engine))


async def in_engine(engine: Engine, requests: int) -> None:
    async def there() -> bool:
        return (await asyncio.to_thread(engine.stats)).requests == requests

    await eventually(there)


@pytest.mark.parametrize("choices", [1, 3])
def test_while_it_streams(app, engine: Engine, choices) -> None:
    async def run() -> None:
        connection = Connection(app, "/v1/completions", LONG | {"stream": True, "n": choices})
        await connection.until(5)
        await connection.leave()
        await in_engine(engine, 0)
        assert app.state.service.idle

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_while_the_whole_answer_or_the_first_token_is_awaited(app, engine: Engine, path, stream) -> None:
    prompt = (
        {"prompt": [7] * 3000}
        if path == "/v1/completions"
        else {"messages": [{"role": "user", "content": "a b " * 800}]}
    )

    async def run() -> None:
        body = {**prompt, "max_tokens": 500, "ignore_eos": True, "stream": stream}
        connection = Connection(app, path, body)
        await in_engine(engine, 1)
        await connection.leave()
        await in_engine(engine, 0)
        assert app.state.service.idle
        assert app.state.service.admission.waiting == {"ls": 0, "be": 0}

    asyncio.run(run())


def test_while_it_waits_behind_others(app, engine: Engine) -> None:
    async def run() -> None:
        running = [Connection(app, "/v1/completions", LONG | {"stream": True}) for _ in range(8)]
        for connection in running:
            await connection.until(1)
        waiting = Connection(app, "/v1/completions", LONG | {"stream": True, "priority": 5})
        await in_engine(engine, 9)
        await waiting.leave()
        await in_engine(engine, 8)
        assert waiting.chunks == []
        for connection in running:
            await connection.leave()
        await in_engine(engine, 0)

    asyncio.run(run())


def test_others_get_all_their_tokens(app, engine: Engine) -> None:
    async def run() -> None:
        body = {"prompt": "Hello", "max_tokens": 40, "temperature": 0, "stream": True, "ignore_eos": True}
        alone = Connection(app, "/v1/completions", body)
        await alone.task
        kept = [Connection(app, "/v1/completions", body) for _ in range(4)]
        leaving = [Connection(app, "/v1/completions", LONG | {"stream": True}) for _ in range(4)]
        for connection in leaving:
            await connection.until(2)
            await connection.leave()
        await asyncio.gather(*(connection.task for connection in kept))
        assert {len(connection.chunks) for connection in kept} == {len(alone.chunks)} == {42}

    asyncio.run(run())


def test_a_reader_that_reads_nothing_stalls_nobody(app, engine: Engine) -> None:
    async def run() -> None:
        slow = Connection(app, "/v1/completions", LONG | {"stream": True, "max_tokens": 200})
        await slow.until(1)
        async with slow._news:  # its next part is not taken
            other = Connection(app, "/v1/completions", {"prompt": "Hello", "max_tokens": 10})
            await other.until(1)
            assert other.status == 200
            await in_engine(engine, 0)
        await slow.task
        assert len(slow.chunks) == 202

    asyncio.run(run())
