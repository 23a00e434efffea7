"""The programs in examples/ run and print what they are about; the README shows the policy of one of them."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    told = run("simulate.py", capsys)
    assert all(policy in told for policy in ("priority", "chunked", "hybrid", "imported"))


def test_my_policy(capsys: pytest.CaptureFixture[str]) -> None:
    told = run("my_policy.py", capsys)
    _, priority, _, mine, _ = told.splitlines()
    assert (priority.split()[:2], mine.split()[:2]) == (["priority", "ls"], ["mine", "ls"])
    assert float(mine.split()[2]) < float(priority.split()[2])  # LS TTFT p99


def test_serve(capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    pytest.importorskip("transformers")
    told = run("serve.py", capsys)
    assert told.count("urgent: token") == 8
    assert "patient: 8 tokens" in told


def test_the_readme_shows_the_policy_of_the_example() -> None:
    source = (EXAMPLES / "my_policy.py").read_text(encoding="utf-8")
    [policy] = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert ast.get_source_segment(source, policy) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path.name
