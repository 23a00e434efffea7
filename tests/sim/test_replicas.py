"""Several GPUs behind a router, and clients that wait for their answers: properties, and what queueing theory says."""

from __future__ import annotations

from itertools import pairwise
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.scheduler import Limits, make_policy
from qllm.sim import Status
from qllm.sim.replicas import ROUTERS
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.sessions import Sessions, closed_loop
from tests.sim.test_queueing_theory import LIMITS, STEPS, assert_agrees, service
from tests.worlds import limits, policies, run, step_models, traces

COLUMNS = ("arrival", "first_launch", "first_token", "finish", "queueing", "running", "suspended", "preemptions")


def several(name: str, n: int):
    return [make_policy(name) for _ in range(n)]


@settings(max_examples=25, deadline=None)
@given(traces(), policies, limits(), step_models(), st.sampled_from(ROUTERS))
def test_one_gpu_behind_any_router_but_a_queue_is_that_gpu_alone(trace, policy, limits, steps, router):
    alone, behind = run(trace, policy, limits, steps), None
    if router != "shared_queue":
        behind = run(trace, [policy], limits, steps, router=router)
        for column in COLUMNS:
            np.testing.assert_array_equal(getattr(alone, column), getattr(behind, column), err_msg=column)
        assert behind.replica is None


@settings(max_examples=25, deadline=None)
@given(traces(), st.sampled_from(["fcfs", "qllm", "hybrid", "slack"]), limits(), step_models(), st.integers(2, 4),
       st.sampled_from(ROUTERS), st.booleans())  # fmt: skip
def test_everybody_is_served_once_whichever_device_simulates_it(trace, name, limits, steps, n, router, closed):
    sessions = closed_loop(2, np.full(len(trace), 0.001)) if closed else None
    fast, slow = (
        run(trace, several(name, n), limits, steps, router=router, sessions=sessions, timeline=True, step_by_step=step)
        for step in (False, True)
    )
    served = fast.status != Status.REJECTED  # a class may be kept out of the blocks that are left for urgent ones
    assert (fast.status[served] == Status.FINISHED).all()
    assert ((fast.replica[served] >= 0) & (fast.replica[served] < n)).all()
    assert (fast.replica[~served] == -1).all()
    for column in (*COLUMNS, "status", "replica"):
        np.testing.assert_array_equal(getattr(fast, column), getattr(slow, column), err_msg=column)
    assert sorted(fast.slices) == sorted(slow.slices)
    assert {one.replica for one in fast.slices} == {*fast.replica[served].tolist()}
    for replica in range(n):  # one pass at a time on each
        mine = sorted(one for one in fast.slices if one.replica == replica)
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(mine))
    if router == "round_robin" and not closed and served.all():
        np.testing.assert_array_equal(fast.replica, np.arange(len(trace)) % n)


@settings(max_examples=30, deadline=None)
@given(traces(), st.integers(1, 4), st.sampled_from([0.0, 0.01]), step_models())
def test_a_client_of_a_closed_loop_has_one_request_at_a_time(trace, clients, think, steps):
    result = run(trace, make_policy("qllm"), Limits(), steps, sessions=closed_loop(clients, np.full(len(trace), think)))
    gap = result.arrival[clients:] - result.finish[:-clients]
    np.testing.assert_allclose(gap, think, atol=1e-6)
    np.testing.assert_array_equal(
        result.arrival[:clients], run(trace, make_policy("fcfs"), Limits(), steps).arrival[:clients]
    )


def test_what_follows_a_request_that_is_refused_comes_too():
    trace = RequestTrace(np.zeros(3), [40, 9, 8], [1, 1, 1], [0, 0, 0], ("ls",))
    sessions = Sessions(np.array([-1, 0, 1]), np.zeros(3))
    result = run(trace, make_policy("fcfs"), Limits(kv_blocks=2), STEPS, sessions=sessions)
    assert result.status.tolist() == [Status.REJECTED, Status.FINISHED, Status.FINISHED]
    queued = run(trace, several("fcfs", 2), Limits(kv_blocks=2, max_seqs=1), STEPS, router="shared_queue")
    assert queued.status.tolist() == [Status.REJECTED, Status.FINISHED, Status.FINISHED]
    assert queued.replica.tolist()[0] == -1


def test_who_waits_in_the_shared_queue_and_cannot_be_served_makes_room_for_the_next():
    trace = RequestTrace(np.zeros(3), [8, 40, 8], [1, 1, 1], [0, 0, 0], ("ls",))
    result = run(trace, several("fcfs", 1), Limits(kv_blocks=2, max_seqs=1), STEPS, router="shared_queue")
    assert result.status.tolist() == [Status.FINISHED, Status.REJECTED, Status.FINISHED]


