"""Merging in the engine: a suspended pass's rows run in another's launches, and each gets its own back.

Products over other numbers of rows round differently, so outputs agree to a tolerance (relative to the largest logit,
float32), not to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import qllm.executor.model.experts
from qllm.executor import Engine
from qllm.executor.engine.execution import execution_of
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.passes import RunningPass
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import LinearSplitter, Split
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits, make_policy
from tests.engine_worlds import LAYERS, ROOMY, make_model, prompts, serve

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(one_thread):
    return make_model()


@pytest.fixture
def shared(monkeypatch):
    """Rows that ran in another pass's launch, launch by launch, where there were any."""
    seen: list[int] = []
    original = qllm.executor.model.experts.run_tile

    def spy(module, tile, queues, others=()):
        rows = sum(q.waiting[e] for q in others for e in tile if q.can_merge(e))
        original(module, tile, queues, others)
        if rows:
            seen.append(rows)

    monkeypatch.setattr(qllm.executor.model.experts, "run_tile", spy)
    return seen


def tokens(n, seed):
    return torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


class Scene(NamedTuple):
    runner: Runner
    be: RunningPass
    ls: RunningPass


def scene(model, rows=1000) -> Scene:
    """A BE pass over 20 tokens and an LS pass over 6 that may share launches of up to `rows` waiting rows."""
    split = Split(experts_per_group=2, query_blocks=1, merge_rows=rows)
    runner = Runner(model, kv_blocks=12, block_size=4, splitter=lambda _: split)
    be = runner.begin([(Sequence(tokens(20, 1), [0, 2, 4, 6, 8]), 20)])
    ls = runner.begin([(Sequence(tokens(6, 2), [1, 3]), 6)], partners=(be,))
    return Scene(runner, be, ls)


def close_to(logits, expected):
    return (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.fixture
def alone(model):
    """The logits of both passes, each run alone, and the number of points of the BE pass."""
    with torch.inference_mode():
        be, ls = (run_to_end(scene(model)[i]) for i in (1, 2))
        running, points = scene(model).be, 0
        while running.advance() is not None:
            points += 1
        yield be, ls, points


def test_both_passes_get_their_own_rows_back_wherever_be_was_suspended(model, shared, alone):
    expected_be, expected_ls, points = alone
    stages = []
    for stop in range(1, points + 1):
        _, be, ls = scene(model)
        for _ in range(stop):
            be.advance()
        assert be.point is not None
        stages.append(be.point.stage)
        shared.clear()
        waiting = 0 if be.queues is None else sum(be.queues.waiting)
        ls_logits = run_to_end(ls)
        assert bool(shared) == (be.point.stage == "experts"), "rows are shared where they wait, and only there"
        left = 0 if be.queues is None else sum(be.queues.waiting)
        assert waiting - left == sum(shared)
        be_logits = run_to_end(be)
        assert close_to(ls_logits, expected_ls), stop
        assert close_to(be_logits, expected_be), stop
        assert ls_logits.argmax() == expected_ls.argmax()
        if not shared:
            assert torch.equal(be_logits, expected_be)
    assert stages.count("experts") > LAYERS


def test_groups_of_which_nothing_is_left_are_passed_over(model, alone):
    """The same tokens go to the same experts of the first layer: nothing is left of it where BE waits."""
    _, be, _ = scene(model)
    while (point := be.advance()) is not None and point.stage != "experts":
        pass
    layer = be.layer
    other = scene(model).be
    other.partners = (be,)
    run_to_end(other)
    assert be.queues is not None
    assert sum(be.queues.waiting) == 0
    point = be.advance()
    assert point is not None
    assert (point.layer, point.stage) == (layer + 1, "attention")
    assert close_to(run_to_end(be), alone[0])


def test_longer_queues_than_merge_rows_wait_for_their_own_pass(model, shared):
    with torch.inference_mode():
        for rows in (0, 3):
            _, be, ls = scene(model, rows)
            while (point := be.advance()) is not None and point.stage != "experts":
                pass
            assert be.queues is not None
            before = list(be.queues.waiting)
            shared.clear()
            run_to_end(ls)
            used = ls.routing[0]
            wanted = [0 if n <= rows and m else n for n, m in zip(before, used, strict=True)]
            assert be.queues.waiting == wanted
            assert sum(shared) == sum(before) - sum(wanted)
            assert bool(shared) == bool(rows)


def test_nothing_is_merged_from_a_partner_that_was_closed(model, shared, alone):
    _, be, ls = scene(model)
    while (point := be.advance()) is not None and point.stage != "experts":
        pass
    be.close()
    assert torch.equal(run_to_end(ls), alone[1])
    assert not shared


def test_a_pass_that_breaks_in_a_shared_launch_leaves_the_other_right(model, shared, alone, monkeypatch):
    original = qllm.executor.model.experts.run_experts
    failing = [False]

    def fragile(*args):
        out = original(*args)
        if failing[0] and len(shared) == 1:  # the second shared launch
            raise MemoryError("of the test")
        return out

    monkeypatch.setattr(qllm.executor.model.experts, "run_experts", fragile)
    for stop in range(alone[2]):
        _, be, ls = scene(model)
        for _ in range(stop + 1):
            be.advance()
        shared.clear()
        failing[0] = be.point.stage == "experts" and sum(n > 0 for n in be.queues.waiting) > 4
        if failing[0]:
            with pytest.raises(MemoryError):
                run_to_end(ls)
            assert ls.queues is None
        failing[0] = False
        assert close_to(run_to_end(be), alone[0])


def test_the_engines_own_splitter_merges_as_many_rows_as_cost_one_reading(model):
    costs = LinearSplitter(n_experts=8, top_k=2, expert=1e-4, row=1e-5)
    runner = Runner(model, kv_blocks=12, block_size=4, splitter=costs)
    assert runner.begin([(Sequence([3], [0]), 1)]).split.merge_rows == 10
    assert Split().merge_rows == 0


@pytest.fixture(scope="module")
def expected():
    plain = tiny_model("qwen3_moe", num_hidden_layers=LAYERS)

    def generate(prompt: list[int], new: int) -> list[int]:
        out = plain.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None)
        return out[0].tolist()

    return generate


