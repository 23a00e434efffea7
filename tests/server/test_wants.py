"""What policies may go by besides the priority: bounds and the tenant of a request, over HTTP."""

from __future__ import annotations

import pytest

from qllm.executor import Engine
from qllm.scheduler import RequestShed
from qllm.server.errors import from_engine
from tests.server.worlds import complete, refusal, server

CLASSES = {
    "ls": {"priority": 0, "max_waiting": 9, "max_waiting_tokens": 999, "max_ttft": 2.0, "max_tpot": 0.05},
    "be": {"priority": 1, "max_waiting": 9, "max_waiting_tokens": 999},
}


@pytest.fixture
def asked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, str]]:
    """(max_ttft_s, max_tpot_s, tenant) of each request that the scheduler was given."""
    found = []
    original = engine.scheduler.add

    def spy(r, now):
        found.append((r.max_ttft_s, r.max_tpot_s, r.tenant))
        original(r, now)

    monkeypatch.setattr(engine.scheduler, "add", spy)
    return found


def test_the_request_says_so_or_its_class_does(engine: Engine, asked) -> None:
    app = server(engine, classes=CLASSES)
    for fields in ({}, {"max_tpot": 0.2, "user": "ann"}, {"service_tier": "flex"}, {"user": "x" * 999}):
        assert complete(app, max_tokens=1, **fields).status_code == 200
    none = float("inf")
    assert asked == [(2.0, 0.05, ""), (2.0, 0.2, "ann"), (none, none, ""), (2.0, 0.05, "x" * 256)]


@pytest.mark.parametrize("value", [0, -1, "1", 1e10])
@pytest.mark.parametrize("name", ["max_ttft", "max_tpot"])
def test_bounds_that_are_none(engine: Engine, name: str, value: object) -> None:
    assert name in refusal(complete(server(engine), **{name: value}), 400, name)


def test_who_is_turned_away_by_the_policy_may_come_again() -> None:
    error = from_engine(RequestShed("request 1: it would wait"))
    assert (error.status, error.code) == (429, "shed")
    assert error.headers() == {"Retry-After": "5"}
