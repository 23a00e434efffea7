"""What breaks is told, and breaks nothing else."""

from __future__ import annotations

import asyncio
import json

import pytest

from qllm.executor import Engine
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits
from qllm.server.process.demo import demo_tokenizer
from tests.server.connection import Connection
from tests.server.worlds import WAIT_S, ask, client, complete, is_empty, refusal, server, wait_for

LONG = {"prompt": "Hello", "max_tokens": 3000, "ignore_eos": True, "stream": True}


def break_next_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """The next pass of so many rows raises."""
    begin = engine._runner.begin

    def broken(entries, *rest):
        entries = list(entries)
        if sum(n for _, n in entries) == rows:
            monkeypatch.undo()
            raise ArithmeticError("it broke")
        return begin(entries, *rest)

    monkeypatch.setattr(engine._runner, "begin", broken)


def test_a_pass_that_breaks_fails_its_requests_alone(engine: Engine, monkeypatch) -> None:
    app = server(engine)
    break_next_pass(engine, monkeypatch, rows=77)
    response = complete(app, [9] * 77)
    assert refusal(response, 500) == "the pass that the request was in failed: ArithmeticError"
    assert response.json()["error"]["type"] == "server_error"
    assert response.json()["error"]["code"] == "ArithmeticError"
    assert complete(app, [9] * 77).status_code == 200
    assert is_empty(engine)


def test_a_stream_that_breaks_ends_with_an_error(engine: Engine, monkeypatch) -> None:
    app = server(engine)

    async def run() -> list[bytes]:
        connection = Connection(app, "/v1/completions", LONG)
        await connection.until(3)
        break_next_pass(engine, monkeypatch, rows=1)
        async with asyncio.timeout(WAIT_S):
            await connection.task
        return connection.chunks

    *_, error, done = asyncio.run(run())
    assert json.loads(error[6:])["error"]["type"] == "server_error"
    assert done == b"data: [DONE]\n\n"
    assert app.state.service.idle


def test_a_request_that_can_never_fit_is_the_clients_mistake(engine: Engine) -> None:
    app = server(engine)
    app.state.service.max_model_len = 10**6
    assert "400" in str(complete(app, [9] * 4000, max_tokens=3000).status_code)


def test_a_fault_of_the_server_is_a_500_in_the_same_format(engine: Engine, monkeypatch) -> None:
    app = server(engine)
    monkeypatch.setattr(app.state.service, "start", lambda *_: 1 / 0)
    response = complete(app)
    assert refusal(response, 500) == "internal error: ZeroDivisionError"
    assert "x-request-id" in response.headers


def test_a_line_of_a_batch_is_answered_as_a_request_of_its_class(engine: Engine) -> None:
    from qllm.server.app import answer

    service = server(engine).state.service
    body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}

    def line(path="/v1/completions", **fields):
        return asyncio.run(answer(service, path, body | fields))

    status, told = line()
    assert (status, told["service_tier"], told["usage"]["completion_tokens"]) == (200, "flex", 4)
    assert line(stream=True)[0] == 400
    assert line(priority=0)[0] == 403
    assert line("/v1/embeddings")[0] == 404
    assert line(n="two")[1]["error"]["param"] == "n"
    assert ask(server(engine), "/v1/files").status_code == 404  # without a folder there are no batches


@pytest.mark.filterwarnings("ignore:another engine")  # the module's, which is idle
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("way", ["closed", "broken"])
def test_a_dead_engine_ends_every_request_and_turns_health_to_503(one_thread, way) -> None:
    tokenizer = demo_tokenizer()
    model = tiny_model("qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=4096)
    engine = Engine(model, tokenizer, limits=Limits(kv_blocks=512))
    app = server(engine)

    async def run() -> None:
        streams = [Connection(app, "/v1/completions", LONG) for _ in range(3)]
        for connection in streams:
            await connection.until(2)
        whole = Connection(app, "/v1/completions", LONG | {"stream": False})
        if way == "closed":
            await asyncio.to_thread(engine.close)
        else:
            engine.scheduler.next = lambda now: 1 / 0
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*(one.task for one in (*streams, whole)))
        for connection in streams:
            assert json.loads(connection.chunks[-2][6:])["error"]["code"] == "unavailable"
        assert whole.status == 503
        await asyncio.to_thread(wait_for, lambda: not engine.alive)
        async with client(app) as http:
            assert (await http.get("/health")).status_code == 503
            assert (await http.get("/metrics")).status_code == 503
            assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 503

    try:
        asyncio.run(run())
        assert app.state.service.idle
    finally:
        engine.close()
