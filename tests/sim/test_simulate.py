"""The simulator: the fast device is exact, nothing is lost, time adds up."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.scheduler import Limits, Pass, Policy, Request, RequestTooLarge, Scheduler, SchedulerError, make_policy
from qllm.sim import Routing, Status, isolated_ttft, simulate, uniform
from qllm.sim.passes import GpuModel
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import TICK, PassCostModel
from qllm.traces.step_times.testing import affine_timings
from tests.worlds import limits, policies, run, step_models, traces

COLUMNS = ("first_launch", "first_token", "finish", "queueing", "running", "suspended", "preemptions", "evictions")


def test_a_decode_pass_that_is_stopped_as_soon_as_it_may_be_is_not_repeated_unasked():
    """The ninth LS request, a part of whose prompt filled up a pass, waits while as many as fit a pass decode."""
    n = 12
    outputs, classes = np.ones(n, int), np.zeros(n, int)
    prompts = outputs.copy()
    outputs[[5, 7]], classes[6], prompts[8] = 7, 1, 8
    trace = RequestTrace(np.zeros(n), prompts, outputs, classes, ("ls", "be"))
    limits = Limits(max_seqs=2, max_batched_tokens=8, kv_blocks=14, block_size=4)
    steps = PassCostModel(affine_timings(layers=2, experts=2, top_k=1), max_step=1e-4)
    fast, slow = (
        run(trace, make_policy("qllm", fill_tokens=16), limits, steps, timeline=True, step_by_step=each)
        for each in (False, True)
    )
    assert any(one.suspended and one.decodes == 2 for one in slow.slices)
    assert fast.slices == slow.slices


@settings(max_examples=250, deadline=None)
@given(traces(), policies, limits(), step_models(), st.integers(0, 3))
def test_fast_device_gives_the_schedule_of_the_step_by_step_device(trace, policy, limits, steps, seed):
    fast = run(trace, policy, limits, steps, seed=seed, timeline=True)
    slow = run(trace, policy, limits, steps, seed=seed, timeline=True, step_by_step=True)
    assert fast.slices == slow.slices
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(fast, column), getattr(slow, column), err_msg=column)
    assert fast.makespan == slow.makespan
    assert fast.passes == slow.passes


@settings(max_examples=150, deadline=None)
@given(traces(), policies, limits(), step_models(), st.sampled_from([None, 0.011]))
def test_passes_that_are_not_asked_about_are_those_that_asking_gives(trace, policy, limits, steps, until):
    """Nobody looks at each pass, so the fast device runs many at a time, up to whatever may change a decision."""
    fast, slow = (run(trace, policy, limits, steps, until=until, step_by_step=each) for each in (False, True))
    for column in (*COLUMNS, "status"):
        np.testing.assert_array_equal(getattr(fast, column), getattr(slow, column), err_msg=column)
    assert (fast.makespan, fast.kv_peak) == (slow.makespan, slow.kv_peak)
    assert fast.passes == slow.passes


def test_a_policy_with_answers_of_its_own_is_asked_each_time_unless_it_says_that_it_is_steady():
    steps = PassCostModel(affine_timings(layers=2, experts=4))
    trace = RequestTrace(np.zeros(1), np.array([5]), np.array([40]), np.zeros(1, int), ("ls",))

    class Asked(type(make_policy("qllm"))):
        """Counts the questions."""

        asked = 0

        def select(self, s, batch, now):
            self.asked += 1
            super().select(s, batch, now)

    class Steady(Asked):
        steady = True

    class Relabelled(Steady):
        granularity = "layer"

        def level(self, r):
            return 0

    class Restless(Steady):
        predicts = True

    asked = {}
    for kind in (Asked, Steady, Relabelled, Restless):
        policy = kind()
        assert run(trace, policy, Limits(), steps).passes == 40
        asked[kind] = policy.asked
    assert asked[Asked] == asked[Restless] == 41
    assert asked[Steady] == asked[Relabelled] < 10


def test_what_is_kept_of_experts_is_bounded(monkeypatch):
    trace = RequestTrace(np.zeros(1), np.array([5]), np.array([40]), np.zeros(1, int), ("ls",))
    results = []
    for kept in (1 << 17, 3):
        monkeypatch.setattr("qllm.sim.passes._KEPT", kept)
        results.append(run(trace, make_policy("fcfs"), Limits(), PassCostModel(affine_timings(layers=2, experts=4))))
    assert results[0].makespan == results[1].makespan


class Patient(Policy):
    """A waiting LS prompt stops what runs once it has waited for `wait_s`: nothing happens at that moment."""

    granularity = "expert"

    def __init__(self, wait_s: float):
        self.wait_s = wait_s

    def due(self, s: Scheduler) -> float:
        first = s.waiting.peek(0)
        return math.inf if first is None else first.arrival + self.wait_s

    def preempts(self, s: Scheduler, running: Pass, now: float) -> bool:
        return running.prefill_level > 0 and now >= self.due(s) and s.can_prefill(0)

    def recheck_at(self, s: Scheduler, running: Pass, now: float) -> float:
        return self.due(s) if self.due(s) > now else math.inf


class Hasty(Patient):
    """Wants to be asked again at once, or before, or a moment later than any clock tells."""

    def __init__(self, wait_s: float, again_s: float):
        super().__init__(wait_s)
        self.again_s = again_s

    def recheck_at(self, s: Scheduler, running: Pass, now: float) -> float:
        return now + self.again_s


class Shy(Policy):
    """One waiting LS prompt stops what runs, two do not: a second one may come before the point is reached."""

    granularity = "expert"

    def preempts(self, s: Scheduler, running: Pass, now: float) -> bool:
        return running.prefill_level > 0 and s.waiting.count(0) == 1 and s.can_prefill(0)


HASTY = [Hasty(1e-4, again_s) for again_s in (0.0, -1.0, 1e-12, -math.inf)]
CHANGING = [Shy(), Patient(0.0), Patient(1e-4), Patient(1e-2), *HASTY]


@settings(max_examples=100, deadline=None)
@given(traces(), st.sampled_from(CHANGING), limits(), step_models())
def test_policies_that_change_their_mind_decide_alike_on_both_devices(trace, policy, limits, steps):
    fast, slow = (
        run(trace, policy, limits, steps, timeline=True, step_by_step=step_by_step) for step_by_step in (False, True)
    )
    assert fast.slices == slow.slices


def test_a_pass_goes_on_where_what_stopped_it_has_changed_its_mind():
    """The second LS prompt comes before the first has stopped the pass, and then it does not stop."""
    steps = PassCostModel(affine_timings(layers=1, experts=2), max_step=1e-6)
    limits = Limits(max_batched_tokens=64)
    for second, suspended in ((1.5e-6, False), (1.0, True)):
        arrivals = np.array([0.0, 1e-6, second])
        trace = RequestTrace(arrivals, np.array([60, 5, 5]), np.ones(3, int), np.array([1, 0, 0]), ("ls", "be"))
        result = run(trace, Shy(), limits, steps, timeline=True)
        assert result.slices is not None
        assert result.slices[0].suspended == suspended


def test_a_policy_that_changes_with_time_is_asked_again_when_it_said():
    """LS comes at 1 us and stops the pass after 2 ms of waiting, at the first point from then on."""
    steps = PassCostModel(affine_timings(layers=9, experts=9), max_step=1e-6)
    trace = RequestTrace(np.array([0.0, 1e-6]), np.array([60, 5]), np.ones(2, int), np.array([1, 0]), ("ls", "be"))
    result = run(trace, Patient(2e-3), Limits(max_batched_tokens=64), steps, timeline=True)
    assert result.slices is not None
    assert result.slices[0].suspended
    assert 2e-3 <= result.slices[0].end <= 2.5e-3


@settings(max_examples=150, deadline=None)
@given(traces(), policies, limits(), step_models())
def test_conservation_causality_and_time_that_adds_up(trace, policy, limits, steps):
    """I1, I2, I3, I6 and queueing + running + suspended = turnaround."""
    result = run(trace, policy, limits, steps, timeline=True)
    finished = result.status == Status.FINISHED
    rejected = result.status == Status.REJECTED
    assert (finished | rejected).all()
    assert set(np.flatnonzero(rejected)) == set(result.reasons)
    assert np.isnan(result.finish[rejected]).all()
    f = finished
    assert (result.first_launch[f] >= result.arrival[f]).all()
    assert (result.first_token[f] > result.first_launch[f]).all()
    assert (result.finish[f] >= result.first_token[f]).all()
    total = result.queueing + result.running + result.suspended
    np.testing.assert_array_equal(total[f], (result.finish - result.arrival)[f])
    assert (result.queueing[f] >= 0).all()
    assert (result.running[f] > 0).all()
    slices = result.slices
    assert slices is not None
    costs = steps.suspend_s + steps.resume_s
    for a, b in pairwise(slices):
        assert a.end <= b.start
        in_system = (result.arrival <= a.end) & (result.finish > a.end) & f
        assert not in_system.any() or b.start - a.end <= costs + TICK, "idle while somebody is in the system"


@settings(max_examples=100, deadline=None)
@given(traces(), policies, limits(), step_models())
def test_running_and_suspended_time_are_those_of_the_timeline(trace, policy, limits, steps):
    """The device's busy time, counted from the slices, is what the passes' requests were charged."""
    result = run(trace, policy, limits, steps, timeline=True)
    slices = result.slices
    assert slices is not None
    launched = {s.pass_id for s in slices}
    assert launched == set(range(result.passes))
    for pass_id in launched:
        mine = [s for s in slices if s.pass_id == pass_id]
        assert [s.suspended for s in mine] == [True] * (len(mine) - 1) + [False]
        assert all(a.last == b.first for a, b in pairwise(mine)), "a step was lost or done twice"
    assert (result.suspended > 0).any() == any(s.suspended for s in slices)


@settings(max_examples=60, deadline=None)
@given(traces(), policies, limits(), step_models(), st.floats(0.0, 0.05))
def test_a_simulation_that_is_stopped_leaves_the_rest_unfinished(trace, policy, limits, steps, until):
    result = run(trace, policy, limits, steps, until=until + 1e-6)
    whole = run(trace, policy, limits, steps)
    done = result.status == Status.FINISHED
    np.testing.assert_array_equal(result.finish[done], whole.finish[done])
    assert not (whole.finish[result.status == Status.UNFINISHED] < until).any()


def world(n: int = 200, seed: int = 1, rate: float = 100.0) -> RequestTrace:
    rng = np.random.default_rng(seed)
    return RequestTrace(
        np.cumsum(rng.exponential(1 / rate, n)),
        rng.integers(1, 200, n),
        rng.integers(1, 30, n),
        rng.integers(0, 3, n),
        ("ls", "be", "bulk"),
    )


@pytest.mark.parametrize("name", ["fcfs", "priority", "chunked", "layer", "qllm", "hybrid"])
def test_same_arguments_same_result_and_seed_matters(name):
    steps = PassCostModel(affine_timings(layers=3, experts=8))
    limits = Limits(max_seqs=8, max_batched_tokens=256, kv_blocks=1000)
    a, b = (run(world(), make_policy(name), limits, steps, seed=5) for _ in range(2))
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(a, column), getattr(b, column))
    other = run(world(), make_policy(name), limits, steps, seed=6)
    assert (a.finish != other.finish).any()


@pytest.mark.parametrize("name", ["layer", "qllm", "hybrid"])
@pytest.mark.parametrize("resume_s", [0.0, 5e-3])
def test_arrivals_at_the_very_instant_of_a_point_and_while_a_pass_comes_back(name, resume_s):
    """An LS prompt that arrives exactly at a preemption point stops the pass there.

    One that arrives while a suspended pass is being brought back lets it reach its next point. Both devices agree.
    """
    steps = PassCostModel(affine_timings(layers=3, experts=4, resume_s=resume_s, suspend_s=1e-4), max_step=1e-6)
    limits = Limits(max_batched_tokens=64)
    gpu = GpuModel(steps, Routing(uniform(steps), 2, seed=0), make_policy(name).granularity)
    scheduler = Scheduler(make_policy(name), limits)
    scheduler.add(Request(0, 60, 3, 1), 0.0)
    p = scheduler.next(0.0)
    assert p is not None
    run_ = gpu.start(p)
    at = [run_.end(point) for point in steps.points(run_.cost, gpu.granularity).tolist()]
    for point in (0, 1, len(at) - 1):
        for second in (at[point] + 0.5 * resume_s + 2e-3, at[point] + 1e-3):
            trace = RequestTrace(
                np.array([0.0, at[point], second]),
                np.array([60, 5, 5]),
                np.array([3, 1, 1]),
                np.array([1, 0, 0]),
                ("ls", "be"),
            )
            fast = run(trace, make_policy(name), limits, steps, timeline=True)
            slow = run(trace, make_policy(name), limits, steps, timeline=True, step_by_step=True)
            assert fast.slices == slow.slices
            assert fast.slices is not None
            assert fast.slices[0].suspended
            assert fast.slices[0].end == at[point]
            assert all(s.last > s.first for s in fast.slices), "a pass came back and did nothing"


def test_lone_request_takes_its_isolated_ttft():
    steps = PassCostModel(affine_timings(layers=4, experts=8, expert=(50e-6, 1e-6)))
    limits = Limits(max_batched_tokens=64)
    for prompt in (1, 63, 64, 65, 200):
        trace = RequestTrace(np.array([0.5]), np.array([prompt]), np.array([2]), np.array([0]), ("ls",))
        result = run(trace, make_policy("qllm"), limits, steps)
        alone = isolated_ttft(np.array([prompt]), limits=limits, steps=steps)
        assert result.first_token[0] - 0.5 == pytest.approx(alone[0], rel=0.05)  # routing at its mean against drawn
        assert result.queueing[0] == 0


@pytest.mark.parametrize("max_step", [math.inf, 500e-6], ids=["one group", "groups"])
@pytest.mark.parametrize("table", ["uniform", "skewed"])
def test_isolated_ttft_is_the_mean_over_routings(table, max_step):
    """Not the time of the mean routing, which lies a third above it where few tokens meet many experts."""
    timings = affine_timings(layers=8, experts=32, top_k=4, expert=(50e-6, 1e-7))
    steps = PassCostModel(timings, max_step=max_step)
    rows = np.random.default_rng(0).dirichlet(np.full(32, 2.0), 8) if table == "skewed" else np.full((8, 32), 1 / 32)
    for prompt in (1, 4, 16, 100, 1000):
        trace = RequestTrace(np.arange(40.0), np.full(40, prompt), np.full(40, 1), np.zeros(40, int), ("ls",))
        result = simulate(
            trace, priorities={"ls": 0}, policy=make_policy("fcfs"), limits=Limits(), steps=steps, popularity=rows
        )
        alone = isolated_ttft(np.array([prompt]), limits=Limits(), steps=steps, popularity=rows)
        assert (result.first_token - trace.arrival).mean() == pytest.approx(alone[0], rel=0.03)


def test_isolated_ttft_where_a_share_is_nothing_or_everything():
    """Experts 0 and 1 get all tokens, expert 3 none: nothing is left to chance."""
    steps = PassCostModel(affine_timings(layers=2, experts=4, top_k=2), max_step=60e-6)
    rows = np.array([[0.5, 0.5, 0.0, 0.0]] * 2)
    cost = steps.cost([(None, 10, 0)], 0, 0, 1)
    exact = steps.total(cost, steps.experts_of_pass(cost, np.array([[10, 10, 0, 0]] * 2)))
    assert isolated_ttft(np.array([10]), limits=Limits(), steps=steps, popularity=rows)[0] == pytest.approx(exact)


@pytest.mark.parametrize("step_by_step", [False, True])
def test_a_pass_that_finds_the_device_idle_takes_wake_s_more(step_by_step):
    """The second of two requests waits for the first, which woke the device up; nobody wakes it at time 0."""
    arrivals = np.array([0.0, 1.0, 1.0, 2.0])
    ones = np.ones(4, dtype=int)
    trace = RequestTrace(arrivals, 8 * ones, ones, 0 * ones, ("ls",))
    took = []
    for wake_s in (0.0, 0.01):
        steps = PassCostModel(affine_timings(wake_s=wake_s))
        result = run(trace, make_policy("fcfs"), Limits(max_seqs=1), steps, step_by_step=step_by_step, timeline=True)
        took.append(np.array([s.end - s.start for s in result.slices or []]))
    assert took[1] - took[0] == pytest.approx([0.0, 0.01, 0.0, 0.01], abs=1e-8)


@pytest.mark.parametrize("step_by_step", [False, True])
def test_requests_that_cannot_fit_are_rejected_with_a_reason(step_by_step):
    trace = RequestTrace(np.zeros(2), np.array([1000, 10]), np.array([1, 1]), np.array([0, 0]), ("ls",))
    steps = PassCostModel(affine_timings())
    result = run(trace, make_policy("fcfs"), Limits(kv_blocks=10), steps, step_by_step=step_by_step)
    assert result.status.tolist() == [Status.REJECTED, Status.FINISHED]
    assert "1000 prompt" in result.reasons[0]
    assert "63 KV blocks" in result.reasons[0]


def test_the_peak_of_the_kv_is_that_of_the_moment_with_most_blocks_in_use():
    """Two requests together hold 3 + 2 of 20 blocks at the end of the first one; the third comes when both are gone."""
    columns = np.array([0.0, 0.0, 9.0]), np.array([40, 20, 50]), np.array([5, 5, 5]), np.array([0, 0, 0])
    result = run(
        RequestTrace(*columns, ("ls",)), make_policy("fcfs"), Limits(kv_blocks=20), PassCostModel(affine_timings())
    )
    assert result.kv_peak == 5 / 20


@settings(max_examples=60, deadline=None)
@given(step_models(), st.integers(1, 40), st.sampled_from(["layer", "expert"]), st.floats(0, 1.1), st.integers(0, 99))
def test_a_pass_finds_its_points_without_looking_at_all_its_steps(steps, prompt, granularity, share, done):
    gpu = GpuModel(steps, Routing(uniform(steps), steps.timings.top_k), granularity)
    scheduler = Scheduler(make_policy("qllm"), Limits())
    scheduler.add(Request(0, prompt, 5), 0.0)
    p = scheduler.next(0.0)
    assert p is not None
    run_ = gpu.start(p)
    ends = np.cumsum(steps.times(run_.cost, run_.counts()))
    assert [*(run_.end(step) for step in range(run_.steps_in_all() - 1)), run_.total] == ends.tolist()
    run_.done, elapsed = min(done, len(ends) - 1), share * run_.total
    points = [i for i in steps.points(run_.cost, granularity).tolist() if i >= run_.done and ends[i] >= elapsed]
    assert run_.next_point(elapsed) == (points[0] + 1 if points else len(ends))


def test_expert_queues_hold_what_a_suspended_pass_has_left():
    """An LS prompt stops a BE prefill between two experts; the queues hold exactly the tokens of those not yet run."""
    steps = PassCostModel(affine_timings(layers=2, experts=4, top_k=2), max_step=1e-6)
    gpu = GpuModel(steps, Routing(uniform(steps), 2), "expert")
    scheduler = Scheduler(make_policy("qllm"), Limits())
    scheduler.add(Request(0, 50, 5, 1), 0.0)
    p = scheduler.next(0.0)
    assert p is not None
    run_ = gpu.start(p)
    seen = set()
    for point in steps.points(run_.cost, gpu.granularity).tolist():
        run_.done = point + 1
        layer, stage, index = run_.place()
        queues = run_.expert_queues()
        if stage == "experts":
            seen.add(index)
            expected = copy.copy(run_.counts()[layer])
            expected[:index] = 0
            assert queues.tolist() == expected.tolist()
            if index == 0:
                assert queues.sum() == 50 * 2
        else:
            assert queues.sum() == 0
    assert seen == {0, 1, 2, 3}


def test_scheduler_rejects_what_can_never_fit_and_ids_in_use():
    scheduler = Scheduler(make_policy("fcfs"), Limits(kv_blocks=4, block_size=4))
    scheduler.add(Request(1, 10, 6), 0.0)
    with pytest.raises(RequestTooLarge, match="take 5 KV blocks"):
        scheduler.add(Request(2, 10, 8), 0.0)
    with pytest.raises(SchedulerError, match="id is in the system"):
        scheduler.add(Request(1, 1, 1), 0.0)


def test_requests_that_nobody_serves_are_an_error(monkeypatch):
    monkeypatch.setattr(Scheduler, "next", lambda self, now: None)
    trace = RequestTrace(np.array([0.0]), np.array([3]), np.array([2]), np.array([0]), ("ls",))
    steps = PassCostModel(affine_timings(layers=2, experts=4, top_k=2))
    with pytest.raises(SchedulerError, match="stands still at 0 s with 1 requests"):
        simulate(trace, priorities={"ls": 0}, policy=make_policy("fcfs"), limits=Limits(), steps=steps)
    result = simulate(trace, priorities={"ls": 0}, policy=make_policy("fcfs"), limits=Limits(), steps=steps, until=1.0)
    assert result.status.tolist() == [Status.UNFINISHED]
