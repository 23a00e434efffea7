"""The class of a request: what names it, what is answered, and what cannot be honoured."""

from __future__ import annotations

import pytest

from qllm.executor import Engine
from qllm.scheduler import Fcfs, Hybrid
from qllm.server.errors import ApiError
from qllm.server.settings import ApiKey, ServerSettings
from qllm.server.urgency import Urgencies
from tests.server.worlds import ask, complete, events, refusal, server

SETTINGS = ServerSettings()


def resolve(policy=None, **given):
    given = {"priority": None, "tier": None, **given}
    found = Urgencies(SETTINGS, policy or Hybrid()).resolve(**given)
    return found.class_, found.priority, found.tier


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("ls", 0, "default")),
        ({"tier": "auto"}, ("ls", 0, "default")),
        ({"tier": "default"}, ("ls", 0, "default")),
        ({"tier": "priority"}, ("ls", 0, "priority")),
        ({"tier": "flex"}, ("be", 1, "flex")),
        ({"priority": 0}, ("ls", 0, "default")),
        ({"priority": -3}, ("ls", -3, "default")),
        ({"priority": 7}, ("be", 7, "flex")),
        ({"suffix": ":be"}, ("be", 1, "flex")),
        ({"header": "be"}, ("be", 1, "flex")),
        ({"header": "be", "tier": "flex", "suffix": ":be", "priority": 3}, ("be", 3, "flex")),
        ({"header": "be", "tier": "auto"}, ("be", 1, "flex")),
        ({"key": ApiKey(key="12345678", class_name="be")}, ("be", 1, "flex")),
        ({"key": ApiKey(key="12345678", class_name="be"), "tier": "auto"}, ("be", 1, "flex")),
        ({"key": ApiKey(key="12345678", class_name="ls"), "tier": "flex"}, ("be", 1, "flex")),
        ({"key": ApiKey(key="12345678")}, ("ls", 0, "default")),
    ],
)
def test_a_class_is_named_in_many_ways(given, expected) -> None:
    assert resolve(**given) == expected


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        ({"tier": "scale"}, 400, "service_tier"),
        ({"header": "gold"}, 400, "X-QLLM-Class"),
        ({"tier": "flex", "priority": 0}, 400, "service_tier"),
        ({"suffix": ":ls", "header": "be"}, 400, "model"),
        ({"key": ApiKey(key="12345678", class_name="be"), "priority": 0}, 403, "priority"),
        ({"key": ApiKey(key="12345678", class_name="be"), "tier": "priority"}, 403, "service_tier"),
        ({"policy": Fcfs(), "priority": 1}, 400, "priority"),
        ({"policy": Fcfs(), "priority": -1}, 400, "priority"),
        ({"policy": Fcfs(), "tier": "flex"}, 400, "service_tier"),
    ],
)
def test_what_cannot_be_honoured_is_answered(given, status, param) -> None:
    with pytest.raises(ApiError) as caught:
        resolve(**given)
    assert (caught.value.status, caught.value.param) == (status, param)


def test_the_answer_tells_the_tier_that_was_used(engine: Engine) -> None:
    app = server(engine)
    assert complete(app, service_tier="flex").json()["service_tier"] == "flex"
    assert complete(app, service_tier="auto").json()["service_tier"] == "default"
    assert complete(app, model="tiny:be").json()["service_tier"] == "flex"
    told = events(complete(app, service_tier="priority", stream=True))
    assert {event["service_tier"] for event in told} == {"priority"}
    refusal(complete(app, priority=2**40), 400, "priority")


def test_the_engine_gets_the_priority(engine: Engine, monkeypatch) -> None:
    app, seen, submit = server(engine), [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda *a, **k: seen.append(k["priority"]) or submit(*a, **k))
    body = {"prompt": "a", "max_tokens": 1}
    ask(app, "/v1/completions", body | {"priority": 9})
    ask(app, "/v1/completions", body, **{"X-QLLM-Class": "be"})
    ask(app, "/v1/completions", body)
    assert seen == [9, 1, 0]


def test_models_are_listed_with_their_suffixes(engine: Engine) -> None:
    app = server(engine)
    names = [model["id"] for model in ask(app, "/v1/models").json()["data"]]
    assert names == ["tiny", "tiny:ls", "tiny:be"]
    assert ask(app, "/v1/models/tiny:be").json()["id"] == "tiny:be"
    refusal(ask(app, "/v1/models/other"), 404, "model")
