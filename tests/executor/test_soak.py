"""benchmarks/soak.py, for a few dozen requests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.parametrize(("policy", "evict", "merge"), [("qllm", "offload", True), ("hybrid", "recompute", False)])
def test_random_load_with_aborts_and_exceptions_leaves_nothing_behind(one_thread, policy, evict, merge):
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.soak(0.0, seed=1, policy=policy, evict=evict, merge=merge, at_least=60)
    assert module.flaws(found) == []
    assert found["sent"] >= 60
    assert found["cancelled"] > 0
