"""POST /v1/requests/ID/priority: a request under way becomes more urgent, or less, and is served by it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllm.executor import Engine
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits
from qllm.server.admission import Admission
from qllm.server.errors import ApiError
from qllm.server.process.demo import demo_tokenizer
from qllm.server.settings import ServerSettings
from tests.server.connection import Connection
from tests.server.test_limits import SMALL
from tests.server.worlds import client, eventually, is_empty, refusal, server, wait_for

LONG = {"prompt": "Hello", "max_tokens": 3000, "ignore_eos": True, "stream": True}
BE = {"prompt": "Hello", "max_tokens": 3, "temperature": 0, "service_tier": "flex"}


@contextmanager
def standing_still(engine: Engine) -> Iterator[None]:
    """The engine's thread waits meanwhile; what comes is there when it goes on."""
    go = threading.Event()
    engine._loop.send(go.wait)
    try:
        yield
    finally:
        go.set()


@pytest.fixture(scope="module")
def one_place(one_thread) -> Iterator[Engine]:
    """An engine that serves one request at a time."""
    tokenizer = demo_tokenizer()
    model = tiny_model("qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=4096)
    limits = Limits(max_seqs=1, max_batched_tokens=256, kv_blocks=300, urgent_blocks=50)
    with Engine(model, tokenizer, policy="slack", limits=limits, seed=1) as engine:
        yield engine


async def change(http: httpx.AsyncClient, id: str, **body: Any) -> httpx.Response:
    return await http.post(f"/v1/requests/{id}/priority", json=body)


@pytest.mark.parametrize("said", [{"class": "ls"}, {"priority": 0}, {"priority": -4, "class": "ls"}])
@pytest.mark.parametrize("name", ["mine", "cmpl-mine"])
def test_a_waiting_be_request_becomes_ls_and_is_served_first(one_place, said, name) -> None:
    app = server(one_place)
    service = app.state.service

    async def run() -> None:
        ended: list[str] = []
        async with client(app) as http:

            async def one(id: str) -> dict[str, Any]:
                answer = await http.post("/v1/completions", json=BE, headers={"X-Request-Id": id})
                ended.append(id)
                return answer.json()

            running = Connection(app, "/v1/completions", LONG | {"service_tier": "flex"})
            await running.until(1)
            tasks = []
            for id in ("first", "second", "mine"):
                tasks.append(asyncio.create_task(one(id)))
                await eventually(lambda: _true(service.admission.waiting["be"] == len(tasks)))
            told = (await change(http, name, **said)).json()
            assert told == {
                **{"id": name, "object": "request.priority", "class": "ls", "service_tier": "default"},
                "priority": said.get("priority", 0),
            }
            await running.leave()
            answers = await asyncio.gather(*tasks)
        assert ended == ["mine", "first", "second"]
        assert [answer["service_tier"] for answer in answers] == ["flex", "flex", "default"]

    asyncio.run(run())
    assert service.admission.waiting == {"ls": 0, "be": 0}
    wait_for(lambda: is_empty(one_place))


async def _true(value: bool) -> bool:
    return value


def test_a_stream_that_becomes_less_urgent_gives_way_and_tells_its_tier(one_place) -> None:
    app = server(one_place)

    async def run() -> None:
        async with client(app) as http:
            running = Connection(app, "/v1/completions", LONG | {"max_tokens": 500})
            await running.until(1)
            id = next(iter(app.state.service._generations.values())).request_id
            assert (await change(http, f"cmpl-{id}", **{"class": "be"})).status_code == 200
            served = await http.post("/v1/completions", json=BE | {"service_tier": "default"})
            assert served.status_code == 200
            assert not running.ended
            await running.until(len(running.chunks) + 1)
            assert b'"service_tier":"default"' in running.chunks[0]
            assert b'"service_tier":"flex"' in running.chunks[-1]
            await running.leave()
            refusal(await change(http, f"cmpl-{id}", priority=0), 404, "id")  # it has ended

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"priority": 0}, 404, "id"),
        ({}, 400, "priority"),
        ({"class": "gold"}, 400, "class"),
        ({"class": "be", "priority": 0}, 400, "class"),
        ({"priority": 2**40}, 400, "priority"),
        ({"priority": True}, 400, "priority"),
        ({"tier": "flex"}, 400, "tier"),
        ({"class_name": "be"}, 400, "class_name"),
    ],
)
def test_what_cannot_be_honoured_is_answered(one_place, body, status, param) -> None:
    async def run() -> None:
        async with client(server(one_place)) as http:
            refusal(await change(http, "no/such", **body), status, param)

    asyncio.run(run())


