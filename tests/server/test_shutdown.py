"""The server's end: nobody is left without an answer; and sockets that bring nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from qllm.executor import Engine
from qllm.server.process.serve import Server
from tests.server.worlds import WAIT_S, is_empty, server, wait_for

LONG = {"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True}


@contextmanager
def listening(engine: Engine, **settings) -> Iterator[tuple[Server, str]]:
    """A server in a thread, and its address."""
    app = server(engine, **settings)
    one = Server(app, app.state.service.settings, "127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(one.serve()))
    thread.start()
    try:
        wait_for(lambda: one.started)
        yield one, f"http://127.0.0.1:{one.servers[0].sockets[0].getsockname()[1]}"
    finally:
        one.handle_exit(signal.SIGTERM, None)
        one.handle_exit(signal.SIGTERM, None)
        thread.join(WAIT_S)
        assert not thread.is_alive()
        wait_for(lambda: is_empty(engine))


class Asking:
    """A request in a thread of its own."""

    def __init__(self, url: str, body: dict):
        self.status, self.text = 0, ""
        self._url, self._body = f"{url}/v1/completions", body
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        response = httpx.post(self._url, json=self._body, timeout=WAIT_S)
        self.status, self.text = response.status_code, response.text

    def wait(self) -> None:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()


def requests(engine: Engine) -> int:
    return engine.stats().requests


def test_what_was_accepted_ends_and_nothing_more_is_let_in(engine: Engine) -> None:
    body = LONG | {"stream": True}
    with (
        listening(engine, drain_seconds=WAIT_S) as (one, url),
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=WAIT_S) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        whole = Asking(url, LONG | {"max_tokens": 300})
        wait_for(lambda: requests(engine) == 2)
        one.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: httpx.get(f"{url}/health", timeout=WAIT_S).status_code == 503)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=WAIT_S)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        whole.wait()
        assert whole.status == 200
        assert json.loads(whole.text)["usage"]["completion_tokens"] == 300
        # Left here: a client that leaves is not waited for.
    assert not one.servers[0].is_serving()


@pytest.mark.parametrize("signals", [1, 2])
def test_what_does_not_end_in_time_gets_an_error(engine: Engine, signals) -> None:
    with listening(engine, drain_seconds=0 if signals == 1 else 3600) as (one, url):
        stream = Asking(url, LONG | {"stream": True, "n": 2})
        whole = Asking(url, LONG)
        waiting = [Asking(url, LONG | {"priority": 3}) for _ in range(8)]
        wait_for(lambda: requests(engine) == 11)
        for _ in range(signals):
            one.handle_exit(signal.SIGTERM, None)
        for asking in (stream, whole, *waiting):
            asking.wait()
        assert {asking.status for asking in (whole, *waiting)} == {503}
        assert "ended before the answer was complete" in whole.text
        assert stream.status in (200, 503)
        if stream.status == 200:
            assert stream.text.endswith("data: [DONE]\n\n")
            assert '"code":"unavailable"' in stream.text


def test_a_head_that_does_not_come_is_given_up(engine: Engine) -> None:
    with listening(engine, body_timeout=0.2) as (_, url):
        port = int(url.rsplit(":", 1)[1])
        for data in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection(("127.0.0.1", port), WAIT_S) as connection:
                connection.sendall(data)
                assert connection.recv(100) == b""
        with httpx.Client(base_url=url, timeout=WAIT_S) as client:
            assert [client.get("/health").status_code for _ in range(3)] == [200] * 3
            assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