def test_urgent_requests_pass_others_in_the_shared_queue_and_it_is_counted_where_a_run_stops():
    trace = RequestTrace(np.array([0.0, 1e-5, 2e-5]), [400, 400, 20], [1, 1, 1], [1, 1, 0], ("ls", "be"))
    result = run(trace, several("fcfs", 1), LIMITS, STEPS, router="shared_queue")
    assert result.first_launch.argsort().tolist() == [0, 2, 1]
    seen = []
    run(
        trace, several("fcfs", 1), LIMITS, STEPS, router="shared_queue", stop=lambda _, __, there: seen.append({*there})
    )
    assert seen == [set(), {0}, {0, 1}]
    some = run(trace, several("fcfs", 2), LIMITS, STEPS, router="shared_queue", until=3e-5)
    assert (some.status == Status.UNFINISHED).all()


def test_an_ls_request_goes_where_the_least_is_as_urgent():
    trace = RequestTrace(np.arange(4) * 1e-5, [50, 400, 50, 50], [20, 20, 1, 1], [0, 1, 0, 1], ("ls", "be"))
    for router, expected in (("ls_aware", [0, 1, 1, 0]), ("least_loaded", [0, 1, 0, 1])):
        result = run(trace, several("qllm", 2), Limits(), STEPS, router=router)
        assert result.replica.tolist() == expected, router


@pytest.mark.parametrize(
    ("policy", "more", "told"),
    [
        ([], {}, "a policy for each GPU"),
        ([make_policy("fcfs")] * 2, {}, "an object of its own"),
        (several("fcfs", 2), {"router": "random"}, "router is 'random'; allowed: round_robin"),
        (several("fcfs", 2), {"routing": object()}, "recorded routing is that of one GPU"),
        (several("fcfs", 2), {"sessions": closed_loop(1, np.zeros(2))}, "sessions are of 2 requests, the trace has 1"),
        (several("fcfs", 2), {"prefix_cache": True}, "prefix_cache: the trace says not which prompts begin alike"),
    ],
)
def test_what_makes_no_fleet_is_refused(policy, more, told):
    with pytest.raises(ValueError, match=told):
        run(RequestTrace([0.0], [1], [1], [0], ("ls",)), policy, LIMITS, STEPS, **more)


@pytest.mark.parametrize(
    ("follows", "think"), [([0], [0.0]), ([-2], [0.0]), ([-1], [-1.0]), ([-1], [np.nan]), ([-1], [])]
)
def test_sessions_that_cannot_be_are_refused(follows, think):
    with pytest.raises(ValueError, match=r"follows|think_s"):
        Sessions(np.array(follows), np.array(think))
    with pytest.raises(ValueError, match="at least 1"):
        closed_loop(0, np.zeros(1))


# ---- queueing theory: exponential service, from prompts of exponential length -----------------------------------


def exponential(n: int, rate: float, mean_prompt: float, seed: int) -> RequestTrace:
    rng = np.random.default_rng(seed)
    prompts = np.maximum(1, np.rint(rng.exponential(mean_prompt, n))).astype(int)
    return RequestTrace(np.cumsum(rng.exponential(1 / rate, n)), prompts, np.ones(n, int), np.zeros(n, int), ("ls",))


MEAN_PROMPT = 2000  # so long that what a pass takes whatever its length hardly counts
ONE = Limits(max_seqs=1, max_batched_tokens=10**6)


def mean_service() -> float:
    seconds = [float(service(n)) for n in (MEAN_PROMPT, 2 * MEAN_PROMPT)]
    assert abs(seconds[1] / seconds[0] - 2) < 0.04, "service grows with the prompt"
    return seconds[0]


def test_a_shared_queue_is_m_m_c():
    """Erlang C: mean waiting = P(all busy) S / (c - a), with a = lambda S."""
    c, load, s = 3, 0.6, mean_service()
    a = c * load
    full = a**c / factorial(c) / (1 - load)
    busy = full / (sum(a**k / factorial(k) for k in range(c)) + full)
    sample = []
    for seed in range(24):
        trace = exponential(4000, a / s, MEAN_PROMPT, seed)
        result = run(trace, several("fcfs", c), ONE, STEPS, router="shared_queue")
        sample.append((result.first_launch - result.arrival)[400:].mean())
    assert_agrees(np.array(sample), busy * s / (c - a), slack=0.03 * busy * s / (c - a))


def test_a_closed_loop_has_the_throughput_of_mean_value_analysis():
    """One exponential server and thinking clients: R(n) = S (1 + Q(n - 1)), X(n) = n / (R(n) + Z), Q = X R."""
    clients, s = 5, mean_service()
    think, queue, throughput = 4 * s, 0.0, 0.0
    for n in range(1, clients + 1):
        response = s * (1 + queue)
        throughput = n / (response + think)
        queue = throughput * response
    sample = []
    for seed in range(12):
        trace = exponential(3000, 1.0, MEAN_PROMPT, seed)
        trace = RequestTrace(np.zeros(3000), trace.prompt_tokens, trace.output_tokens, trace.cls, trace.classes)
        thinks = np.random.default_rng((seed, 1)).exponential(think, 3000)
        result = run(trace, make_policy("fcfs"), ONE, STEPS, sessions=closed_loop(clients, thinks))
        ends = np.sort(result.finish)[300:]
        sample.append((len(ends) - 1) / (ends[-1] - ends[0]))
    assert_agrees(np.array(sample), throughput, slack=0.03 * throughput)
