"""Limits: bodies, queues, keys; overload is answered at once, the less urgent first."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qllm.executor import Engine
from qllm.server.admission import Admission, longest_token
from qllm.server.body import parse
from qllm.server.errors import ApiError
from qllm.server.protocol import AT_ONCE, ChatRequest, CompletionRequest, DetokenizeRequest
from qllm.server.settings import ServerSettings
from tests.server.connection import Connection
from tests.server.worlds import WAIT_S, ask, client, complete, refusal, server, wait_for

SMALL = {
    "ls": {"priority": 0, "max_waiting": 4, "max_waiting_tokens": 100},
    "be": {"priority": 1, "max_waiting": 2, "max_waiting_tokens": 50},
}


def test_the_less_urgent_class_is_turned_away_first() -> None:
    admission = Admission(ServerSettings.model_validate({"classes": SMALL}))
    admission.enter("ls", [10, 10])
    with pytest.raises(ApiError, match="too many requests wait") as caught:
        admission.check("be")
    assert caught.value.status == 429
    assert caught.value.headers()["Retry-After"] == "1"
    tickets = admission.enter("ls", [10, 10])
    with pytest.raises(ApiError):
        admission.check("ls")
    tickets[0].started()
    with pytest.raises(ApiError, match="prompt tokens"):
        admission.check("ls", tokens=71)
    admission.check("ls", tokens=70)


def test_what_waits_less_urgently_turns_no_urgent_request_away() -> None:
    admission = Admission(ServerSettings.model_validate({"classes": SMALL}))
    admission.enter("be", [25, 25])
    admission.check("ls", 4, 100)


@given(
    st.lists(st.tuples(st.sampled_from(["ls", "be"]), st.integers(1, 3), st.integers(1, 60)), max_size=30), st.data()
)
def test_counts_come_back_to_nothing(wishes, data) -> None:
    admission = Admission(ServerSettings.model_validate({"classes": SMALL}))
    tickets = []
    for class_, many, tokens in wishes:
        try:
            tickets += admission.enter(class_, [tokens] * many)
        except ApiError:
            continue
        assert admission.waiting[class_] <= SMALL[class_]["max_waiting"]
        if tickets and data.draw(st.booleans()):
            ticket = data.draw(st.sampled_from(tickets))
            ticket.started() if data.draw(st.booleans()) else ticket.left()
    for ticket in tickets:
        ticket.left()
    assert (admission.open, admission.waiting, admission.waiting_tokens) == (0, {"ls": 0, "be": 0}, {"ls": 0, "be": 0})


def test_overload_is_answered_with_429_while_urgent_requests_get_in(engine: Engine) -> None:
    app = server(engine, classes=SMALL)

    async def run() -> None:
        long = {"prompt": "Hi", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        running = [Connection(app, "/v1/completions", long) for _ in range(1)]
        for connection in running:
            await connection.until(1)
        too_many = {"prompt": "Hi", "n": 3, "priority": 1}
        async with client(app) as http:
            turned_away = await http.post("/v1/completions", json=too_many)
            served = await http.post("/v1/completions", json=too_many | {"priority": 0})
        assert refusal(turned_away, 429).startswith("too many requests wait")
        assert int(turned_away.headers["retry-after"]) >= 1
        assert served.status_code == 200
        for connection in running:
            await connection.leave()

    asyncio.run(run())
    assert app.state.service.idle


def test_a_body_that_is_too_long_is_refused_before_it_is_read(engine: Engine) -> None:
    app = server(engine, max_body_bytes=1000)
    refusal(complete(app, "a" * 1000), 413)

    async def chunks():
        for _ in range(100):
            yield b" " * 100

    async def run() -> httpx.Response:
        async with client(app) as http:
            return await http.post("/v1/completions", content=chunks())

    refusal(asyncio.run(run()), 413)
    assert complete(app).status_code == 200


def test_a_body_that_does_not_come_is_given_up(engine: Engine) -> None:
    app = server(engine, body_timeout=0.05)

    async def run() -> None:
        connection = Connection(app, "/v1/completions", b"{")
        connection._sent = True  # nothing of it comes
        await connection.task
        assert connection.status == 408

    asyncio.run(run())


LONGEST = 256 * 8  #: characters that fit into 256 tokens, of which the longest is <|turn|>


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a" * (LONGEST + 1)}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "a" * (LONGEST + 1)]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * LONGEST}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 257}, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 256}]},
            "messages",
        ),
        ("/tokenize", {"prompt": "a" * (LONGEST + 1)}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * LONGEST}]}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": ""}] * 257}, "messages"),
    ],
)
def test_a_text_that_has_no_room_is_refused_before_the_tokenizer_sees_it(
    engine: Engine, monkeypatch, path, body, param
) -> None:
    app = server(engine, max_prompt_tokens=256)
    assert app.state.service.max_prompt_characters == LONGEST

    def never(*_, **__) -> None:
        raise AssertionError("it was called")

    for name in ("encode", "apply_chat_template"):
        monkeypatch.setattr(engine.tokenizer, name, never)
    response = ask(app, path, body)
    refusal(response, 400, param)
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_tokenizer_that_drops_text_bounds_no_characters(engine: Engine) -> None:
    assert longest_token(engine.tokenizer) == len("<|turn|>")
    assert longest_token(None) is None
    words = Tokenizer(models.WordLevel({"t2": 0, "a": 1, "b": 2}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert longest_token(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t2")) is None


def test_the_most_characters_can_be_set(engine: Engine) -> None:
    app = server(engine, max_prompt_characters=5)
    assert complete(app, "abcde", max_tokens=1).status_code == 200
    assert "6 characters; allowed: 5" in refusal(complete(app, "abcdef", max_tokens=1), 400, "prompt")


def test_a_short_text_does_not_wait_for_a_long_one(engine: Engine) -> None:
    app = server(engine, max_prompt_characters=1 << 20)
    service, come = app.state.service, threading.Event()

    async def run() -> None:
        long = asyncio.create_task(service.in_thread(lambda: come.wait(WAIT_S), 1 << 20))
        await asyncio.sleep(0)  # it is the first one
        async with client(app) as http:
            served = await http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 1})
        assert served.status_code == 200
        assert not long.done()
        come.set()
        assert await long

    asyncio.run(run())


FULL_OF_MISTAKES: list[tuple[type[BaseModel], dict[str, Any]]] = [
    *((CompletionRequest, {"prompt": [odd] * 20_000}) for odd in (1.5, {}, None, [1.5])),
    (CompletionRequest, {"prompt": [[1.5] * 20_000]}),
    (CompletionRequest, {"prompt": "a", "stop": [1] * 20_000}),
    (CompletionRequest, {"prompt": "a", "stop_token_ids": ["1"] * 20_000}),
    (CompletionRequest, {"prompt": "a", "logit_bias": {str(i): 1000 for i in range(20_000)}}),
    (CompletionRequest, {"prompt": "a", "stream_options": {f"key{i}": 1 for i in range(20_000)}}),
    (ChatRequest, {"messages": [{}] * 20_000}),
    (ChatRequest, {"messages": [{"role": "user", "content": "a"} | {f"key{i}": 1 for i in range(20_000)}]}),
    (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "image"}] * 20_000}]}),
    (DetokenizeRequest, {"tokens": [-1] * 20_000}),
]


@pytest.mark.parametrize(("model", "body"), FULL_OF_MISTAKES)
def test_a_body_full_of_mistakes_is_refused_at_the_first_ones(model, body) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= AT_ONCE
    with pytest.raises(ApiError) as told:
        parse(model, body)
    assert len(str(told.value)) < 200


def test_biases_are_checked_in_parts_and_kept_as_a_whole() -> None:
    biases = {str(i): i / 100 for i in range(3 * AT_ONCE + 1)}
    assert CompletionRequest(prompt="a", logit_bias=biases).logit_bias == biases
    assert CompletionRequest(prompt="a", logit_bias={}).logit_bias == {}
    assert CompletionRequest(prompt="a", logit_bias=None).logit_bias is None
    with pytest.raises(ApiError, match="logit_bias"):
        parse(CompletionRequest, {"prompt": "a", "logit_bias": biases | {"-1": 0}})


def test_too_many_prompts_are_refused_before_they_are_looked_at(engine: Engine) -> None:
    app = server(engine, max_prompts=3)
    assert "4 prompts" in refusal(ask(app, "/v1/completions", {"prompt": [[1], ["odd"], [1], [1]]}), 400, "prompt")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b'"text"', b"\xff", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"[" * 100_000),
        *(b'{"max_tokens": ' + b"9" * 5000 + b"}", b'{"\\ud800": 1}'),
    ],
)
def test_what_is_no_json_object_is_refused(engine: Engine, body) -> None:
    app = server(engine)

    async def run() -> httpx.Response:
        async with client(app) as http:
            return await http.post("/v1/completions", content=body)

    refusal(asyncio.run(run()), 400)


def test_keys_are_asked_for_where_there_are_any(engine: Engine) -> None:
    app = server(engine, api_keys=[{"key": "secret-one", "class_name": "be"}, {"key": "secret-two"}])
    assert refusal(complete(app), 401) == "the API key is missing or unknown"
    body = {"prompt": "a", "max_tokens": 1}
    refusal(ask(app, "/v1/completions", body, Authorization="Bearer wrong"), 401)
    refusal(ask(app, "/v1/completions", body, Authorization="Basic secret-one"), 401)
    told = ask(app, "/v1/completions", body, Authorization="Bearer secret-one")
    assert told.json()["service_tier"] == "flex"
    refusal(ask(app, "/v1/completions", body | {"priority": 0}, Authorization="Bearer secret-one"), 403, "priority")
    assert ask(app, "/v1/completions", body, Authorization="Bearer secret-two").json()["service_tier"] == "default"
    refusal(ask(app, "/v1/models"), 401)
    refusal(ask(app, "/metrics"), 401)
    assert ask(app, "/health").status_code == 200


def rejections(app) -> dict[tuple[str, str], float]:
    """(class, reason) -> how often, as /metrics tells."""
    told = app.state.service.meter.rejections.collect()[0].samples
    return {(s.labels["class"], s.labels["reason"]): s.value for s in told if s.name.endswith("_total")}


def test_each_refusal_is_counted_once_whoever_refuses(engine: Engine) -> None:
    app = server(engine, api_keys=[{"key": "secret-one"}])
    key = {"Authorization": "Bearer secret-one"}
    asked = [
        (401, "invalid_api_key", lambda: ask(app, "/v1/models")),
        (404, "not_found", lambda: ask(app, "/v1/embeddings", {"input": "a"}, **key)),
        (405, "405", lambda: ask(app, "/v1/completions", **key)),
        (400, "400", lambda: ask(app, "/status?after=never", **key)),
        (400, "unknown_field", lambda: ask(app, "/v1/completions", {"prompt": "a", "odd": 1}, **key)),
        (404, "model_not_found", lambda: ask(app, "/v1/models/other", **key)),
        (500, "ZeroDivisionError", lambda: ask(app, "/broken", **key)),
    ]

    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError

    counted: dict[tuple[str, str], float] = {}
    for status, reason, refuse in asked:
        assert refuse().status_code == status
        counted["", reason] = 1
        assert rejections(app) == counted
    assert ask(app, "/v1/models", **key).status_code == 200
    assert rejections(app) == counted


def test_a_method_that_does_not_exist_is_answered_with_those_that_do(engine: Engine) -> None:
    assert ask(server(engine), "/v1/completions").headers["allow"] == "POST"


def test_request_ids_go_in_and_out(engine: Engine) -> None:
    app = server(engine)
    assert ask(app, "/health", **{"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = {ask(app, "/nothing", **{"X-Request-Id": given}).headers["x-request-id"] for given in ("", "a b", "x" * 200)}
    assert len(made) == 3
    assert all(len(one) == 32 for one in made)
    told = ask(app, "/v1/completions", {"prompt": "a", "max_tokens": 1}, **{"X-Request-Id": "mine-2"})
    assert told.json()["id"] == "cmpl-mine-2"


def test_no_text_of_a_prompt_is_logged_or_told(engine: Engine, caplog) -> None:
    caplog.set_level("DEBUG")
    app = server(engine)
    for fields in ({}, {"temperature": "0"}, {"max_tokens": 10**6}, {"stop": [""]}):
        response = complete(app, "hush hush", **fields)
        assert "hush" not in response.text
    assert "hush" not in ask(app, "/v1/completions", {"prompt": {"hush": "hush"}}).text
    wait_for(lambda: "200 in" in caplog.text)
    assert "hush" not in caplog.text


def test_what_does_not_exist_is_answered_in_the_same_format(engine: Engine) -> None:
    app = server(engine)
    refusal(ask(app, "/v1/embeddings", {"input": "a"}), 404)
    refusal(ask(app, "/v1/completions"), 405)


def test_no_other_origin_is_let_in(engine: Engine) -> None:
    told = ask(server(engine), "/v1/models", Origin="https://elsewhere.example")
    assert not any(name.startswith("access-control") for name in told.headers)
