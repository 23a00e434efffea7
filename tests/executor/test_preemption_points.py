"""What happens at each preemption point: preemption, abort, an exception. Nobody else notices."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import qllm.executor.engine.execution
import qllm.executor.engine.loop
from qllm.executor.engine.engine import Engine
from qllm.executor.engine.execution import execution_of
from qllm.executor.errors import RequestFailed
from qllm.executor.model.split import whole
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits, State, make_policy
from qllm.traces.step_times.cost_model import TICK
from tests.engine_worlds import LAYERS, ROOMY, make_model, prompts, serve, step_model


@pytest.fixture(scope="module")
def model(one_thread):
    return make_model()


@pytest.fixture
def logits(monkeypatch):
    """The logits of every sampled token: (request, tokens before it) -> float32[vocab]."""
    seen: dict[tuple[int, int], torch.Tensor] = {}
    original = qllm.executor.engine.loop.sample_rows

    def spy(running, logits):
        for entry, row in zip(running.sampled, logits, strict=True):
            seen[entry.seq.request.id, len(entry.seq.tokens)] = row.clone()
        original(running, logits)

    monkeypatch.setattr(qllm.executor.engine.loop, "sample_rows", spy)
    return seen


def test_be_gives_the_same_bits_when_ls_preempts_it_at_each_point(model, logits):
    be, ls = prompts(2, seed=1, low=20, high=40)
    steps = step_model(2e-5)
    points = []
    serve(
        model,
        [(be, 3, 1, 0.0)],
        limits=ROOMY,
        hook=lambda loop, p, execution: points.append(loop.clock.now()),
        max_step=2e-5,
    )
    alone = dict(logits)
    prefill = [t for t in points if t <= points[steps_in_prefill(steps, len(be)) - 1]]
    assert len(prefill) >= 20
    for number, at in enumerate(prefill):
        logits.clear()
        served = serve(
            model,
            [(be, 3, 1, 0.0), (ls, 2, 0, at - TICK)],
            limits=ROOMY,
            max_step=2e-5,
        )
        assert served[0].request.preemptions == 1, number
        for key, row in alone.items():
            if key[1] == len(be):  # the preempted pass; later ones share their batch with LS
                assert torch.equal(logits[key], row), number


def steps_in_prefill(steps, n):
    return len(steps.points(steps.cost([(None, n, 0)], 0, 0, 1), "expert"))


def crowd():
    """Requests for which memory is short, with LS arriving all along: (prompt, new tokens, priority, arrival)."""
    rng = np.random.default_rng(7)
    asked = prompts(8, seed=8)
    arrivals = np.cumsum(rng.exponential(0.004, 8)).tolist()
    return [(p, 6, int(i % 3 != 2), at) for i, (p, at) in enumerate(zip(asked, arrivals, strict=True))]


def tight(evict):
    return Limits(max_seqs=4, max_batched_tokens=48, kv_blocks=14, block_size=4, evict=evict)


def points_and_tokens(model, evict):
    points = []
    served = serve(model, crowd(), limits=tight(evict), hook=lambda *_: points.append(None))
    return len(points), [sequence.tokens for sequence in served]


@pytest.fixture(scope="module")
def generated():
    """The tokens of transformers' own generation for the crowd."""
    plain = tiny_model("qwen3_moe", num_hidden_layers=LAYERS)
    return [
        plain.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None)[0].tolist()
        for prompt, new, _, _ in crowd()
    ]


