"""What a server shows of the engine: where requests and passes stand, what ran lately, who was preempted or blocked."""

from types import SimpleNamespace

import pytest

from qllm.executor.engine.engine import Engine
from qllm.executor.engine.execution import execution_of
from qllm.executor.engine.recorder import ActivityRecorder, Standing
from qllm.executor.sampling.params import SamplingParams
from qllm.scheduler import Request
from qllm.scheduler.passes import Chunk, Pass
from tests.engine_worlds import ROOMY, WatchedClock, make_model, prompts, step_model


@pytest.fixture(scope="module")
def model():
    return make_model()


def class_of(priority: int) -> str:
    return "ls" if priority <= 0 else "be"


def serve(model, requests, policy="qllm", hook=lambda recorder, loop, p: None):
    """Serve (prompt, new tokens, priority, arrival) on the virtual clock; recorder, activity at the end, requests."""
    made = []
    clock = WatchedClock(step_model(), lambda loop, p, execution: hook(made[0], loop, p))
    with Engine(model, policy=policy, limits=ROOMY, clock=clock, seed=0) as engine:
        clock.loop = engine._loop
        made.append(ActivityRecorder(engine.scheduler, class_of))
        served = [engine.make_request(ids, new, urgency, SamplingParams(), at) for ids, new, urgency, at in requests]

        def begin(loop):
            loop.activity = made[0]
            loop.scheduled.extend(served)

        engine.call(begin)
        completions = [engine.stream_of(request).result() for request in served]
        return engine.call(lambda loop: made[0].activity(clock.now(), 0.0)), completions


def test_slices_preemptions_and_blocking_are_those_of_the_requests(model):
    long, short = prompts(2, 1, 30, 60)
    activity, (be, ls) = serve(model, [(long, 4, 1, 0.0), (short, 2, 0, 0.0011)])
    assert be.times.preemptions == sum(one.suspended for one in activity.slices) > 0
    assert sum(activity.preemptions.values()) == be.times.preemptions
    assert {name for name, _ in activity.preemptions} == {"be"}
    assert {point for _, point in activity.preemptions} <= {"layer", "attention", "experts", "head"}
    assert sum(one.end - one.start for one in activity.slices) == pytest.approx(be.times.finish)
    assert activity.blocking_s["ls"] == pytest.approx(ls.times.queueing)  # it waited for the step that ran
    assert "be" not in activity.blocking_s
    assert (activity.classes, activity.passes) == ({}, [])


def test_without_preemption_a_request_is_blocked_for_the_rest_of_the_pass(model):
    long, short = prompts(2, 1, 30, 60)
    activity, (_, ls) = serve(model, [(long, 1, 1, 0.0), (short, 2, 0, 0.0011)], policy="fcfs")
    assert activity.preemptions == {}
    assert activity.blocking_s["ls"] == pytest.approx(ls.times.first_launch - 0.0011)


def test_requests_and_passes_stand_where_the_engine_says(model):
    seen = []

    def hook(recorder, loop, p):
        if p.priority() == 0 and loop.scheduler.suspended_passes:
            seen.append(recorder.activity(loop.clock.now(), 0.0))

    long, short, more = prompts(3, 1, 30, 60)
    serve(model, [(long, 4, 1, 0.0), (short, 2, 0, 0.0011), (more, 1, 1, 0.0011)], hook=hook)
    assert seen
    for activity in seen:
        standing = {name: one._replace(blocks=0) for name, one in activity.classes.items()}
        assert standing == {"ls": Standing(running=1), "be": Standing(waiting=1, suspended=1)}
        running, suspended = activity.passes
        assert (running.class_, running.suspended) == ("ls", False)
        assert (suspended.class_, suspended.suspended) == ("be", True)
        last = [one for one in activity.slices if one.pass_id == suspended.pass_id][-1]
        assert (suspended.layer, suspended.stage, suspended.since) == (last.layer, last.stage, last.end)


@pytest.mark.parametrize("policy", ["qllm", "hybrid", "slack"])
def test_kv_and_activations_by_class_add_up_to_those_of_the_engine(model, policy):
    seen = []

    def hook(recorder, loop, p):
        activity, kv = recorder.activity(loop.clock.now(), 0.0), loop.scheduler.kv
        blocks = {name: one.blocks for name, one in activity.classes.items()}
        held = sum(execution_of(one).running.held_bytes() for one in loop.scheduler.suspended_passes)
        seen.append((blocks, held))
        assert sum(blocks.values()) == kv.total - kv.free
        assert sum(one.held_bytes for one in activity.passes) == held

    asked = [(prompt, 9, i % 2, 0.0011 * i) for i, prompt in enumerate(prompts(8, 3, 10, 40))]
    serve(model, asked, policy=policy, hook=hook)
    assert any(len(blocks) == 2 and all(blocks.values()) for blocks, _ in seen)
    assert any(held for _, held in seen)


def test_a_prefill_is_its_own_class_whoever_decodes_beside_it(model):
    """The most urgent request in a pass may be one that only decodes there."""
    long, short = prompts(2, 1, 30, 60)
    activity, _ = serve(model, [(short, 8, 0, 0.0), (long, 1, 1, 0.0)], policy="hybrid")
    mixed = [one for one in activity.slices if one.prefills and one.decodes]
    assert mixed
    assert {one.priority for one in mixed} == {1}


def test_only_the_last_stretches_are_kept_and_told(model):
    activity, _ = serve(model, [(prompt, 3, 0, 0.001 * i) for i, prompt in enumerate(prompts(5, 2))])
    recorder = ActivityRecorder(None, class_of, most=3)
    recorder._slices.extend(activity.slices)
    assert list(recorder._slices) == activity.slices[-3:]


def test_a_request_waits_in_a_queue_or_is_suspended_and_is_blocked_in_the_queue_alone():
    urgent, held, less = (Request(id, 4, 1, priority, 0.5) for id, priority in ((0, 0), (1, 0), (2, 1)))
    running, suspended = (Pass(n, [Chunk(r, 4, 0)], None, 0.0) for n, r in enumerate((less, held)))
    scheduler = SimpleNamespace(requests={r.id: r for r in (urgent, held, less)}, suspended_passes=[suspended])
    recorder = ActivityRecorder(scheduler, class_of)
    recorder.record(running, 0.25, 2.0, (0, 0), 5, (1, "experts"), False)
    assert recorder._blocking_s == {"ls": 1.5}
    recorder.record(running, 3.0, 4.0, (5, 1), 9, (2, "head"), False)
    assert recorder._blocking_s == {"ls": 2.5}
