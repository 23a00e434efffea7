"""The soak of the server: what it holds against a server, and that the server stands what it sends."""

from __future__ import annotations

import asyncio
import random
import socketserver
import threading
from collections import Counter

import pytest

from benchmarks.server.odd import KINDS, Odd, outcome, request
from benchmarks.server.soak import GROWTH_MB, ODD_KINDS, Found
from qllm.executor import Engine
from tests.server.test_shutdown import listening
from tests.server.worlds import complete, is_empty, wait_for

GOOD = {("stream", "complete"): 9, ("stream", "left"): 2, ("malformed", "400"): 3, ("slow", "dropped"): 1}


def found(outcomes=(), memory=(100.0, 100.0), **more) -> Found:
    sizes = [(at * 10.0, size) for at, size in enumerate(memory, 1)]
    return Found(Counter(GOOD | dict(outcomes)), sizes, 30.0, 30.0, **more)


def test_nothing_is_held_against_a_server_that_does_all_of_it() -> None:
    assert found(memory=(50.0, 100.0 + GROWTH_MB, 99.0)).wrong() != []  # it grew after the half
    assert found(memory=(100.0, 100.0 + GROWTH_MB), left={"kv_cache_usage_perc": 0.0}).wrong() == []


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        (found({("stream", "STATUS 500"): 1}), "1 of 'stream': STATUS 500"),
        (found({("stream", "STATUS 429"): 2}), "2 of 'stream': STATUS 429"),
        (found({("stream", "WRONG TOKENS"): 1}), "WRONG TOKENS"),
        (found({("stream", "CUT OFF"): 1}), "CUT OFF"),
        (found({("good after it", "STATUS 404"): 1}), "STATUS 404"),
        (found({("good after it", "404"): 1}), "404"),
        (found({("malformed", "STATUS 200"): 1}), "STATUS 200"),
        (found({("slow", "NEITHER ANSWERED NOR DROPPED"): 1}), "NEITHER"),
        (found(left={"kv_cache_usage_perc": 0.001, "num_requests_running": 0.0}), "kv_cache_usage_perc is 0.001"),
        (found(memory=(100.0, 101.0 + GROWTH_MB)), "memory grew from 100"),
        (found(code=1), "exit code 1"),
        (found(code=None), "exit code None"),
        (found(broken=2), "2 errors"),
    ],
)
def test_what_is_wrong_is_told(seen, told) -> None:
    (line,) = seen.wrong()
    assert told in line


def test_the_server_answers_odd_requests_with_4xx_or_drops_them_and_serves_on(engine: Engine) -> None:
    rng = random.Random(3)
    odd = [kind(rng) for kind in KINDS for _ in range(8)]

    async def run(url: str) -> list[str]:
        return await asyncio.gather(*(outcome(url, one) for one in odd))

    with listening(engine, body_timeout=0.5) as (one, url):
        outcomes = asyncio.run(run(url))
        assert complete(one.config.app).status_code == 200
        wait_for(lambda: is_empty(engine))
    seen = {(one.kind, how) for one, how in zip(odd, outcomes, strict=True)}
    assert Found(Counter(seen)).wrong() == []
    assert {kind for kind, _ in seen} == ODD_KINDS
    assert {("malformed", "400"), ("oversized", "413"), ("slow", "408")} <= seen


@pytest.mark.parametrize(
    ("says", "how"),
    [(b"HTTP/1.1 200 OK\r\n\r\n", "STATUS 200"), (b"HTTP/1.1 500 No\r\n\r\n", "STATUS 500"), (b"", "dropped")],
)
def test_another_answer_is_told_apart(says, how) -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(says)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert asyncio.run(outcome(url, Odd("malformed", [request(b"{")]))) == how
