"""Requests beyond the model's context: the simulation says that the model could not serve them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from qllm.scheduler import Limits, make_policy
from qllm.traces import PassCostModel, RequestTrace, TimingWarning
from qllm.traces.step_times.testing import affine_timings
from tests.worlds import run


def simulated(prompt: int, output: int, **header) -> None:
    steps = PassCostModel(affine_timings(**header))
    trace = RequestTrace(np.array([0.0]), np.array([prompt]), np.array([output]), np.array([0]), ("ls",))
    run(trace, make_policy("fcfs"), Limits(), steps)


@pytest.mark.parametrize("header", [{"max_context": 40960}, {"model": "qwen3-30b-a3b"}])
@pytest.mark.parametrize(("prompt", "output"), [(100_000, 1), (40_960, 1)])
def test_a_request_longer_than_the_models_context_is_told(header, prompt, output):
    with pytest.warns(TimingWarning, match="takes 40960 tokens of prompt and output together"):
        simulated(prompt, output, **header)


@pytest.mark.parametrize("header", [{"max_context": 40960}, {"model": "qwen3-30b-a3b"}, {}])
def test_a_request_within_it_is_not(header):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulated(40_950 if header else 100_000, 10, **header)
