"""Bounds of connections: how many there are, and how long one that takes nothing is kept."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from qllm.executor import Engine
from qllm.server.process.connection import connection
from tests.server.test_limits import rejections
from tests.server.test_shutdown import LONG, listening, requests
from tests.server.worlds import WAIT_S, complete, is_empty, refusal, server, wait_for


def connected(url: str, small: bool = False) -> socket.socket:
    """A socket; a `small` one has hardly room for what comes."""
    made = socket.socket()
    made.settimeout(WAIT_S)
    if small:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
    return made


def test_beyond_the_most_connections_requests_are_refused_in_the_usual_format(engine: Engine) -> None:
    with listening(engine, max_connections=2) as (one, url):
        app = one.config.app
        with connected(url), connected(url):
            wait_for(lambda: len(one.server_state.connections) == 2)
            response = httpx.get(f"{url}/v1/models", timeout=WAIT_S)
        assert "2" in refusal(response, 503)
        assert response.json()["error"]["code"] == "too_many_connections"
        assert response.headers["retry-after"] == "1"
        assert response.headers["connection"] == "close"
        assert len(response.headers["x-request-id"]) == 32
        assert rejections(app) == {("", "too_many_connections"): 1}
        wait_for(lambda: not one.server_state.connections)
        with connected(url):
            assert httpx.get(f"{url}/v1/models", timeout=WAIT_S).status_code == 200


def test_what_is_no_http_is_refused_in_the_usual_format(engine: Engine) -> None:
    with listening(engine) as (one, url):
        with connected(url) as client:
            client.sendall(b"GET\r\n\r\n")
            told = b"".join(iter(lambda: client.recv(4096), b""))
        head, _, body = told.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert b'"code": "invalid_http"' in body
        assert rejections(one.config.app) == {("", "invalid_http"): 1}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_takes_nothing_is_given_up(engine: Engine, stream) -> None:
    with listening(engine, send_timeout=0.2) as (one, url):
        one.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = httpx.Request(
            "POST", url, json=LONG | {"max_tokens": 3000 if stream else 60, "stream": stream, "logprobs": 20}
        )
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body.content)}\r\n\r\n"
        with connected(url, small=True) as client:
            client.sendall(head.encode() + body.content)
            wait_for(lambda: requests(engine) == 1)
            wait_for(lambda: not one.server_state.connections)  # the client still holds its end
            wait_for(lambda: is_empty(engine))
        ended = one.config.app.state.service.meter.ended["requests"]
        assert ended.labels("ls", "cancelled" if stream else "length")._value.get() == 1
        assert complete(one.config.app).status_code == 200


def test_a_slow_reader_is_kept_as_long_as_it_takes_something(engine: Engine) -> None:
    app = server(engine, send_timeout=7.0)
    size, aborted, timers = 0, [], []

    def call_later(seconds, function, *args):
        timers.append((seconds, function, args))
        return SimpleNamespace(cancel=lambda: None)

    transport = SimpleNamespace(
        get_extra_info=lambda *_: None,
        set_write_buffer_limits=lambda high: None,
        get_write_buffer_size=lambda: size,
        abort=lambda: aborted.append(size),
    )
    one = connection(app.state.service)(
        uvicorn.Config(app), ServerState(), {}, _loop=SimpleNamespace(call_later=call_later)
    )
    one.connection_made(transport)
    timers.clear()
    size = 100
    one.pause_writing()
    for left in (99, 50, 49):
        size = left
        seconds, function, args = timers.pop()
        assert seconds == 7.0
        function(*args)
        assert not aborted
    _, function, args = timers.pop()
    function(*args)
    assert aborted == [49]
