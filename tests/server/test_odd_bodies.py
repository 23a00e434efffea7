"""Whatever a body holds: an answer comes, it is no 5xx, a 4xx has OpenAI's format, and the engine is empty after."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qllm.executor import Engine
from qllm.server.protocol import NEUTRAL, ChatRequest, CompletionRequest
from tests.server.worlds import WAIT_S, client, is_empty, server, wait_for

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(0, 1),
    st.text(max_size=20),
)
ANYTHING = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, *NEUTRAL, "unknown"})
#: What is likely to get past the first checks.
FITTING: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(1, 12),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 400),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**64 - 1),
    "n": st.integers(1, 4),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1, max_size=3), max_size=4),
    "stop_token_ids": st.lists(st.integers(0, 400), max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, 400).map(str), st.floats(-100, 100), max_size=3),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 100),
    "min_tokens": st.integers(0, 12),
    "ignore_eos": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "priority": st.integers(-5, 5),
    "service_tier": st.sampled_from(["auto", "default", "priority", "flex"]),
    "logprobs": st.integers(0, 20) | st.booleans(),
    "user": st.text(max_size=5),
}
FIELDS = st.fixed_dictionaries({}, optional=FITTING)
ODDITIES = st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=2)
PROMPTS = st.text(max_size=30) | st.lists(st.integers(-1, 400), max_size=12) | ANYTHING
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.text(max_size=9), "content": st.text(max_size=9)}), max_size=3)


@pytest.fixture(scope="module")
def app(engine: Engine):
    return server(engine, max_prompts=8)


def check(response: httpx.Response) -> None:
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"server_error"' not in response.text
    else:
        assert response.json()["choices"]


def send(app, path: str, body: Any = None, content: bytes | None = None) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client(app) as http, asyncio.timeout(WAIT_S):
            return await http.post(path, json=body) if content is None else await http.post(path, content=content)

    return asyncio.run(run())


quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@quick
@given(PROMPTS, FIELDS, ODDITIES)
def test_completions(app, engine: Engine, prompt, fields, odd) -> None:
    body = {"prompt": prompt, "max_tokens": 4, **fields, **odd}
    if isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 64:
        body["max_tokens"] = 64
    check(send(app, "/v1/completions", body))
    wait_for(lambda: is_empty(engine))
    assert app.state.service.idle


@quick
@given(MESSAGES | ANYTHING, FIELDS, ODDITIES)
def test_chats(app, engine: Engine, messages, fields, odd) -> None:
    body = {"messages": messages, **fields, **odd, "max_tokens": 4}
    check(send(app, "/v1/chat/completions", body))
    wait_for(lambda: is_empty(engine))
    assert app.state.service.idle


@quick
@given(st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]), st.binary(max_size=60))
def test_bytes(app, path, content) -> None:
    response = send(app, path, content=content)
    assert 400 <= response.status_code < 500


@quick
@given(st.sampled_from(["/tokenize", "/detokenize"]), ANYTHING, ANYTHING, ANYTHING)
def test_tokens(app, path, prompt, tokens, messages) -> None:
    given = {"prompt": prompt, "tokens": tokens, "messages": messages}
    body = {name: value for name, value in given.items() if value is not None}
    response = send(app, path, body)
    assert response.status_code < 500


@quick
@given(st.text(max_size=60))
def test_text_survives_tokenize_and_detokenize(app, text) -> None:
    ids = send(app, "/tokenize", {"prompt": text}).json()["tokens"]
    assert send(app, "/detokenize", {"tokens": ids}).json() == {"prompt": text}
