"""The step model: steps add up exactly, cuts follow max_step, both expert modes cost what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.sim import RecordedRouting, Routing, uniform
from qllm.traces.step_times.cost_model import TICK, PassCostModel, ticks
from qllm.traces.step_times.testing import affine_timings
from qllm.traces.step_times.timings import Timings
from tests.worlds import step_models

chunks = st.lists(st.tuples(st.none(), st.integers(1, 300), st.integers(0, 500)), max_size=4)


def draw_counts(steps: PassCostModel, tokens: int, seed: int) -> np.ndarray:
    return Routing(uniform(steps), steps.timings.top_k, seed).counts(tokens, seed)


@settings(deadline=None)
@given(step_models(), chunks, st.integers(0, 20), st.integers(0, 3000), st.booleans(), st.integers(0, 5))
def test_pieces_add_up_to_the_total_to_the_last_bit(steps, prefill, n_decode, context, after, seed):
    if not prefill and not n_decode:
        return
    cost = steps.cost(prefill, n_decode, context, n_decode + len(prefill), after_prefill=after)
    counts = draw_counts(steps, n_decode + sum(c[1] for c in prefill), seed)
    times = steps.times(cost, counts)
    assert len(times) == 2 + steps.layers * cost.steps_per_layer
    assert times.cumsum()[-1] == steps.total(cost, steps.experts_of_pass(cost, counts))
    np.testing.assert_array_equal(times, ticks(times))
    if not prefill:
        bare = steps.decode_total(n_decode, context, after)
        assert bare == steps.total(steps.cost((), n_decode, context, n_decode, after_prefill=after), 0.0)


def test_only_a_pass_that_decodes_alone_takes_longer_after_a_prompt():
    steps = PassCostModel(affine_timings(after_prefill=(1e-3, 1e-4)))

    def longer(prefill: list, n_decode: int) -> float:
        asked = prefill, n_decode, 10 * n_decode, 1
        return steps.cost(*asked, after_prefill=True).prologue_s - steps.cost(*asked).prologue_s

    assert longer([], 4) == pytest.approx(1.4e-3, rel=1e-5)
    assert longer([(None, 8, 0)], 4) == longer([(None, 8, 0)], 0) == 0


def test_what_a_further_group_costs_may_fall_with_the_tokens():
    steps = PassCostModel(affine_timings(launch=(1e-4, -1e-6), launches_per_expert=1, tokens=64), max_step=1e-4)
    found = [steps.cost([(None, n, 0)], 0, 0, 1).group_launch_s for n in (1, 50, 64)]
    assert found == pytest.approx([9.9e-5, 5e-5, 3.6e-5], rel=1e-4)


@settings(deadline=None)
@given(step_models(), st.integers(1, 2000), st.integers(0, 2000))
def test_points_lie_between_stages_and_position_names_them(steps, tokens, context):
    cost = steps.cost([(None, tokens, context)], 0, 0, 1)
    every = steps.points(cost, "expert")
    layer = steps.points(cost, "layer")
    assert len(steps.points(cost, "iteration")) == 0
    assert len(layer) == steps.layers
    assert set(layer) <= set(every)
    after = [steps.position(cost, int(p) + 1) for p in every]
    assert after == [
        (n, stage, i)
        for n in range(steps.layers)
        for stage, count in (("attention", cost.query_blocks), ("experts", cost.n_groups))
        for i in range(count)
    ]
    assert [steps.position(cost, int(p) + 1)[1:] for p in layer] == [("attention", 0)] * steps.layers
    assert steps.position(cost, 0)[1] == "prologue"
    assert steps.position(cost, len(steps.times(cost, draw_counts(steps, tokens, 0))) - 1)[1] == "head"


def test_no_step_that_can_be_cut_exceeds_max_step():
    """On real timings, for passes of all sizes: groups of several experts and query blocks stay below it."""
    timings = Timings.load("a100-qwen3-30b-a3b-bf16")
    for max_step in (1e-3, 2e-3):
        steps = PassCostModel(timings, max_step=max_step)
        for tokens, context in ((1, 100), (64, 0), (500, 8000), (8192, 0), (8192, 24_000)):
            cost = steps.cost([(None, tokens, context)], 0, 0, 1)
            assert cost.query_block_s <= max_step + timings.launch_s + TICK
            groups = steps.group_seconds(cost, draw_counts(steps, tokens, 3))
            assert groups.max() <= max_step
            assert cost.experts_per_group == steps.n_experts or cost.experts_per_group > 1
        assert cost.query_blocks > 1


def test_fused_shares_its_base_and_separate_pays_a_launch_each():
    timings = affine_timings(layers=1, experts=4, top_k=2, experts_base_s=30e-6, launch_s=5e-6, launches_per_expert=3)
    counts = np.array([[3, 0, 1, 4]])
    f = timings.expert(counts[0])
    fused, separate = (PassCostModel(timings, expert_mode=mode) for mode in ("fused", "separate"))
    for steps, expected in ((fused, 30e-6 + f.sum()), (separate, 30e-6 + f.sum() + 3 * 15e-6)):
        cost = steps.cost([(None, 4, 0)], 0, 0, 1)
        assert steps.group_seconds(cost, counts).sum() == pytest.approx(expected, abs=8 * TICK)
    cut = PassCostModel(timings, max_step=1e-9)
    cost = cut.cost([(None, 4, 0)], 0, 0, 1)
    assert (cost.experts_per_group, cost.n_groups) == (1, 4)
    assert cut.group_seconds(cost, counts).sum() == pytest.approx(30e-6 + f.sum() + 2 * 15e-6, abs=12 * TICK)


def test_what_cannot_be_is_refused():
    timings = affine_timings(expert_mode="separate")
    with pytest.raises(ValueError, match="only separate is possible"):
        PassCostModel(timings, expert_mode="fused")
    with pytest.raises(ValueError, match="fused or separate"):
        PassCostModel(timings, expert_mode="both")
    with pytest.raises(ValueError, match="max_step is 0"):
        PassCostModel(timings, max_step=0)


def test_routing_follows_popularity_and_conserves_tokens():
    rng = np.random.default_rng(0)
    popularity = rng.dirichlet(np.full(16, 3.0), size=5)
    routing = Routing(popularity, 2, seed=1)
    total = np.zeros((5, 16))
    for _ in range(300):
        counts = routing.counts(100, routing.draw())
        assert counts.shape == (5, 16)
        assert (counts.sum(axis=1) == 200).all()
        assert counts.max() <= 100, "a token chooses an expert once"
        total += counts
    share = total / total.sum(axis=1, keepdims=True)
    assert np.corrcoef(share.ravel(), popularity.ravel())[0, 1] > 0.98
    again, other = Routing(popularity, 2, seed=1), Routing(popularity, 2, seed=2)
    same = [r.counts(100, r.draw()) for r in (Routing(popularity, 2, seed=1), again, other)]
    assert (same[0] == same[1]).all()
    assert (same[0] != same[2]).any()
    many = routing.counts(50_000, 7)  # beyond the pool: the normal limit
    assert abs(many.sum() / (5 * 100_000) - 1) < 0.01
    expected = np.minimum(popularity * 2, 1) * 50_000
    assert (np.abs(many - expected) <= 6 * np.sqrt(expected)).all()
    draws = np.array([routing.counts(50_000, d) for d in range(64)])
    deviation = np.sqrt(expected * (1 - expected / 50_000))
    assert draws.std(axis=0).mean() == pytest.approx(deviation.mean(), rel=0.1)


def test_recorded_routing_is_replayed_pass_by_pass():
    recorded = RecordedRouting([np.full((1, 2), 3), np.full((1, 2), 5)])
    assert [recorded.counts(0, recorded.draw())[0, 0] for _ in range(2)] == [3, 5]
    with pytest.raises(IndexError):
        recorded.counts(0, recorded.draw())


@given(st.floats(0, 1e5))
def test_ticks_are_exact_multiples(seconds):
    t = ticks(seconds)
    assert abs(t - seconds) <= TICK / 2
    assert math.modf(t / TICK)[0] == 0
