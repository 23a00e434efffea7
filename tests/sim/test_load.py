"""What is recorded of the load: the same on both devices, and nobody is missing."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.sim import Status
from qllm.sim.replicas import ROUTERS
from qllm.traces.sessions import closed_loop
from tests.sim.test_replicas import several
from tests.worlds import limits, policies, run, step_models, traces

COLUMNS = ("first_launch", "first_token", "finish", "queueing", "running", "suspended", "preemptions", "evictions")


@settings(max_examples=60, deadline=None)
@given(traces(), policies, limits(), step_models())
def test_both_devices_record_the_same_load_and_looking_changes_nothing(trace, policy, limits, steps):
    plain = run(trace, policy, limits, steps, timeline=True)
    fast, slow = (run(trace, policy, limits, steps, load=True, step_by_step=each) for each in (False, True))
    assert plain.load is None
    assert fast.load.points == slow.load.points
    np.testing.assert_array_equal(fast.load.sent, slow.load.sent)
    assert fast.slices == slow.slices == plain.slices
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(fast, column), getattr(plain, column), err_msg=column)
    assert (fast.kv_peak, fast.passes) == (plain.kv_peak, plain.passes)


@settings(max_examples=40, deadline=None)
@given(traces(), policies, limits(), step_models())
def test_at_each_moment_everybody_in_the_system_stands_somewhere(trace, policy, limits, steps):
    result = run(trace, policy, limits, steps, load=True)
    served = result.status != Status.REJECTED
    points = {point.at: point for point in result.load.points}  # the last of each instant
    seen = 0
    for one in result.slices:
        decided = one.start - (steps.resume_s if one.first else 0)
        for at in [at for at in points if decided <= at < one.end]:
            seen += 1
            point = points[at]
            waits = np.array([point.waiting, point.ready, point.suspended])
            there = np.bincount(trace.cls[served & (result.arrival <= at) & (result.finish > at)], minlength=3)
            assert waits.sum() + one.prefills + one.decodes == there.sum()
            assert ((waits >= 0) & (waits <= there)).all()
            assert 0 < point.kv_used <= result.kv_peak
    for at, point in points.items():
        if not (served & (result.arrival <= at) & (result.finish > at)).any():
            seen += 1
            assert point.kv_used == 0
            assert not any(point.waiting + point.ready + point.suspended)
    assert seen == len(points) or steps.suspend_s  # a request may come while a pass is put aside


@settings(max_examples=25, deadline=None)
@given(traces(), st.sampled_from(["fcfs", "qllm", "slack"]), limits(), step_models(), st.integers(2, 3),
       st.sampled_from(ROUTERS), st.booleans())  # fmt: skip
def test_each_gpu_has_a_load_of_its_own(trace, name, limits, steps, n, router, closed):
    sessions = closed_loop(2, np.full(len(trace), 0.001)) if closed else None
    fast, slow = (
        run(trace, several(name, n), limits, steps, router=router, sessions=sessions, load=True, step_by_step=each)
        for each in (False, True)
    )
    for replica in range(n):
        mine = [[point for point in each.load.points if point.replica == replica] for each in (fast, slow)]
        assert mine[0] == mine[1]
        assert [point.at for point in mine[0]] == sorted(point.at for point in mine[0])
    served = fast.status != Status.REJECTED
    np.testing.assert_array_equal(np.isnan(fast.load.sent), ~served)
    assert (fast.load.sent[served] >= fast.arrival[served]).all()
    assert (fast.load.sent[served] <= fast.first_launch[served]).all()
    if router != "shared_queue":
        np.testing.assert_array_equal(fast.load.sent[served], fast.arrival[served])
