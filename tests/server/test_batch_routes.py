"""The openai client's calls for files and batches, against the routes with an answer that is made up."""

import asyncio
import json
import tempfile
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qllm.config.yaml_lines import ConfigError
from qllm.server.batches.routes import batch_routes
from qllm.server.batches.service import Batches
from qllm.server.batches.settings import BatchSettings
from qllm.server.errors import ApiError
from tests.server.batch_support import CHAT, jsonl


async def answer(path, body):
    return 200, {"object": "chat.completion", "i": body["i"]}


@asynccontextmanager
async def serving(folder, answer=answer, **settings):
    """(openai client, httpx client) of an app that has nothing but these routes."""
    batches = Batches(str(folder), BatchSettings(**settings))
    app = FastAPI()
    app.include_router(batch_routes(batches))

    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server/v1/")
    client = openai.AsyncOpenAI(api_key="none", base_url="http://server/v1", http_client=http, max_retries=0)
    batches.start(answer)
    try:
        yield client, http
    finally:
        await client.close()
        await batches.stop()


def test_the_openai_client_uploads_runs_and_reads_a_batch(tmp_path):
    async def run():
        async with serving(tmp_path) as (client, _):
            file = await client.files.create(file=("in.jsonl", jsonl(3)), purpose="batch")
            assert (file.filename, file.bytes, file.purpose) == ("in.jsonl", len(jsonl(3)), "batch")
            batch = await client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"job": "night"}
            )
            assert (batch.object, batch.status, batch.expires_at) == ("batch", "validating", batch.created_at + 86400)
            while batch.status != "completed":
                await asyncio.sleep(0.01)
                batch = await client.batches.retrieve(batch.id)
            assert batch.metadata == {"job": "night"}
            assert batch.request_counts.model_dump() == {"total": 3, "completed": 3, "failed": 0}
            output = await client.files.content(batch.output_file_id)
            assert [json.loads(line)["custom_id"] for line in output.text.splitlines()] == ["c1", "c2", "c3"]
            with pytest.raises(openai.ConflictError, match="completed"):
                await client.batches.cancel(batch.id)

    asyncio.run(run())


def test_the_openai_client_lists_and_deletes_files(tmp_path):
    async def run():
        async with serving(tmp_path) as (client, _):
            ids = [(await client.files.create(file=(f"{i}", b"{}"), purpose="batch")).id for i in range(5)]
            assert [file.id async for file in client.files.list(limit=2)] == ids[::-1]
            assert [file.id async for file in client.files.list(limit=3, order="asc", purpose="batch")] == ids
            assert (await client.files.retrieve(ids[0])).filename == "0"
            assert (await client.files.delete(ids[0])).deleted
            with pytest.raises(openai.NotFoundError, match=ids[0]):
                await client.files.retrieve(ids[0])

    asyncio.run(run())


def test_the_openai_client_cancels_and_lists_batches(tmp_path):
    async def never(path, body):
        await asyncio.Event().wait()

    async def run():
        async with serving(tmp_path, never) as (client, _):
            file = await client.files.create(file=("in.jsonl", jsonl(3)), purpose="batch")
            made = [
                await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
                for _ in range(3)
            ]
            batch = await client.batches.cancel(made[0].id)
            assert batch.status == "cancelling"
            while batch.status != "cancelled":
                await asyncio.sleep(0.01)
                batch = await client.batches.retrieve(batch.id)
            assert [one.id async for one in client.batches.list(limit=1)] == [one.id for one in made[::-1]]

    asyncio.run(run())


