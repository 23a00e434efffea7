"""Expected times of passes against the mean of many that were drawn."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from qllm.sim.routing import Routing
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.expected import ExpectedSeconds
from qllm.traces.step_times.testing import affine_timings

LAYERS, EXPERTS = 3, 8
SKEWED = np.random.default_rng(0).dirichlet(np.full(EXPERTS, 2.0), LAYERS)


@pytest.mark.parametrize("popularity", [None, SKEWED])
@pytest.mark.parametrize(
    ("chunks", "n_decode", "context"),
    [
        ([], 1, 50),
        ([], 7, 900),
        ([], 40, 4000),
        ([(60, 0)], 0, 0),
        ([(100, 30), (900, 0)], 5, 100),
        ([(7001, 0)], 0, 0),
    ],
)
def test_the_mean_of_passes_that_are_drawn(popularity, chunks, n_decode, context):
    timings = affine_timings(layers=LAYERS, experts=EXPERTS, top_k=2, expert=(5e-5, 1e-6))
    steps = PassCostModel(timings, popularity=popularity)
    shares = np.full((LAYERS, EXPERTS), 1 / EXPERTS) if popularity is None else popularity
    routing = Routing(shares, 2, 0)
    tokens = n_decode + sum(new for new, _ in chunks)
    given = [(None, new, cached) for new, cached in chunks]
    cost = steps.cost(given, n_decode, context, n_decode + len(chunks))
    drawn = [steps.total(cost, steps.experts_of_pass(cost, routing.counts(tokens, routing.draw()))) for _ in range(300)]
    error = 4 * np.std(drawn) / np.sqrt(len(drawn))
    assert ExpectedSeconds(steps)(chunks, n_decode, context) == pytest.approx(
        np.mean(drawn), rel=0.004 if popularity is None else 0.02, abs=error
    )


def test_what_lies_between_known_sizes_lies_between_their_times():
    expected = ExpectedSeconds(PassCostModel(affine_timings(layers=2, experts=4, top_k=2)))
    times = [expected.experts(n) for n in range(400)]
    assert times[0] == 0
    assert all(b > a for a, b in pairwise(times))
    assert expected.experts(60_000) > expected.experts(50_000)
