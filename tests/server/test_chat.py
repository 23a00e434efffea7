"""Chat completions: templates, deltas, and the fields that only they have."""

from __future__ import annotations

import pytest

from qllm.executor import Engine
from tests.server.worlds import ask, chat, complete, events, refusal, server


@pytest.fixture(scope="module")
def app(engine: Engine):
    return server(engine)


def test_a_chat_is_the_completion_of_its_template(app) -> None:
    body = chat(app, "hi").json()
    assert body["object"] == "chat.completion"
    ids = ask(app, "/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()["tokens"]
    text = complete(app, ids, max_tokens=8).json()["choices"][0]["text"]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert body["usage"]["prompt_tokens"] == len(ids)


def test_a_stream_of_deltas_adds_up(app) -> None:
    whole = chat(app).json()["choices"][0]
    told = events(chat(app, stream=True))
    assert {e["object"] for e in told} == {"chat.completion.chunk"}
    deltas = [e["choices"][0]["delta"] for e in told]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == whole["message"]["content"]
    assert told[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == "length"


def test_parts_of_text_are_one_text(app) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 8}
    assert ask(app, "/v1/chat/completions", body).json()["choices"] == chat(app).json()["choices"]


def test_a_final_message_is_continued(app, engine: Engine) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 4, "continue_final_message": True}
    told = ask(app, "/v1/chat/completions", body).json()
    text = engine.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert text.endswith("well")
    ids = engine.tokenizer.encode(text)
    assert told["usage"]["prompt_tokens"] == len(ids)
    both = body | {"add_generation_prompt": True}
    refusal(ask(app, "/v1/chat/completions", both), 400, "continue_final_message")


def test_without_a_bound_it_goes_on_to_the_end_of_the_context(app, engine: Engine) -> None:
    small = server(engine, model_name="tiny")
    small.state.service.max_model_len = 40
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "ignore_eos": True}
    assert ask(small, "/v1/chat/completions", body).json()["usage"]["total_tokens"] == 40


def test_max_completion_tokens_is_max_tokens(app) -> None:
    assert chat(app, max_tokens=None, max_completion_tokens=8).json()["choices"] == chat(app).json()["choices"]
    refusal(chat(app, max_completion_tokens=9), 400, "max_completion_tokens")


def test_log_probabilities_come_with_the_deltas(app) -> None:
    whole = chat(app, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in whole] == [2] * 8
    told = events(chat(app, logprobs=True, top_logprobs=2, stream=True))
    assert [entry for e in told for entry in e["choices"][0]["logprobs"]["content"]] == whole
    refusal(chat(app, top_logprobs=2), 400, "top_logprobs")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "poem"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(app, fields, param) -> None:
    response = chat(app, **fields)
    refusal(response, 400, response.json()["error"]["param"] if param is None else param)


def test_a_template_that_refuses_is_the_clients_mistake(app, engine: Engine) -> None:
    before = engine.tokenizer.chat_template
    engine.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    try:
        refusal(chat(app), 400, "messages")
        engine.tokenizer.chat_template = None
        refusal(chat(app), 400)
    finally:
        engine.tokenizer.chat_template = before