@pytest.mark.parametrize("evict", ["recompute", "offload"])
def test_abort_at_any_point_returns_the_blocks_and_changes_nobody_elses_tokens(model, generated, evict):
    n, tokens = points_and_tokens(model, evict)
    assert tokens == generated
    states = set()
    for at in range(0, n, max(1, n // 40)):
        count = 0
        victims = []

        def abort(loop, p, execution, at=at, victims=victims):
            nonlocal count
            count += 1
            if count != at + 1:
                return
            suspended = [s for q in loop.scheduler.suspended_passes for s in execution_of(q).sequences]
            moved = [s for s in loop.sequences.values() if s.request.state is State.OFFLOADED]
            others = list(loop.sequences.values())
            waiting = [s for s in others if s.request.state is State.WAITING]
            pools = [pool for pool in (moved, suspended, waiting, others) if pool]
            pool = pools[at % len(pools)]
            victim = pool[at % len(pool)]
            states.add("suspended" if victim in suspended else victim.request.state.name)
            victims.append(victim)
            loop.abort(victim)

        served = serve(model, crowd(), limits=tight(evict), hook=abort)
        assert len(victims) == 1
        for sequence, wanted in zip(served, generated, strict=True):
            if sequence is victims[0]:
                assert sequence.finish_reason == "cancelled"
                assert sequence.tokens == wanted[: len(sequence.tokens)]
            else:
                assert sequence.tokens == wanted
    assert {"suspended", "WAITING", "READY", "IN_PASS"} <= states, states
    assert evict == "recompute" or "OFFLOADED" in states


def test_all_of_a_suspended_pass_aborted(model):
    """The pass is thrown away where it stands, and its activations with it."""
    be, ls = prompts(2, seed=9, low=20, high=40)
    held = []

    def hook(loop, p, execution):
        for q in list(loop.scheduler.suspended_passes):
            held.append(execution_of(q).running.held_bytes())
            running = execution_of(q).running
            for sequence in list(execution_of(q).sequences):
                loop.abort(sequence)
            assert running.done

    served = serve(model, [(be, 3, 1, 0.0), (ls, 2, 0, 3e-4)], limits=ROOMY, hook=hook)
    assert held
    assert held[0] >= len(be) * 64 * 4  # at least the hidden states, float32[tokens, 64]
    assert [sequence.finish_reason for sequence in served] == ["cancelled", "length"]


@pytest.mark.parametrize("evict", ["recompute", "offload"])
def test_an_exception_inside_the_model_ends_the_requests_of_its_pass_alone(model, generated, evict):
    n, _ = points_and_tokens(model, evict)
    for at in range(0, n, max(1, n // 20)):
        count = 0
        hit = []

        def fail(loop, p, execution, at=at, hit=hit):
            nonlocal count
            count += 1
            if count == at + 1:
                hit.extend(r.id for r in p.requests())
                execution.running.fail(MemoryError("of the test"))

        served = serve(model, crowd(), limits=tight(evict), hook=fail)
        assert hit
        for sequence, wanted in zip(served, generated, strict=True):
            if sequence.request.id in hit:
                assert isinstance(sequence.error, RequestFailed)
                assert isinstance(sequence.error.__cause__, MemoryError)
            else:
                assert sequence.tokens == wanted


SAMPLED = {"max_new_tokens": 4, "temperature": 0.8, "top_p": 0.9, "stop": ()}


def test_a_pass_stops_between_groups_of_sampled_rows(model, monkeypatch):
    """An LS request that arrives while BE rows are drawn does not wait for the rest of them, and draws are the same."""
    be, ls = prompts(10, seed=4, low=10, high=20), [7, 8, 9]
    limits = Limits(max_seqs=12, max_batched_tokens=256, kv_blocks=100)
    calls: list[int] = []
    original = qllm.executor.engine.execution.sample

    def served(arrive_at: int | None):
        calls.clear()
        first: list = []

        def spy(logits, *args):
            if len(calls) == arrive_at:
                first.append(engine.submit(ls, max_new_tokens=1, priority=0, stop=()))
            calls.append(len(logits))
            return original(logits, *args)

        monkeypatch.setattr(qllm.executor.engine.execution, "sample", spy)
        policy = make_policy("qllm", fill_tokens=0)
        with Engine(model, policy=policy, limits=limits, splitter=whole) as engine:
            ready = threading.Event()
            engine._loop.send(ready.wait)  # all of them arrive at one instant
            streams = [engine.submit(p, priority=1, seed=i, **SAMPLED) for i, p in enumerate(be)]
            ready.set()
            results = [stream.result() for stream in streams]
            return [r.tokens for r in results], results, [s.result() for s in first], list(calls)

    expected, _, _, sizes = served(None)
    assert sizes == [4, 4, 2] * 4
    tokens, results, (urgent,), sizes = served(1)
    assert tokens == expected
    assert sizes[:3] == [4, 4, 1]  # its own row before the third group of the pass that it interrupted
    assert urgent.times.finish < min(r.times.first_token for r in results)
    assert {r.times.preemptions for r in results} == {1}
