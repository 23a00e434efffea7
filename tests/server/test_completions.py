"""Text completions: what is accepted is honoured."""

from __future__ import annotations

import json

import pytest

from qllm.executor import Engine
from tests.server.worlds import ask, complete, events, refusal, server


@pytest.fixture(scope="module")
def app(engine: Engine):
    return server(engine)


def expected(engine: Engine, prompt: str = "Hello", **settings) -> tuple[list[int], str]:
    done = engine.submit(prompt, **{"max_new_tokens": 16, **settings}).result()
    return done.tokens, done.text


def test_a_completion_is_what_the_engine_gives(app, engine: Engine) -> None:
    tokens, text = expected(engine)
    body = complete(app, return_token_ids=True).json()
    assert body["object"] == "text_completion"
    choice = body["choices"][0]
    assert (choice["text"], choice["token_ids"]) == (text, tokens)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}


def test_text_and_its_token_ids_are_the_same_prompt(app, engine: Engine) -> None:
    ids = engine.tokenizer.encode("Hello")
    assert complete(app, ids).json()["choices"] == complete(app).json()["choices"]


def test_a_stream_adds_up_to_the_answer(app) -> None:
    whole = complete(app, max_tokens=12, return_token_ids=True).json()
    told = events(complete(app, max_tokens=12, return_token_ids=True, stream=True))
    assert "".join(e["choices"][0]["text"] for e in told) == whole["choices"][0]["text"]
    assert [t for e in told for t in e["choices"][0]["token_ids"]] == whole["choices"][0]["token_ids"]
    assert [e["choices"][0]["finish_reason"] for e in told] == [None] * 12 + ["length"]