def test_a_file_with_mistakes_fails_its_batch_with_the_lines(tmp_path):
    async def run():
        async with serving(tmp_path) as (client, _):
            file = await client.files.create(file=("in.jsonl", jsonl(1) + b"{\n"), purpose="batch")
            batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
            while batch.status != "failed":
                await asyncio.sleep(0.01)
                batch = await client.batches.retrieve(batch.id)
            assert [(error.code, error.line) for error in batch.errors.data] == [("invalid_json_line", 2)]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": "nothing"}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(tmp_path, change, param):
    async def run():
        async with serving(tmp_path) as (client, http):
            file = await client.files.create(file=("in.jsonl", jsonl(1)), purpose="batch")
            body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **change}
            answer = await http.post("batches", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"files": {"file": ("a", b"x" * 200_001)}, "data": {"purpose": "batch"}}, 413),
        ({"files": {"file": ("a", b"x" * 100_001)}, "data": {"purpose": "batch"}}, 413),
        ({"files": {"file": ("a", b"x")}, "data": {"purpose": "assistants"}}, 400),
        ({"files": {"file": ("a", b"x")}}, 400),
        ({"files": {"file": ("a", b"x")}, "data": {"purpose": "batch", "expires_after[anchor]": "created_at"}}, 400),
        ({"files": [("file", ("a", b"x")), ("file", ("b", b"x"))], "data": {"purpose": "batch"}}, 400),
        ({"files": {"other": ("a", b"x")}, "data": {"purpose": "batch"}}, 400),
        ({"data": {"purpose": "batch", "file": "text"}}, 400),
        ({"json": {}}, 400),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=a"}}, 400),
    ],
)
def test_an_upload_that_is_too_long_or_malformed_is_refused(tmp_path, request_, status):
    async def run():
        async with serving(tmp_path, max_file_bytes=100_000) as (_, http):
            answer = await http.post("files", **request_)
            assert answer.status_code == status, answer.text
            assert answer.json()["error"]["message"]
            assert (await http.get("files")).json()["data"] == []

    asyncio.run(run())


def test_a_folder_in_use_is_told_as_a_mistake_in_the_configuration(tmp_path):
    async def run():
        async with serving(tmp_path):
            with pytest.raises(ConfigError, match=r"^batches.folder: .* another server"):
                Batches(str(tmp_path))

    asyncio.run(run())


PART = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
PURPOSE = PART % (b"purpose", b"", b"batch")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("boundary=b", PART % (b"file", b'; filename="\xff\xfe"', b"x") + PURPOSE + b"--b--\r\n"),
        ("boundary=b", PART % (b"\xff", b"", b"\xff") + PURPOSE + b"--b--\r\n"),
        ("boundary=b; charset=klingon", PART % (b"file", b'; filename="a"', b"x") + PURPOSE + b"--b--\r\n"),
        ("boundary=b; charset=utf-16", PART % (b"file", b'; filename="a"', b"x") + PURPOSE + b"--b--\r\n"),
        ("boundary=b", PART % (b"file", b'; filename="a\x00"', b"") + PURPOSE + b"--b--"),
        ("boundary=b", b"--b\r\n\r\n--b--"),
        ("boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--"),
        ("boundary=b", PART % (b"file", b'; filename="a"', b"x" * 70_000) + PURPOSE),
        ("boundary=" + "b" * 5000, b"--b--"),
        ("boundary=", b"--b--"),
    ],
)
def test_odd_forms_are_taken_or_refused(tmp_path, kind, body):
    async def run():
        async with serving(tmp_path) as (_, http):
            headers = {"content-type": f"multipart/form-data; {kind}"}
            answer = await http.post("files", content=body, headers=headers)
            assert answer.status_code in (200, 400), answer.text
            assert (await http.get("files")).status_code == 200

    asyncio.run(run())


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from([b"--b", b"\r\n", b"--b--", PURPOSE, b'Content-Disposition: form-data; name="file"',
                                 b'; filename="a"', b":", b"x", b"\xff", b"\x00"]), max_size=12))  # fmt: skip
def test_any_form_is_taken_or_refused(tmp_path, parts):
    async def run():
        async with serving(tempfile.mkdtemp(dir=tmp_path)) as (_, http):
            headers = {"content-type": "multipart/form-data; boundary=b"}
            assert (await http.post("files", content=b"".join(parts), headers=headers)).status_code in (200, 400)

    asyncio.run(run())
