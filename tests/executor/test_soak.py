"""benchmarks/soak.py, for a few rounds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"

pytestmark = [
    pytest.mark.filterwarnings("ignore:another engine of this process:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),  # a policy that raises
]


@pytest.fixture
def soak(one_thread, monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", module)  # its dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROUND_S", (0.5, 1.0))
    return module


def test_random_load_with_aborts_and_exceptions_leaves_nothing_behind(soak):
    found = soak.soak(0.0, seed=3, only=["qwen3_moe", "gpt_oss"], rounds=8)
    assert found["wrong"] == []
    assert found["rounds"] == 8
    assert found["families"] == ["gpt_oss", "qwen3_moe"]
    assert found["sent"] >= 8


def test_a_wrong_token_is_found(soak, monkeypatch):
    right = soak.subject

    def altered(family):
        subject = right(family)
        for of_prompt in subject.answers:
            of_prompt[0][0] += 1
        return subject

    monkeypatch.setattr(soak, "subject", altered)
    assert soak.soak(0.0, seed=3, only=["qwen3_moe"], rounds=3)["wrong"]