def test_usage_comes_in_the_last_chunk_or_in_all(app) -> None:
    last = events(complete(app, max_tokens=3, stream=True, stream_options={"include_usage": True}))
    assert last[-1]["choices"] == []
    assert last[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert {e["usage"] is None for e in last[:-1]} == {True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    every = events(complete(app, max_tokens=3, stream=True, stream_options=options))
    assert [e["usage"]["completion_tokens"] for e in every] == [1, 2, 3, 3, 3]


def test_stop_strings_end_the_text_before_them(app) -> None:
    text = complete(app, max_tokens=32).json()["choices"][0]["text"]
    stop = text[9:11]
    at = text.index(stop)
    for fields in ({"stop": stop}, {"stop": ["never to be seen", stop]}):
        choice = complete(app, max_tokens=32, **fields).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text[:at], "stop")
    told = events(complete(app, max_tokens=32, stop=stop, stream=True))
    assert "".join(e["choices"][0]["text"] for e in told) == text[:at]


def test_stop_tokens_end_it_and_count(app, engine: Engine) -> None:
    tokens, _ = expected(engine)
    first = next(i for i, token in enumerate(tokens) if tokens.index(token) == i and i > 2)
    body = complete(app, stop_token_ids=[tokens[first]], return_token_ids=True).json()
    assert body["choices"][0]["token_ids"] == tokens[: first + 1]
    assert body["choices"][0]["finish_reason"] == "stop"
    later = complete(app, stop_token_ids=[tokens[first]], min_tokens=first + 2, max_tokens=24).json()
    assert later["usage"]["completion_tokens"] >= first + 2


def test_a_seed_gives_the_same_draws_and_each_choice_its_own(app) -> None:
    drawn = [complete(app, temperature=1.5, seed=7, n=3, max_tokens=8).json()["choices"] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert [c["index"] for c in drawn[0]] == [0, 1, 2]
    assert len({c["text"] for c in drawn[0]}) == 3
    assert complete(app, temperature=1.5, seed=8, max_tokens=8).json()["choices"][0]["text"] == drawn[0][1]["text"]


def test_top_k_of_one_is_greedy(app) -> None:
    greedy = complete(app).json()["choices"]
    assert complete(app, temperature=1, top_k=1).json()["choices"] == greedy
    assert complete(app, temperature=1, top_p=1e-9).json()["choices"] == greedy


def test_several_prompts_are_answered_in_order(app) -> None:
    prompts = ["one", "two two", "three"]
    alone = [complete(app, prompt, max_tokens=5).json()["choices"][0]["text"] for prompt in prompts]
    body = complete(app, prompts, max_tokens=5, n=2).json()
    assert [c["text"] for c in body["choices"]] == [text for text in alone for _ in range(2)]
    assert body["usage"]["completion_tokens"] == 30


def test_log_probabilities_belong_to_the_tokens(app) -> None:
    choice = complete(app, max_tokens=4, logprobs=2, return_token_ids=True).json()["choices"][0]
    told = choice["logprobs"]
    assert [len(told[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [4] * 4
    assert all(
        max(top.values()) == chosen for top, chosen in zip(told["top_logprobs"], told["token_logprobs"], strict=True)
    )


def test_penalties_and_bias_change_what_is_chosen(app) -> None:
    plain = complete(app, return_token_ids=True).json()["choices"][0]["token_ids"]
    biased = complete(app, logit_bias={str(plain[0]): -100}, return_token_ids=True).json()["choices"][0]["token_ids"]
    assert plain[0] not in biased
    assert complete(app, logit_bias={"70": 100}, return_token_ids=True).json()["choices"][0]["token_ids"] == [70] * 16


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"guided_json": {}}, "guided_json"),
        ({"nonsense": 1}, "nonsense"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["a"] * 9}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"logit_bias": {"70": 101}}, "logit_bias.70"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(app, fields, param) -> None:
    assert param.split(".")[0] in refusal(complete(app, **fields), 400, param) or param == "max_tokens"


def test_fields_that_ask_for_nothing_are_taken(app) -> None:
    nothing = {"echo": False, "best_of": 1, "suffix": None, "logit_bias": None, "presence_penalty": 0, "user": "me"}
    assert complete(app, **nothing).json()["choices"] == complete(app).json()["choices"]


def test_a_model_that_is_not_served_is_not_found(app) -> None:
    refusal(complete(app, model="another"), 404, "model")
    assert complete(app, model="tiny").status_code == 200


def test_a_prompt_that_is_too_long_is_refused(app) -> None:
    refusal(complete(app, [5] * 4096), 400, "prompt")
    refusal(complete(app, [5] * 4095, max_tokens=2), 400, "max_tokens")
    assert complete(app, [5] * 200, max_tokens=1).status_code == 200


def test_tokenize_and_detokenize_are_each_others_inverse(app) -> None:
    text = "Grüße, 世界 🎉"
    told = ask(app, "/tokenize", {"prompt": text}).json()
    assert told["count"] == len(told["tokens"])
    assert ask(app, "/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": text}
    assert ask(app, "/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()["count"] > 2
    refusal(ask(app, "/detokenize", {"tokens": [10**6]}), 400, "tokens")
    refusal(ask(app, "/tokenize", {}), 400, "prompt")


def test_the_text_is_what_its_format_says(app) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    text = complete(app, response_format=wanted, max_tokens=200).json()["choices"][0]["text"]
    assert isinstance(json.loads(text)["a"], bool)
    plain = complete(app).json()["choices"]
    assert complete(app, response_format={"type": "text"}).json()["choices"] == plain
    refusal(complete(app, response_format={"type": "poem"}), 400, "response_format")


def test_stop_tokens_of_the_model_can_be_ignored_and_shown(app, engine: Engine) -> None:
    (end,) = engine.tokenizer.encode("<|turn|>")
    always = {"logit_bias": {str(end): 100}, "max_tokens": 5}
    body = complete(app, **always).json()
    assert (body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"]) == ("stop", 1)
    body = complete(app, **always, min_tokens=3).json()
    assert body["usage"]["completion_tokens"] >= 3
    choice = complete(app, **always, ignore_eos=True).json()["choices"][0]
    assert (choice["finish_reason"], choice["text"]) == ("length", "")
    shown = complete(app, **always, ignore_eos=True, skip_special_tokens=False).json()["choices"][0]
    assert shown["text"] == "<|turn|>" * 5


def test_offsets_of_a_stream_are_those_of_the_answer(app) -> None:
    whole = complete(app, max_tokens=8, logprobs=1).json()["choices"][0]["logprobs"]
    told = events(complete(app, max_tokens=8, logprobs=1, stream=True))
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [item for e in told for item in e["choices"][0]["logprobs"][name]] == whole[name]


def test_the_checkpoint_gives_the_defaults_and_the_client_overrides_them(engine: Engine, monkeypatch) -> None:
    monkeypatch.setattr(engine, "_defaults", {"top_k": 1})
    app = server(engine)
    greedy = complete(app).json()["choices"]
    assert complete(app, temperature=None).json()["choices"] == greedy
    assert complete(app, temperature=2, top_k=0, seed=3).json()["choices"] != greedy


def test_an_answer_that_takes_too_long_is_given_up(engine: Engine) -> None:
    app = server(engine, request_seconds=1e-6)
    refusal(complete(app, max_tokens=3000, ignore_eos=True), 504)
    assert app.state.service.idle


def test_prompts_may_be_bounded_below_the_context(engine: Engine) -> None:
    app = server(engine, max_prompt_tokens=10)
    assert complete(app, [5] * 10).status_code == 200
    assert "10 of them" in refusal(complete(app, [5] * 11), 400, "prompt")
