"""Batches over a real engine: lines in class BE, beside requests that do not wait for them."""

import asyncio
import json

from tests.server.batch_support import CHAT
from tests.server.worlds import client, eventually, is_empty, server

COMPLETIONS = "/v1/completions"


def lines(url: str, bodies: list[dict]) -> bytes:
    rows = [{"custom_id": f"c{i}", "method": "POST", "url": url, "body": body} for i, body in enumerate(bodies)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


async def run_batch(http, url: str, content: bytes) -> dict:
    """Upload, create, wait for the end."""
    file = (await http.post("/v1/files", files={"file": ("in", content)}, data={"purpose": "batch"})).json()["id"]
    asked = {"input_file_id": file, "endpoint": url, "completion_window": "1h"}
    batch = (await http.post("/v1/batches", json=asked)).json()

    async def ended() -> bool:
        batch.update((await http.get(f"/v1/batches/{batch['id']}")).json())
        return batch["status"] in ("completed", "failed", "expired", "cancelled")

    await eventually(ended)
    return batch


async def read(http, file: str | None) -> dict[str, dict]:
    if file is None:
        return {}
    text = (await http.get(f"/v1/files/{file}/content")).text
    return {line["custom_id"]: line["response"] for line in map(json.loads, text.splitlines())}


def test_a_batchs_answers_are_those_of_the_same_requests_alone(engine, tmp_path):
    app = server(engine, batches={"folder": str(tmp_path)})
    bodies = [{"prompt": f"Number {i}", "max_tokens": 4, "temperature": 0} for i in range(12)]

    async def run():
        async with app.router.lifespan_context(app), client(app) as http:
            alone = [(await http.post(COMPLETIONS, json=body)).json()["choices"][0]["text"] for body in bodies]
            batch = await run_batch(http, COMPLETIONS, lines(COMPLETIONS, bodies))
            assert batch["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
            answers = await read(http, batch["output_file_id"])
            assert [answers[f"c{i}"]["body"]["choices"][0]["text"] for i in range(12)] == alone
            told = (await http.get("/metrics")).text
            assert 'qllm:requests_total{class="be",outcome="length"} 12.0' in told
            assert 'qllm:requests_total{class="ls",outcome="length"} 12.0' in told

    asyncio.run(run())
    assert is_empty(engine)


def test_a_line_that_cannot_be_served_stands_in_the_error_file(engine, tmp_path):
    app = server(engine, batches={"folder": str(tmp_path)})
    good = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    bodies = [good, {**good, "max_tokens": 10**6}, {**good, "tools": [{"type": "function"}]}, {**good, "model": "none"}]

    async def run():
        async with app.router.lifespan_context(app), client(app) as http:
            batch = await run_batch(http, CHAT, lines(CHAT, bodies))
            assert batch["request_counts"] == {"total": 4, "completed": 1, "failed": 3}
            assert (await read(http, batch["output_file_id"]))["c0"]["body"]["object"] == "chat.completion"
            errors = await read(http, batch["error_file_id"])
            assert {id: one["status_code"] for id, one in errors.items()} == {"c1": 400, "c2": 400, "c3": 404}
            assert errors["c2"]["body"]["error"]["param"] == "tools"

    asyncio.run(run())


def test_lines_that_find_the_server_full_are_answered_later(engine, tmp_path):
    classes = {"ls": {"priority": 0, "max_waiting": 64, "max_waiting_tokens": 10**6}}
    classes["be"] = {"priority": 1, "max_waiting": 1, "max_waiting_tokens": 10**6}
    app = server(engine, classes=classes, batches={"folder": str(tmp_path), "in_flight": 8, "longest_wait": 0.2})
    bodies = [{"prompt": "Hello", "max_tokens": 2} for _ in range(16)]

    async def run():
        async with app.router.lifespan_context(app), client(app) as http:
            batch = await run_batch(http, COMPLETIONS, lines(COMPLETIONS, bodies))
            assert batch["request_counts"] == {"total": 16, "completed": 16, "failed": 0}

    asyncio.run(run())


def test_a_server_that_ends_leaves_its_lines_to_the_next_one(engine, tmp_path):
    bodies = [{"prompt": "Hello", "max_tokens": 30, "ignore_eos": True} for _ in range(20)]

    async def first() -> str:
        app = server(engine, batches={"folder": str(tmp_path), "in_flight": 2})
        async with app.router.lifespan_context(app), client(app) as http:
            content = lines(COMPLETIONS, bodies)
            file = (await http.post("/v1/files", files={"file": ("in", content)}, data={"purpose": "batch"})).json()
            asked = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "1h"}
            id = (await http.post("/v1/batches", json=asked)).json()["id"]

            async def some() -> bool:
                return (await http.get(f"/v1/batches/{id}")).json()["request_counts"]["completed"] > 2

            await eventually(some)
            return id

    async def second(id: str) -> None:
        app = server(engine, batches={"folder": str(tmp_path)})
        async with app.router.lifespan_context(app), client(app) as http:

            async def ended() -> bool:
                return (await http.get(f"/v1/batches/{id}")).json()["status"] == "completed"

            await eventually(ended)
            batch = (await http.get(f"/v1/batches/{id}")).json()
            assert batch["request_counts"]["completed"] == 20
            assert len(await read(http, batch["output_file_id"])) == 20

    id = asyncio.run(first())
    asyncio.run(second(id))
    assert is_empty(engine)