def crowd():
    """(prompt, new tokens, priority, arrival): long BE prompts, and LS arriving all along."""
    be = [(p, 6, 1, 0.005 * (i // 2)) for i, p in enumerate(prompts(20, seed=1, low=10, high=30))]
    ls = [(p, 6, 0, 3.1e-4 + 1.7e-3 * i) for i, p in enumerate(prompts(40, seed=2, low=3, high=20))]
    return sorted(be + ls, key=lambda request: request[3])


@pytest.mark.parametrize("name", ["qllm", "hybrid"])
def test_tokens_under_load_are_those_of_generate(model, shared, expected, name):
    served = serve(model, crowd(), policy=make_policy(name, merge=True), limits=ROOMY, max_step=2e-5)
    assert [sequence.tokens for sequence in served] == [expected(prompt, new) for prompt, new, _, _ in crowd()]
    assert len(shared) > 10
    assert any(sequence.request.preemptions for sequence in served)


def test_aborts_of_suspended_passes_change_nobody_elses_tokens(model, shared, expected):
    """Every suspended pass loses one of its requests, or all of them, while another merges its rows."""
    victims = set()

    def hook(loop, p, execution):
        for q in list(loop.scheduler.suspended_passes):
            suspended = execution_of(q)
            left = [s for s in suspended.sequences if s.request.id in loop.scheduler.requests]
            if suspended.running.queues is not None and left and len(shared) > 2 * len(victims):
                for sequence in left[: 1 + len(victims) % 2 * len(left)]:
                    victims.add(sequence.request.id)
                    loop.abort(sequence)

    policy = make_policy("qllm", merge=True)
    served = serve(model, crowd(), policy=policy, limits=ROOMY, max_step=2e-5, hook=hook)
    assert victims
    assert shared
    for sequence, (prompt, new, _, _) in zip(served, crowd(), strict=True):
        wanted = expected(prompt, new)
        assert sequence.tokens == (wanted[: len(sequence.tokens)] if sequence.request.id in victims else wanted)


def test_on_the_real_clock_tokens_are_those_of_generate_too(model, shared, expected):
    """LS prompts arrive while a BE prefill runs: whether one stops between experts depends on the machine."""
    be, ls = prompts(6, seed=3, low=100, high=200), prompts(24, seed=4, low=3, high=9)
    with Engine(
        model,
        policy=make_policy("qllm", fill_tokens=0, merge=True),
        limits=Limits(max_seqs=8, max_batched_tokens=256, kv_blocks=500, block_size=4),
        splitter=lambda _: Split(1, 1, 1000),
    ) as engine:
        streams = [engine.submit(p, max_new_tokens=3, priority=1, stop=()) for p in be]
        streams += [engine.submit(p, max_new_tokens=3, priority=0, stop=()) for p in ls]
        results = [s.result().tokens for s in streams]
    assert results == [expected(p, 3)[len(p) :] for p in be + ls]
