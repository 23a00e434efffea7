"""Merging in cost model and simulator: what is merged, what it costs, what still waits, and that both devices agree."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qllm.scheduler import Limits, Policy, Request, Scheduler, UnknownPolicy, make_policy
from qllm.sim import Routing, uniform
from qllm.sim.merging import Merging
from qllm.sim.passes import GpuModel, SimulatedPass
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import TICK, PassCostModel
from qllm.traces.step_times.testing import affine_timings
from tests.worlds import PRIORITIES, Stack, run

LIMITS = Limits(max_seqs=6, max_batched_tokens=64, kv_blocks=200, block_size=4)
EXPERT_S, ROW_S = 50e-6, 1e-6  # f(m) = EXPERT_S + m * ROW_S


def step_model(expert_s: float = EXPERT_S, max_step: float = 1e-5, mode: str = "fused", **header) -> PassCostModel:
    timings = affine_timings(experts=8, top_k=2, expert=(expert_s, ROW_S), **header)
    return PassCostModel(timings, max_step=max_step, expert_mode=mode)


@pytest.mark.parametrize(("expert_s", "rows"), [(50e-6, 52), (4e-6, 6), (0.5e-6, 2)])
def test_as_many_rows_are_merged_as_take_twice_the_time_of_one(expert_s, rows):
    steps = step_model(expert_s)
    assert steps.merge_rows == rows
    one, most, more = steps.experts(np.array([1, rows, rows + 1]))
    assert most <= 2 * one < more


def test_what_is_merged_are_short_queues_at_experts_where_the_running_pass_has_tokens():
    steps = step_model(4e-6)
    own = np.array([3, 0, 3, 3, 200, 0])
    waiting = np.array([6, 6, 7, 0, 1, 0])
    assert steps.mergeable(own, waiting).tolist() == [True, False, False, False, True, False]
    assert steps.merged(own, [waiting, waiting]).tolist() == [15, 0, 3, 3, 202, 0]
    assert own.tolist() == [3, 0, 3, 3, 200, 0]


@pytest.mark.parametrize("mode", ["fused", "separate"])
def test_a_group_of_which_nothing_is_left_is_passed_over(mode):
    steps = step_model(max_step=200e-6, mode=mode)
    cost = steps.cost([(None, 3, 0)], 0, 0, 1)
    assert (cost.experts_per_group, cost.n_groups) == (2, 4)
    seconds = steps.group_seconds(cost, np.array([0, 0, 0, 0, 0, 0, 1, 0]))
    one = float(steps.experts(np.array(1)))
    assert seconds.tolist() == [cost.experts_base_s, 0.0, 0.0, one + cost.group_launch_s]  # of the first, its base


def stopped_prefill(steps: PassCostModel, group: int, prompt: int = 40) -> tuple[Scheduler, GpuModel, SimulatedPass]:
    """A BE prefill that an LS prompt has stopped before that group of experts in layer 0."""
    gpu = GpuModel(steps, Routing(uniform(steps), 2, seed=1), "expert")
    scheduler = Scheduler(make_policy("qllm", fill_tokens=0, merge=True), Limits())
    scheduler.add(Request(0, prompt, 2, 1), 0.0)
    p = scheduler.next(0.0)
    assert p is not None
    be = p.cursor = gpu.start(p)
    scheduler.add(Request(1, 5, 1, 0), 0.0)
    be.done = be.first_group(0) + group
    be.at = be.end(be.done - 1)
    assert be.place() == (0, "experts", group)
    assert scheduler.suspended(p, be.at)
    return scheduler, gpu, be


@pytest.mark.parametrize("group", range(8))
def test_what_was_merged_waits_no_more_and_saves_the_reading_of_its_expert(group):
    steps = step_model()
    scheduler, gpu, be = stopped_prefill(steps, group)
    before, total = be.expert_queues(), be.total
    p = scheduler.next(be.at)
    assert p is not None
    ls = gpu.start(p)
    alone, own = ls.total, ls.tokens(0).copy()
    merging = Merging(scheduler)
    merging.begin(ls)
    merged = (own > 0) & (before > 0)
    assert ls.total - alone == pytest.approx(before[merged].sum() * ROW_S, abs=20 * TICK)
    merging.end(ls, 0, None)
    assert be.expert_queues().tolist() == np.where(merged, 0, before).tolist()
    scheduler.finished(p, be.at + ls.total)
    assert scheduler.next(be.at + ls.total) is not None
    merging.begin(be)
    saved = merged.sum() * EXPERT_S + merged[1:].sum() * float(steps.timings.launches_per_expert * 5e-6)
    assert (alone + total) - (ls.total + be.total) == pytest.approx(saved, abs=40 * TICK)
    assert be.end(be.steps_in_all() - 2) + be.cost.head_s == be.total
    assert be.end(be.done - 1) == be.at


def test_a_pass_that_stops_has_merged_only_what_it_came_to():
    steps = step_model()
    scheduler, gpu, be = stopped_prefill(steps, 2)
    before = be.expert_queues()
    p = scheduler.next(be.at)
    assert p is not None
    ls = gpu.start(p)
    merging = Merging(scheduler)
    merging.begin(ls)
    ls.done = ls.first_group(0) + 5  # groups 0 to 4 are done
    merging.end(ls, 0, ls.done)
    merged = (ls.tokens(0) > 0) & (np.arange(8) < 5)
    assert (before[merged] > 0).any()
    assert be.expert_queues().tolist() == np.where(merged, 0, before).tolist()


def test_queues_longer_than_merge_rows_wait_for_their_own_pass():
    steps = step_model(4e-6)
    scheduler, gpu, be = stopped_prefill(steps, 0, prompt=400)
    before = be.expert_queues()
    assert before.min() > steps.merge_rows
    p = scheduler.next(be.at)
    assert p is not None
    ls = gpu.start(p)
    alone, merging = ls.total, Merging(scheduler)
    merging.begin(ls)
    merging.end(ls, 0, None)
    assert ls.total == alone
    assert be.expert_queues().tolist() == before.tolist()


def busy(trace: RequestTrace, policy: Policy, steps: PassCostModel) -> float:
    slices = run(trace, policy, LIMITS, steps, timeline=True).slices
    assert slices is not None
    return sum(s.end - s.start for s in slices)


def test_merging_saves_the_device_time():
    steps = step_model(layers=1, head=(1e-6, 1e-6))
    saved = []
    for at in np.arange(1, 60) * 1e-5:
        trace = RequestTrace(np.array([0.0, at]), np.array([40, 8]), np.array([1, 1]), np.array([1, 0]), ("ls", "be"))
        merged, apart = (busy(trace, make_policy("qllm", fill_tokens=0, merge=m), steps) for m in (True, False))
        saved.append(apart - merged)
    assert min(saved) == 0.0
    assert max(saved) > 3 * EXPERT_S


def crowd(seed: int, n: int = 60) -> RequestTrace:
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(0.0015, n) * rng.integers(0, 2, n)
    cls = rng.choice(3, n, p=[0.5, 0.25, 0.25])
    return RequestTrace(np.cumsum(gaps), rng.integers(1, 40, n), rng.integers(1, 12, n), cls, tuple(PRIORITIES))


MERGING = {
    "qllm": lambda: make_policy("qllm", merge=True),
    "idle": lambda: make_policy("qllm", fill_tokens=0, resume="idle", merge=True),
    "hybrid": lambda: make_policy("hybrid", budget=32, merge=True),
    "stack": Stack,
}


@pytest.mark.parametrize("name", MERGING)
def test_fast_device_merges_like_the_step_by_step_device(name, monkeypatch):
    """Random workloads under tight limits, up to 6 or 52 rows merged, both expert modes, various cuts."""
    seen: Counter[str] = Counter()
    begin, mark_merged = Merging.begin, SimulatedPass.mark_merged

    def watched(merging, run):
        begin(merging, run)
        seen["several"] += any(len(partners) > 1 for partners in merging._partners.values())

    def count(run, experts):
        seen["shared"] += 1
        mark_merged(run, experts)

    monkeypatch.setattr(Merging, "begin", watched)
    monkeypatch.setattr(SimulatedPass, "mark_merged", count)
    for seed in range(24):
        steps = step_model(
            (4e-6, EXPERT_S)[seed % 2],
            (1e-5, 1e-4, 3e-4)[seed % 3],
            ("fused", "separate")[seed // 6 % 2],
            layers=1 + seed % 3,
            host_s=1e-4 * (seed % 2),
            suspend_s=1e-5,
            resume_s=7e-6,
        )
        fast, slow = (
            run(crowd(seed), MERGING[name](), LIMITS, steps, seed=seed, timeline=True, step_by_step=step_by_step)
            for step_by_step in (False, True)
        )
        assert fast.slices == slow.slices, seed
        for column in ("first_launch", "first_token", "finish", "queueing", "running", "suspended"):
            np.testing.assert_array_equal(getattr(fast, column), getattr(slow, column), err_msg=f"{column}, {seed}")
        assert fast.makespan == slow.makespan
    assert seen["shared"] > 100
    assert seen["several"] > 10 or name in ("qllm", "hybrid")


@pytest.mark.parametrize("name", ["qllm", "hybrid"])
def test_merge_is_off_by_default_and_either_true_or_false(name):
    assert make_policy(name).merge is False
    assert make_policy(name, merge=True).merge is True
    for value in ("yes", 1, None):
        with pytest.raises(UnknownPolicy, match=f"{name}: merge is {value!r}, must be true or false"):
            make_policy(name, merge=value)


def test_between_layers_nothing_waits_so_layer_has_no_such_setting():
    with pytest.raises(UnknownPolicy, match="layer has no setting 'merge', only fill_tokens, resume, max_suspended_s"):
        make_policy("layer", merge=True)


def test_a_users_policy_says_it_with_an_attribute():
    assert Stack().merge
    assert not Policy().merge