def test_a_priority_with_which_it_could_never_fit_leaves_all_as_it_was(one_place) -> None:
    """Fifty blocks are for LS alone: a request that needs them cannot become BE."""
    app = server(one_place)
    service = app.state.service

    async def run() -> None:
        async with client(app) as http:
            big = Connection(app, "/v1/completions", LONG | {"max_tokens": 260 * 16})
            await big.task
            assert big.status == 400  # beyond the model's positions
            big = Connection(app, "/v1/completions", LONG | {"max_tokens": 4090})
            await big.until(1)
            (id,) = (caller.request_id for caller in service._generations.values())
            refusal(await change(http, id, **{"class": "be"}), 400, "priority")
            (generation,) = service._generations
            assert generation.urgency.class_ == generation.choices[0].ticket.class_ == "ls"
            (sequence,) = one_place.call(lambda loop: list(loop.sequences.values()))
            assert sequence.request.priority == 0
            await big.leave()

    asyncio.run(run())


def test_a_key_reaches_its_own_requests_alone_and_nothing_above_its_class(one_place) -> None:
    keys = [{"key": "of-the-night", "class_name": "be"}, {"key": "of-the-day"}]
    app = server(one_place, api_keys=keys)
    day, night = ({"Authorization": f"Bearer {one['key']}"} for one in reversed(keys))

    async def run() -> None:
        async with client(app, **night) as http, client(app, **day) as other:
            asked = LONG | {"max_tokens": 400, "stream": False}
            task = asyncio.create_task(http.post("/v1/completions", json=asked, headers={"X-Request-Id": "mine"}))
            await eventually(lambda: _true(not app.state.service.idle))
            refusal(await change(other, "mine", priority=0), 404, "id")
            refusal(await change(http, "mine", priority=0), 403, "priority")
            refusal(await change(http, "mine", **{"class": "ls"}), 403, "class")
            assert (await change(http, "mine", priority=9)).json()["priority"] == 9
            assert (await task).json()["service_tier"] == "flex"

    asyncio.run(run())


def test_a_full_class_takes_nobody_in_by_this_way(one_place) -> None:
    app = server(one_place, classes=SMALL)

    async def run() -> None:
        async with client(app) as http:
            with standing_still(one_place):
                tasks = [
                    asyncio.create_task(http.post("/v1/completions", json=BE | {"n": n, "service_tier": tier}))
                    for tier, n in (("flex", 2), ("default", 3))
                ]
                await eventually(lambda: _true(app.state.service.admission.open == 5))
                callers = [caller.request_id for caller in app.state.service._generations.values()]
                answer = await change(http, callers[0], priority=0)
                assert "allowed in class ls: 4" in refusal(answer, 429)
            assert [(await task).status_code for task in tasks] == [200, 200]

    asyncio.run(run())


@given(st.data())
def test_counts_of_what_waits_follow_requests_from_class_to_class(data) -> None:
    admission = Admission(ServerSettings.model_validate({"classes": SMALL}))
    tickets = admission.enter("be", [7]) + admission.enter("ls", [5, 6])
    for _ in range(8):
        one = data.draw(st.sampled_from(tickets))
        do = data.draw(st.sampled_from(["move", "started", "left"]))
        if do == "move":
            class_ = data.draw(st.sampled_from(["ls", "be"]))
            try:
                admission.check_move([one], class_)
            except ApiError:
                continue
            admission.move([one], class_)
            assert one.class_ == class_
        else:
            getattr(one, do)()
        for class_ in SMALL:
            waiting = [ticket for ticket in tickets if ticket.waits and ticket.class_ == class_]
            assert admission.waiting[class_] == len(waiting)
            assert admission.waiting_tokens[class_] == sum(ticket.tokens for ticket in waiting)
