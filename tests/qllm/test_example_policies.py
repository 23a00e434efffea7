"""The policies in configs/policies: preempting as they do takes effect, and each stays as short as promised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qllm.config.policies import file_policy
from qllm.scheduler import Limits, make_policy
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings
from tests.worlds import run

EXAMPLES = sorted((Path(__file__).parents[2] / "configs" / "policies").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_serves_everybody_and_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 30
    trace = RequestTrace(np.arange(40) * 1e-3, np.full(40, 30), np.full(40, 5), np.arange(40) % 2, ("ls", "be"))
    result = run(trace, file_policy(path, None, {}), Limits(max_seqs=8), PassCostModel(affine_timings()))
    assert (result.status == 0).all()


def test_a_policy_that_only_says_when_to_preempt_lets_what_waits_run_first() -> None:
    """A pass that was stopped for somebody must not be the one that goes on."""
    steps = PassCostModel(affine_timings(layers=8, experts=8))
    trace = RequestTrace(
        np.array([0.0, 1e-3]), np.array([4000, 10]), np.array([1, 1]), np.array([1, 0]), ("ls", "be", "bulk")
    )
    policy = file_policy(next(path for path in EXAMPLES if path.stem == "deadline_first"), None, {})
    result = run(trace, policy, Limits(), steps)
    plain = run(trace, make_policy("priority"), Limits(), steps)
    assert result.finish[1] < result.finish[0]
    assert plain.finish[1] > plain.finish[0]
    assert result.preemptions[0] == 1
