"""Routing taken from recorded passes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllm.scheduler import Limits, make_policy
from qllm.sim import ResampledRouting, simulate
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings

EXPERTS, TOP_K = 6, 2


def recorded(tokens: int, seed: int) -> np.ndarray:
    """A pass all of whose tokens go to few experts, int[2, EXPERTS]."""
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation([tokens, tokens, 0, 0, 0, 0]) for _ in range(2)])


PASSES = [recorded(n, seed) for seed, n in enumerate([1, 1, 1, 1, 1, 3, 5, 40, 80, 200])]


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
