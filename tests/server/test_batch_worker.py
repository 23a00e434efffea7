"""The worker: lines trickle, overload is tried again, and neither a kill nor a full disk loses or doubles an answer."""

import asyncio
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from qllm.server.batches import worker as worker_module
from qllm.server.batches.background import BackgroundStore
from qllm.server.batches.store import Store
from qllm.server.batches.worker import Worker
from tests.server.batch_support import CHAT, answered, jsonl, results

END = ("completed", "failed", "expired", "cancelled")


class World:
    """A store, a worker and a clock that only the test moves."""

    def __init__(self, folder, answer, **settings):
        self.store = BackgroundStore(folder)
        self.time = 1000.0
        self.worker = Worker(self.store, answer, now=lambda: self.time, **{"longest_wait": 0.01, **settings})
        self.task = asyncio.create_task(self.worker.run())

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.store.close()

    async def batch(self, lines: int, window_s: float = 86400.0) -> str:
        file = await self.store.call(Store.add_file, "in", jsonl(lines), self.time)
        made = await self.store.call(Store.create, CHAT, file["id"], self.time, "24h", window_s)
        self.worker.notify()
        return made["id"]

    async def until(self, id: str, statuses=END) -> dict:
        async with asyncio.timeout(20):
            while True:
                batch = await self.store.call(Store.batch, id)
                if batch["status"] in statuses:
                    return batch
                await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch):
    monkeypatch.setattr(worker_module, "LOOK_S", 0.02)
    monkeypatch.setattr(worker_module, "FIRST_WAIT", 0.001)


async def good(path, body):
    await asyncio.sleep(0)
    return 200, {"path": path, **body}


async def never(path, body):
    await asyncio.Event().wait()


def test_lines_are_answered_at_the_batchs_endpoint(tmp_path):
    async def run():
        async with World(tmp_path, good) as world:
            id = await world.batch(50)
            batch = await world.until(id)
            assert batch["status"] == "completed"
            assert batch["request_counts"] == {"total": 50, "completed": 50, "failed": 0}
            lines = await world.store.call(results, batch["output_file_id"])
            assert [line["response"]["body"]["i"] for line in lines] == list(range(1, 51))
            assert {line["response"]["body"]["path"] for line in lines} == {CHAT}

    asyncio.run(run())


def test_no_more_lines_than_allowed_are_in_flight(tmp_path):
    now, most = 0, 0

    async def answer(path, body):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return 200, {}

    async def run():
        async with World(tmp_path, answer, in_flight=3) as world:
            ids = [await world.batch(20), await world.batch(20)]
            for id in ids:
                assert (await world.until(id))["status"] == "completed"

    asyncio.run(run())
    assert most == 3


