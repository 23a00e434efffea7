"""A run that is ended early: what it has recorded by then is what the whole run has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.scheduler import Limits, make_policy
from qllm.sim import Status
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings
from tests.worlds import limits, policies, run, traces

STEPS = PassCostModel(affine_timings(layers=2, experts=4, top_k=2), max_step=1e-3)
COLUMNS = ("arrival", "first_launch", "first_token", "finish", "queueing", "running", "suspended", "preemptions")


@settings(deadline=None)
@given(trace=traces(), policy=policies, limits=limits(), after=st.integers(0, 30))
def test_a_run_that_is_ended_is_the_beginning_of_the_whole_one(trace, policy, limits, after) -> None:
    asked: list[float] = []

    def stop(now, result, requests) -> bool:
        asked.append(now)
        assert all(r.arrival <= now for r in requests.values())
        return len(asked) > after

    whole = run(trace, policy, limits, STEPS)
    cut = run(trace, policy, limits, STEPS, stop=stop)
    if after >= len(trace):
        assert len(asked) == len(trace)
        for name in (*COLUMNS, "status"):
            np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name))
        return
    assert len(asked) == after + 1
    ended = cut.status == Status.FINISHED
    assert not ended[after:].any()
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(cut, name)[ended], getattr(whole, name)[ended])
    before = np.nan_to_num(whole.finish, nan=np.inf) < asked[-1]
    assert ended[before].all()  # what ended later may stand there too: passes end before a request enters


def test_there_is_one_way_to_end_a_run() -> None:
    trace = traces(most=2).example() if False else None
    trace = RequestTrace(np.zeros(1), np.ones(1, dtype=int), np.ones(1, dtype=int), np.zeros(1, dtype=int), ("ls",))
    with pytest.raises(ValueError, match="until or stop"):
        run(trace, make_policy("fcfs"), Limits(), STEPS, until=1.0, stop=lambda *_: False)
