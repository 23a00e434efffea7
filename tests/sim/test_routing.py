"""Routing: drawn by popularity, recorded, or taken from recorded passes of other runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qllm.scheduler import Limits, make_policy
from qllm.sim import RecordedRouting, ResampledRouting, Routing, simulate
from qllm.sim.routing import binomial
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings

EXPERTS, TOP_K = 6, 2


def recorded(tokens: int, seed: int) -> np.ndarray:
    """A pass all of whose tokens go to few experts, int[2, EXPERTS]."""
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation([tokens, tokens, 0, 0, 0, 0]) for _ in range(2)])


PASSES = [recorded(n, seed) for seed, n in enumerate([1, 1, 1, 1, 1, 3, 5, 40, 80, 200])]


@settings(deadline=None)
@given(tokens=st.sampled_from([1, 50, 4096, 4097, 10**6]), draw=st.integers(0, (1 << 30) - 1))
def test_each_token_goes_to_different_experts_in_proportion_to_their_popularity(tokens, draw):
    """Passes of more than 4096 tokens, the size of the pool, are drawn from the normal limit."""
    popularity = np.array([[0.4, 0.3, 0.1, 0.1, 0.1, 0.0], np.full(EXPERTS, 1 / EXPERTS)])
    routing = Routing(popularity, TOP_K)
    assert routing.size == 4096
    counts = routing.counts(tokens, draw)
    assert (counts == routing.counts(tokens, draw)).all()
    assert counts.shape == popularity.shape
    assert counts.min() >= 0
    assert counts.max() <= tokens
    assert counts.sum(axis=1) == pytest.approx(TOP_K * tokens, abs=8 * np.sqrt(tokens) if tokens > 4096 else 0)
    assert counts[0, 5] == 0
    if tokens >= 4096:
        assert counts[1] == pytest.approx(TOP_K * tokens / EXPERTS, rel=0.15)


def test_recorded_routing_is_handed_out_once_in_the_order_of_the_launches():
    routing = RecordedRouting(PASSES[:2])
    for recorded in PASSES[:2]:
        assert (routing.counts(1, routing.draw()) == recorded).all()
    with pytest.raises(IndexError):
        routing.counts(1, routing.draw())


@given(tokens=st.integers(1, 500), draw=st.integers(0, 1 << 30))
def test_counts_are_those_of_a_recorded_pass_in_proportion(tokens, draw):
    routing = ResampledRouting(PASSES, TOP_K, layers=3)
    counts = routing.counts(tokens, draw)
    assert counts.shape == (3, EXPERTS)
    assert (counts[2] == counts[1]).all()  # a layer that was not recorded
    assert (counts == routing.counts(tokens, draw)).all()
    assert set(np.unique(counts)) <= {0, tokens}  # still all at two experts


def test_a_pass_of_a_recorded_size_gets_exactly_what_was_recorded():
    routing = ResampledRouting(PASSES, TOP_K, layers=2)
    seen = {routing.counts(1, draw).tobytes() for draw in range(50)}
    assert seen == {p.astype(np.intp).tobytes() for p in PASSES[:5]}
    near = [routing.counts(80, draw) for draw in range(50)]
    assert any((counts == PASSES[8]).all() for counts in near)


def test_nothing_recorded_is_refused():
    with pytest.raises(ValueError, match="no passes were recorded"):
        ResampledRouting([], TOP_K, layers=2)


def test_a_simulation_pays_for_the_experts_that_were_reached():
    steps = PassCostModel(affine_timings(layers=2, experts=EXPERTS, top_k=TOP_K, expert=(1e-3, 0.0)))
    trace = RequestTrace(np.zeros(1), np.array([40]), np.ones(1, dtype=int), np.zeros(1, dtype=int), ("ls",))
    world = {"priorities": {"ls": 0}, "policy": make_policy("fcfs"), "limits": Limits(), "steps": steps}
    even = simulate(trace, **world)
    few = simulate(trace, **world, routing=ResampledRouting(PASSES, TOP_K, layers=2))
    assert even.finish[0] - few.finish[0] == pytest.approx(2 * (EXPERTS - 2) * 1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("tokens", "share"), [(1, 0.2), (16, 1 / 16), (8192, 1 / 16), (100, 0.999), (5, 0.0), (5, 1.0)]
)
def test_chances_of_counts_are_binomial(tokens, share):
    counts, chances = binomial(tokens, share)
    assert chances == pytest.approx(stats.binom.pmf(counts, tokens, share), abs=1e-12)
    assert chances.sum() == pytest.approx(1, abs=1e-6)