def test_a_full_server_is_tried_again_and_other_failures_are_recorded(tmp_path):
    tries: dict[int, int] = {}

    async def answer(path, body):
        i = body["i"]
        tries[i] = tries.get(i, 0) + 1
        if i == 1 and tries[i] < 5:
            return 429 if tries[i] % 2 else 503, {}
        if i == 2:
            return 400, {"error": {"message": "too long"}}
        if i == 3:
            raise ValueError("secret")
        return 200, {}

    async def run():
        async with World(tmp_path, answer) as world:
            batch = await world.until(await world.batch(4))
            assert batch["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
            first, second = await world.store.call(results, batch["error_file_id"])
            assert first["response"]["status_code"] == 400
            assert second["error"] == {"code": "server_error", "message": "The server broke: ValueError."}

    asyncio.run(run())
    assert tries == {1: 5, 2: 1, 3: 1, 4: 1}


def test_a_batch_expires_with_the_answers_that_it_has(tmp_path):
    async def answer(path, body):
        return (200, {}) if body["i"] <= 2 else await never(path, body)

    async def run():
        async with World(tmp_path, answer, in_flight=4) as world:
            id = await world.batch(6, window_s=60.0)
            while (await world.store.call(Store.batch, id))["request_counts"]["completed"] < 2:
                await asyncio.sleep(0.005)
            world.time += 59
            await asyncio.sleep(0.1)
            assert (await world.store.call(Store.batch, id))["status"] == "in_progress"
            world.time += 1
            batch = await world.until(id)
            assert (batch["status"], batch["expired_at"]) == ("expired", 1060)
            assert len(await world.store.call(results, batch["output_file_id"])) == 2
            left = await world.store.call(results, batch["error_file_id"])
            assert [line["error"]["code"] for line in left] == ["batch_expired"] * 4
            assert not world.worker._tasks

    asyncio.run(run())


def test_a_cancelled_batch_keeps_its_answers_and_makes_room(tmp_path):
    async def answer(path, body):
        return (200, {}) if body["i"] == 1 or body.get("quick") else await never(path, body)

    async def run():
        async with World(tmp_path, answer, in_flight=2) as world:
            id = await world.batch(9)
            while (await world.store.call(Store.batch, id))["request_counts"]["completed"] < 1:
                await asyncio.sleep(0.005)
            assert (await world.store.call(Store.cancel, id, world.time))["status"] == "cancelling"
            world.worker.notify()
            batch = await world.until(id)
            assert batch["status"] == "cancelled"
            found = await world.store.call(answered, id)
            assert len(found) == 9
            assert sum(line["error"] is not None for line in found.values()) == 8
            assert (await world.until(await world.batch(1)))["status"] == "completed"

    asyncio.run(run())


def test_a_disk_without_room_delays_answers_and_loses_none(tmp_path, monkeypatch):
    real, calls = Store.answer, 0

    def answer(self, *args):
        nonlocal calls
        calls += 1
        if calls % 2:
            raise sqlite3.OperationalError("database or disk is full")
        return real(self, *args)

    monkeypatch.setattr(Store, "answer", answer)

    async def run():
        async with World(tmp_path, good) as world:
            assert (await world.until(await world.batch(10)))["request_counts"]["completed"] == 10

    asyncio.run(run())


def test_a_worker_that_is_stopped_leaves_its_lines_to_the_next(tmp_path):
    async def run():
        async with World(tmp_path, never) as world:
            id = await world.batch(5)
            await world.until(id, ("in_progress",))
            await asyncio.sleep(0.05)
        async with World(tmp_path, good) as world:
            assert (await world.until(id))["request_counts"]["completed"] == 5

    asyncio.run(run())


@pytest.mark.parametrize("status", ["validating", "finalizing", "cancelling"])
def test_a_batch_goes_on_from_whatever_status_it_was_left_in(tmp_path, status):
    store = Store(tmp_path)
    id = store.create(CHAT, store.add_file("in", jsonl(2), 1000.0)["id"], 1000.0)["id"]
    if status != "validating":
        store.validate(id, 1000.0, 10)
        for number in (1, 2):
            store.answer(id, number, 200, {})
    if status == "cancelling":
        store.cancel(id, 1000.0)
        store.finalize(id, "cancelled", 1000.0)
    if status == "finalizing":
        store.finalize(id, "completed", 1000.0)
    assert store.batch(id)["status"] == status
    store.close()

    async def run():
        async with World(tmp_path, good) as world:
            batch = await world.until(id)
            assert batch["status"] == ("cancelled" if status == "cancelling" else "completed")
            assert len(await world.store.call(answered, id)) == 2

    asyncio.run(run())


def test_after_kill_9_every_line_has_one_answer(tmp_path):
    """Killed at random moments, six times: no line is lost, and none has two answers."""
    store = Store(tmp_path)
    id = store.create(CHAT, store.add_file("in", jsonl(300), 0.0)["id"], 4e9)["id"]
    store.close()
    command = [sys.executable, "-m", "tests.server.batch_process", str(tmp_path)]
    rng = random.Random(0)
    for killed in [True] * 6 + [False]:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout is not None
            for _ in range(rng.randrange(1, 40)):
                assert process.stdout.readline()
            if not killed:
                wait_for_end(tmp_path, process)
            process.kill()
    store = Store(tmp_path)
    batch = store.batch(id)
    found = answered(store, id)
    store.close()
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 300, "completed": 270, "failed": 30}
    assert set(found) == {f"c{i}" for i in range(1, 301)}
    assert len({line["response"]["body"]["process"] for line in found.values()}) > 3


def wait_for_end(folder, process):
    """Until the batch is completed, as a second reader of the database sees it."""
    db = sqlite3.connect(folder / "batches.sqlite")
    reader = asyncio.new_event_loop()
    try:
        while db.execute("SELECT status FROM batches").fetchone()[0] != "completed":
            reader.run_until_complete(asyncio.sleep(0.02))
            assert process.poll() is None
    finally:
        reader.close()
        db.close()


@pytest.mark.parametrize("turns", range(4))
def test_a_cancel_that_comes_with_news_ends_the_worker(tmp_path, turns):
    """As when a server ends just as a line is answered."""

    async def run():
        world = World(tmp_path, good)
        await asyncio.sleep(0.05)
        world.worker.notify()
        for _ in range(turns):
            await asyncio.sleep(0)
        world.task.cancel()
        ended, _ = await asyncio.wait([world.task], timeout=20)
        world.task.cancel()
        world.store.close()
        assert ended

    asyncio.run(run())
