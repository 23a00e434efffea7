"""benchmarks/gpu.py: every part runs on a CPU, and what breaks takes nothing else with it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)
    spec.loader.exec_module(module)
    return module


def rows(path: Path, table: str) -> dict[str, dict]:
    found = json.loads(path.read_text())[table]
    return {row[0]: dict(zip(found["columns"], row, strict=True)) for row in found["rows"]}


def test_every_part_gives_its_figures_on_a_cpu_and_nothing_is_judged(gpu, tmp_path):
    command = [sys.executable, str(SCRIPT), "--tiny", "--minutes", "4", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    figures, parts = rows(tmp_path / "gpu.json", "figures"), rows(tmp_path / "gpu.json", "parts")
    assert {part["told"] for part in parts.values()} == {"done"}
    assert [*figures] == [figure.name for part in gpu.PARTS for figure in part.figures]
    assert all(row["value"] is not None for row in figures.values())
    assert {row["verdict"] for row in figures.values()} == {"", "not judged"}
    assert figures["differing_bits"]["value"] == 0
    assert figures["families_wrong"]["value"] == 0


def test_every_part_has_a_function(gpu):
    from gpu_parts import checks, passes, serving

    for part in gpu.PARTS:
        assert sum(callable(getattr(module, part.name, None)) for module in (passes, serving, checks)) == 1, part.name


def test_goals_are_judged_on_the_device_that_they_are_for_and_grow_with_the_layers(gpu, tmp_path):
    report = gpu.Report(gpu.PARTS, tmp_path / "gpu.json")
    report.take("fact", "machine", {"device": "NVIDIA H200"})
    report.take("figure", "decode_1", 7.9)
    assert rows(tmp_path / "gpu.json", "figures")["decode_1"]["verdict"] == "pass"
    assert not report.bad
    report.take("fact", "layers", 24)
    row = rows(tmp_path / "gpu.json", "figures")["decode_1"]
    assert (row["goal"], row["verdict"]) == ("<= 4", "missed")
    assert report.bad


def test_a_part_without_time_is_no_failure_and_one_that_broke_is(gpu, tmp_path):
    report = gpu.Report(gpu.PARTS, tmp_path / "gpu.json")
    for part in gpu.PARTS:
        report.ended(part.name, 0.0, "no time")
    assert not report.bad
    report.ended("kv", 1.0, "RuntimeError: no memory")
    row = rows(tmp_path / "gpu.json", "figures")["kv_back"]
    assert (row["verdict"], row["note"]) == ("failed", "RuntimeError: no memory")
    assert report.bad


def answer(conn, tiny, graphs):
    """A process of parts that breaks in several ways."""
    while True:
        name, _ = conn.recv()
        if name == "dies":
            os._exit(3)
        if name == "hangs":
            conn.recv()
        conn.send(("figure", "kv_back", 1.0, ""))
        usable = name != "breaks" and not (name == "build" and graphs)
        conn.send(("end", "RuntimeError: no" if name == "fails" else "", usable))
        if not usable:
            return


def test_a_part_that_dies_or_hangs_ends_its_process_and_is_named(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "serve", answer)
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    told: list[tuple] = []
    asked = {
        "works": (60.0, ""),
        "fails": (60.0, "RuntimeError: no"),
        "hangs": (0.9, "no answer after 1 s"),
        "breaks": (60.0, ""),
        "dies": (60.0, "its process ended with exit code 3"),
    }
    child = gpu.Child(True)
    for name, (limit, why) in asked.items():
        if not child.alive:
            child = gpu.Child(True)
        assert child.run(name, limit, lambda *what: told.append(what)) == why
        assert child.alive == (name in ("works", "fails"))
    child.stop()
    assert told == [("figure", "kv_back", 1.0, "")] * 3


def test_where_graphs_break_the_process_the_next_one_does_without(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "serve", answer)
    report = gpu.Report(gpu.PARTS, None)
    child, told = gpu.built(True, True, report, time.monotonic() + 60)
    assert (told, child.alive) == ("", True)
    assert report.facts["graphs"].startswith("off")
    assert child.run("works", 60.0, report.take) == ""
    child.stop()
