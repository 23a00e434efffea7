"""The shape of the house: one import package, arrows that run downwards only, folders and files that fit in a head."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("scheduler", "sim", "traces", "executor", "qllm")

#: What the ground floor must not know: the scheduler reads no clock, draws no number, does no I/O.
FOREIGN = {
    "scheduler": {
        "torch",
        "simpy",
        "numpy",
        "time",
        "datetime",
        "threading",
        "asyncio",
        "io",
        "os",
        "pathlib",
        "random",
    },
    "traces": {"torch", "simpy"},
    "sim": {"torch", "time"},
    "executor": {"simpy"},
    "qllm": set(),
}

#: Folder -> the folders of this project that it may import from, besides itself. Everything below `X` counts as `X`.
ARROWS = {
    "scheduler": {"scheduler/policies"},
    "scheduler/policies": {"scheduler"},
    "traces": {"traces/requests", "traces/step_times", "traces/step_times/aiconfigurator"},
    "traces/requests": {"traces", "traces/requests/clients"},
    "traces/requests/clients": {"traces", "traces/requests"},
    "traces/step_times": {"traces"},
    "traces/step_times/aiconfigurator": {"traces", "traces/step_times"},
    "sim": {"scheduler", "traces"},
    "executor": {"executor/engine", "executor/model", "executor/sampling"},
    "executor/sampling": {"executor"},
    "executor/cpu": set(),
    "executor/quantised": {"executor", "executor/cpu"},
    "executor/gpu": {"executor/gpu/fused", "executor/latent"},
    "executor/gpu/fused": {"executor/gpu"},
    "executor/model": {
        *("executor", "executor/cpu", "executor/gpu", "executor/gpu/fused"),
        *("executor/checkpoint", "executor/latent", "executor/quantised", "executor/recurrent", "executor/unpacked"),
    },
    "executor/checkpoint": {"executor", "executor/model", "executor/quantised"},
    "executor/latent": {"executor/model", "executor/unpacked"},
    "executor/recurrent": {"executor/model"},
    "executor/unpacked": {"executor/model", "executor/recurrent"},
    "executor/graphs": {"executor", "executor/gpu", "executor/latent", "executor/model", "executor/quantised"},
    "executor/engine": {
        "executor",
        *(f"executor/{below}" for below in ("cpu", "gpu", "graphs", "model", "recurrent", "sampling")),
        "scheduler",
        "traces",
    },
    "executor/calibration": {
        *("executor", "executor/engine", "executor/gpu", "executor/graphs", "executor/model", "executor/sampling"),
        *("scheduler", "traces"),
    },
    "qllm": {
        *("qllm/capacity", "qllm/cli", "qllm/config", "qllm/experiment", "qllm/plots"),
        *("executor", "scheduler", "traces"),
    },
    "qllm/config": {"qllm", "scheduler", "sim", "traces"},
    "qllm/experiment": {"qllm", "qllm/config", "executor", "scheduler", "sim", "traces"},
    "qllm/capacity": {"qllm", "qllm/config", "qllm/experiment", "scheduler", "sim", "traces"},
    "qllm/plots": {"qllm", "qllm/capacity", "qllm/config", "qllm/experiment", "sim", "traces"},
    "qllm/validation": {"qllm/config", "qllm/experiment", "executor", "scheduler", "sim", "traces"},
    "qllm/server": {
        *("qllm", "qllm/config", "qllm/server/answers", "qllm/server/batches"),
        *("executor", "scheduler", "traces"),
    },
    "qllm/server/answers": {"qllm/server", "executor"},
    "qllm/server/batches": {"qllm", "qllm/config", "qllm/server", "traces"},
    "qllm/server/process": {"qllm/server", "executor"},
    "qllm/server/replicas": {
        *("qllm", "qllm/config", "qllm/server", "qllm/server/batches", "qllm/server/process"),
        *("executor", "traces"),
    },
    "qllm/cli": {
        *("qllm", "qllm/capacity", "qllm/config", "qllm/experiment", "qllm/plots", "qllm/validation"),
        *("qllm/server", "qllm/server/process", "qllm/server/replicas"),
        *("executor", "traces"),
    },
}
#: What lies in a folder itself and may be imported from below: its errors and what its subfolders share.
SHARED = {
    "executor": {"qllm.executor.checks", "qllm.executor.errors"},
    "qllm": {"qllm.errors", "qllm._version"},
    "traces": {
        "qllm.traces.comment_header",
        "qllm.traces.files",
        "qllm.traces.import_defaults",
        "qllm.traces.messages",
        "qllm.traces.prefixes",
        "qllm.traces.session_rows",
        "qllm.traces.sessions",
        "qllm.traces.wants",
    },
}

FILES = sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))
IDS = [path.relative_to(ROOT).as_posix() for path in FILES]


def imports(path: Path) -> Iterator[str]:
    """Full names that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; allowed: full names"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder_of(name: str) -> str:
    """The folder that the module or name `qllm...` lies in."""
    words = name.split(".")[1:]
    if not words or words[0] not in PARTS:
        words = ["qllm", *words]
    while words and not (ROOT / "/".join(words)).is_dir():
        words.pop()
    return "/".join(words)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_arrows_run_downwards_only(path: Path) -> None:
    folder = path.relative_to(ROOT).parent.as_posix()
    part = folder.split("/")[0]
    allowed = ARROWS[folder] | {folder}
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in FOREIGN[part], f"{path.name} imports {top}"
        assert top not in {"scheduler", "sim", "traces", "executor"}, f"{name}: write qllm.{name}"
        if top != "qllm" or name.startswith("qllm._lazy."):  # every face may be lazy
            continue
        target = folder_of(name)
        if target in SHARED and target != folder and part == target:
            assert any(name.startswith(shared) for shared in SHARED[target]), f"{path.name} imports {name}"
        assert target in allowed or target.split("/")[0] in allowed - {part}, f"{path.name} imports {name}"


def test_every_folder_has_its_arrows_and_is_installed() -> None:
    folders = {path.relative_to(ROOT).parent.as_posix() for path in FILES}
    assert folders == {*ARROWS}
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    names = {f.replace("/", ".") if f.startswith("qllm") else f"qllm.{f.replace('/', '.')}" for f in folders}
    assert {*setuptools["packages"]} == names


def test_folders_and_files_fit_in_a_head() -> None:
    folders = [path.parent for path in FILES]
    assert {f.relative_to(ROOT).as_posix(): folders.count(f) for f in folders if folders.count(f) > 15} == {}
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in zip(IDS, FILES, strict=True)}
    assert {name: n for name, n in lines.items() if n > 320} == {}


@pytest.mark.parametrize("part", ["scheduler", "sim", "traces", "executor"])
def test_a_bare_import_is_answered_with_the_right_name(part: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {part}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"from qllm.{part} import" in done.stderr.splitlines()[-1]
