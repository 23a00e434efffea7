"""Two engines behind one address, without Ray: where requests go, what happens when a replica is full, slow or lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from qllm.executor import Engine
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits
from qllm.server.process.demo import demo_tokenizer
from qllm.server.replicas.app import make_replicas_app
from qllm.server.replicas.choice import Report, Sent, blocking, ranked
from qllm.server.replicas.engine import EngineReplica
from qllm.server.replicas.router import ReplicaLost, Router
from qllm.server.settings import ServerSettings
from tests.server.connection import Connection
from tests.server.worlds import client, events, eventually, is_empty, refusal, server, wait_for

LONG = {"prompt": "Hello", "max_tokens": 3000, "ignore_eos": True, "stream": True}
SHORT = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}
FULL = {"classes": {"ls": {"priority": 0, "max_waiting": 64, "max_waiting_tokens": 4000}}}
FULL["classes"]["be"] = {"priority": 1, "max_waiting": 0, "max_waiting_tokens": 0}

# ---- the choice --------------------------------------------------------------------------------------------------

levels = st.integers(-1, 2)
amounts = st.dictionaries(levels, st.integers(0, 5))
reports = st.builds(Report, alive=st.booleans(), waiting_tokens=amounts, kv_used=st.floats(0, 1))
sents = st.lists(st.builds(Sent, levels, st.integers(0, 5), st.booleans()), max_size=3)
worlds = st.dictionaries(st.sampled_from("abcd"), st.tuples(reports, sents))


def urgent(report: Report, sent: list[Sent], priority: int) -> int:
    """Tokens of prompts that are as urgent, and wait."""
    known = {one.priority for one in sent if one.reported and one.priority <= priority}
    unknown = sum(one.tokens for one in sent if not one.reported and one.priority <= priority)
    return unknown + sum(report.waiting_tokens.get(level, 0) for level in known)


@given(worlds, levels)
def test_a_request_goes_where_the_least_waits_that_is_as_urgent(world, priority) -> None:
    found = ranked(world, priority)
    assert {*found} == {name for name, (report, _) in world.items() if report.alive}
    waits = [urgent(*world[name], priority) for name in found]
    assert waits == sorted(waits)


@given(worlds, levels, st.integers(1, 9))
def test_less_urgent_work_decides_only_between_equals(world, priority, more) -> None:
    found = ranked(world, priority)
    if not found:
        return
    report, sent = world[found[0]]
    world[found[0]] = report, [*sent, Sent(priority + 1, more)]
    ahead = [blocking(*world[name], priority)[:2] for name in found]
    assert ranked(world, priority)[0] == found[0] or ahead[0] == min(ahead[1:])


def test_of_equal_replicas_an_urgent_request_takes_the_one_where_nothing_runs() -> None:
    idle, batch = (Report(), []), (Report(waiting_tokens={1: 9000}), [Sent(1, 9000, reported=True)])
    assert ranked({"0": batch, "1": idle}, 0) == ["1", "0"]
    assert ranked({"0": batch, "1": (Report(), [Sent(0, 1, reported=True)])}, 0) == ["0", "1"]
    assert ranked({"0": (Report(), [Sent(1, 5)]), "1": idle}, 1) == ["1", "0"]


def test_what_a_report_says_of_requests_that_have_ended_does_not_count() -> None:
    late = Report(waiting_tokens={0: 500}), []
    assert ranked({"0": late, "1": (Report(), [Sent(1, 5)])}, 0) == ["0", "1"]


# ---- two engines -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines(one_thread):
    """Two engines with the same tiny model."""
    tokenizer = demo_tokenizer()
    limits = Limits(max_seqs=8, max_batched_tokens=256, kv_blocks=2048)

    def engine() -> Engine:
        model = tiny_model("qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=4096)
        return Engine(model, tokenizer, policy="slack", limits=limits, seed=1)

    with engine() as one:
        with pytest.warns(RuntimeWarning, match="another engine of this process"):
            second = engine()
        with second as other:
            yield one, other


@asynccontextmanager
async def serving(engines, *own: dict, **settings) -> AsyncIterator[tuple[FastAPI, Router]]:
    """A server over these engines. `own`: what a replica has of its own."""
    own = own or ({},) * len(engines)
    replicas = [EngineReplica(server(one, **{**settings, **mine})) for one, mine in zip(engines, own, strict=True)]
    async with over(replicas, **settings) as (app, router):
        yield app, router
    for engine in engines:
        await asyncio.to_thread(wait_for, lambda engine=engine: is_empty(engine))


@asynccontextmanager
async def over(replicas, **settings) -> AsyncIterator[tuple[FastAPI, Router]]:
    """A server over these replicas."""
    router = Router(ServerSettings.model_validate(settings), replicas)
    app = make_replicas_app(router)
    async with app.router.lifespan_context(app):
        yield app, router
        assert router.idle


async def ask(app: FastAPI, path: str = "/v1/completions", body: object = None, **headers: str) -> httpx.Response:
    async with client(app, **headers) as http:
        return await (http.get(path) if body is None else http.post(path, json=body))


async def loads(app: FastAPI) -> list[float]:
    """Requests that each replica was given so far."""
    text = (await ask(app, "/metrics")).text
    name = "qllm:prompt_tokens_total"
    return [
        sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name) and f'replica="{i}"' in line)
        for i in (0, 1)
    ]


def test_what_one_replica_answers_comes_through(engines) -> None:
    async def run() -> None:
        async with serving(engines) as (app, _):
            whole = await ask(app, body=SHORT)
            assert whole.headers["x-request-id"] in whole.json()["id"]
            assert whole.headers.get_list("x-request-id") == [whole.headers["x-request-id"]]
            parts = events(await ask(app, body=SHORT | {"stream": True}))
            assert "".join(part["choices"][0]["text"] for part in parts) == whole.json()["choices"][0]["text"]
            given = await ask(app, body=SHORT, **{"X-Request-Id": "mine"})
            assert given.json()["id"] == "cmpl-mine"
            assert "echo" in refusal(await ask(app, body=SHORT | {"echo": True}), 400, "echo")
            assert (await ask(app, "/v1/models")).json()["data"][0]["id"] == "tiny"
            assert (await ask(app, "/tokenize", {"prompt": "ab"})).json()["count"] == 1
            assert (await ask(app, "/nosuch")).status_code == 404
            assert (await ask(app, "/v1/completions")).status_code == 405
            assert (await ask(app, "/health")).json() == {"status": "ok", "replicas": {"0": "ok", "1": "ok"}}

    asyncio.run(run())


@pytest.mark.parametrize(("says", "other"), [({"service_tier": "flex"}, {}), ({"model": "tiny:be"}, {"priority": 0})])
def test_beside_a_long_be_request_ls_goes_to_the_other_replica(engines, says, other) -> None:
    async def run() -> None:
        async with serving(engines) as (app, router):
            before = await loads(app)
            be = Connection(app, "/v1/completions", LONG | says)
            await be.until(2)
            assert len(router.members["0"].open) == 1
            for _ in range(3):
                assert (await ask(app, body=SHORT | other)).status_code == 200
            after = await loads(app)
            assert after[0] - before[0] == 3  # tokens of the BE prompt
            assert after[1] - before[1] == 9
            await be.leave()

    asyncio.run(run())


def test_requests_that_no_report_tells_of_yet_count(engines) -> None:
    async def run() -> None:
        async with serving(engines) as (app, router):
            both = [Connection(app, "/v1/completions", LONG) for _ in range(2)]
            await eventually(lambda: _true(all(member.open for member in router.members.values())))
            for one in both:
                await one.until(1)
                await one.leave()

    asyncio.run(run())


async def _true(value: bool) -> bool:
    return value


def test_where_one_replica_is_full_the_next_one_answers(engines) -> None:
    async def run() -> None:
        async with serving(engines, FULL, {}) as (app, _):
            for _ in range(2):
                assert (await ask(app, body=SHORT | {"service_tier": "flex"})).status_code == 200
        async with serving(engines, FULL, FULL) as (app, _):
            response = await ask(app, body=SHORT | {"service_tier": "flex"})
            assert "class be" in refusal(response, 429)
            assert response.headers["retry-after"] == "1"
            assert (await ask(app, body=SHORT)).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place_in_the_engine(engines, stream) -> None:
    async def run() -> None:
        async with serving(engines) as (app, router):
            connection = Connection(app, "/v1/completions", LONG | {"stream": stream})
            await (connection.until(3) if stream else eventually(lambda: _true(not router.idle)))
            await connection.leave()
            assert router.idle  # and serving() waits until the engines are empty

    asyncio.run(run())


def test_keys_are_looked_at_once_and_their_class_counts(engines) -> None:
    keys = {"api_keys": [{"key": "of-the-night", "class_name": "be"}, {"key": "of-the-day"}]}

    async def run() -> None:
        async with serving(engines, **keys) as (app, router):
            assert (await ask(app, body=SHORT)).status_code == 401
            assert (await ask(app, "/metrics")).status_code == 401
            headers = {"Authorization": "Bearer of-the-night"}
            assert (await ask(app, body=SHORT, **headers)).json()["service_tier"] == "flex"
            assert (await ask(app, body=SHORT | {"priority": 0}, **headers)).status_code == 403
            assert router.priority(b"{}", _caller(router, 0)) == 1
            assert router.priority(b"{}", _caller(router, 1)) == 0

    asyncio.run(run())


def _caller(router: Router, key: int):
    from qllm.server.service import Caller

    return Caller("id", None, router.settings.api_keys[key])


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"priority": "x"}', b'{"service_tier": "gold"}', b"[" * 100_000])
def test_of_a_request_that_will_be_refused_the_class_is_the_default(body) -> None:
    from qllm.server.service import Caller

    assert Router(ServerSettings(), []).priority(body, Caller("id")) == 0


def test_the_priority_of_a_request_is_changed_where_it_is(engines) -> None:
    async def change(app: FastAPI, id: str, **body) -> httpx.Response:
        return await ask(app, f"/v1/requests/{id}/priority", body)

    async def run() -> None:
        async with serving(engines) as (app, _):
            both = [Connection(app, "/v1/completions", LONG) for _ in range(2)]
            for one in both:
                await one.until(1)
            ids = [json.loads(one.chunks[0][6:])["id"] for one in both]
            for id in ids:
                assert (await change(app, id, priority=5)).json()["class"] == "be"
            refusal(await change(app, "nobody", priority=5), 404, "id")
            refusal(await change(app, ids[1], **{"class": "gold"}), 400, "class")
            held = [one.call(lambda loop: [s.request.priority for s in loop.sequences.values()]) for one in engines]
            assert held == [[5], [5]]
            for one in both:
                await one.leave()
        async with over([]) as (app, _):
            assert "no replica" in refusal(await change(app, "nobody", priority=5), 503)

    asyncio.run(run())


def test_metrics_name_their_replica(engines) -> None:
    async def run() -> None:
        async with serving(engines) as (app, _):
            text = (await ask(app, "/metrics")).text
            lines = text.splitlines()
            names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
            assert len(names) == len({*names})
            assert all(f'replica="{i}"' in text for i in (0, 1))
            assert all('replica="' in line for line in lines if not line.startswith("#"))

    asyncio.run(run())


def test_lines_of_a_batch_go_to_all_replicas(engines, tmp_path) -> None:
    def line(i: int) -> str:
        body = {"prompt": "Hello", "max_tokens": 40, "ignore_eos": True}
        return json.dumps({"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions", "body": body})

    async def run() -> None:
        async with serving(engines, {"batches": {}}, {"batches": {}}, batches={"folder": str(tmp_path)}) as (app, _):
            before = await loads(app)
            async with client(app) as http:
                files = {"file": ("in.jsonl", "\n".join(map(line, range(8))).encode())}
                file = (await http.post("/v1/files", data={"purpose": "batch"}, files=files)).json()["id"]
                asked = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "1h"}
                batch = (await http.post("/v1/batches", json=asked)).json()

                async def completed() -> bool:
                    state = (await http.get(f"/v1/batches/{batch['id']}")).json()
                    return state["status"] == "completed" and state["request_counts"]["completed"] == 8

                await eventually(completed)
            assert [after - was for after, was in zip(await loads(app), before, strict=True)] == [12, 12]

    asyncio.run(run())


# ---- a replica that is lost, and the end -------------------------------------------------------------------------


class Breaking:
    """A replica that is lost after so many messages of its answer, and comes back when it is told to."""

    def __init__(self, *messages: dict):
        self.back = asyncio.Event()
        self._messages = messages
        self._lost = False

    async def ask(self, asked) -> AsyncGenerator[dict, None]:
        for message in self._messages:
            yield message
        self._lost = True
        raise ReplicaLost("ActorDiedError")

    async def line(self, path, data) -> tuple[int, dict]:
        raise ReplicaLost("ActorDiedError")

    async def report(self) -> Report:
        await asyncio.sleep(0.01)
        if self._lost:
            await self.back.wait()
        return Report("tiny")

    async def end_all(self) -> None:
        raise ReplicaLost("ActorDiedError")


START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
PART = {"type": "http.response.body", "body": b'data: {"choices": []}\n\n', "more_body": True}


def test_a_replica_that_is_lost_ends_its_requests_with_an_error_and_others_serve_on(engines) -> None:
    async def run() -> None:
        breaking = Breaking(START, PART)
        async with over([breaking, EngineReplica(server(engines[1]))]) as (app, router):
            *_, last = events(await ask(app, body=SHORT | {"stream": True}))
            assert last["error"]["code"] == "unavailable"
            health = await ask(app, "/health")
            assert (health.status_code, health.json()["replicas"]) == (200, {"0": "does not serve", "1": "ok"})
            for _ in range(3):
                assert (await ask(app, body=SHORT)).status_code == 200
            breaking.back.set()
            await eventually(lambda: _true(len(router.serving()) == 2))

    asyncio.run(run())


def test_where_no_replica_is_left_the_answer_is_503() -> None:
    async def run() -> None:
        async with over([Breaking()]) as (app, router):
            assert "lost" in refusal(await ask(app, body=SHORT), 503)
            response = await ask(app, body=SHORT)
            assert "no replica" in refusal(response, 503)
            assert response.headers["retry-after"] == "5"
            assert (await ask(app, "/v1/models")).status_code == 503
            assert (await ask(app, "/health")).status_code == 503
            assert (await router.line("/v1/completions", SHORT))[0] == 503
            router.end_all()

    asyncio.run(run())


def test_at_the_end_nobody_is_let_in_and_what_is_under_way_hears_of_it(engines) -> None:
    async def run() -> None:
        async with serving(engines) as (app, router):
            connection = Connection(app, "/v1/completions", LONG)
            await connection.until(1)
            router.close_admission()
            assert "about to end" in refusal(await ask(app, body=SHORT), 503)
            assert (await ask(app, "/health")).status_code == 503
            assert not router.idle
            router.end_all()
            await connection.task
            assert b"the server ended" in connection.chunks[-2]
            assert connection.chunks[-1] == b"data: [DONE]\n\n"

    asyncio.run(run())
