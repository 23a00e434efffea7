"""Odd command lines: files that are missing or of another kind, folders that are in use, options that contradict."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from tests.odd_inputs.cases import ACCEPTED, Case, both, command, expect, refused_by_command, served
from tests.odd_inputs.configurations import BASE, files, written
from tests.odd_inputs.timing_traces import TEXT

AREA = "command line"
MISSING = [
    *(
        "missing",
        "folder",
        "/dev/null",
        "",
        "..",
        "t.csv",
        "pipe",
        "closed",
        "link",
        "x" * 300,
        "a\nb",
        "[red]x[/red]",
        "\udcff",
    ),
]
NAMES = ("", "missing", "nothing", "-x", "--help-me", "Simulate", "simulate\n", "日本")


def world() -> None:
    """The working folder of a case."""
    files()
    written(BASE)
    Path("folder").mkdir()
    Path("full").mkdir()
    Path("full", "mine.txt").write_text("mine")
    Path("closed").touch(0)
    Path("link").symlink_to("link")
    os.mkfifo("pipe")
    Path("timings.csv").write_text(TEXT)


def _wrong(arguments: tuple[str, ...]) -> str:
    world()
    return refused_by_command(command(*arguments))


def _right(arguments: tuple[str, ...], told: str) -> str:
    world()
    ended = command(*arguments)
    expect(ended.code == 0, f"exit code {ended.code}: {ended.err[-300:]}")
    expect(told in ended.out, f"{told!r} is not in {ended.out[:200]!r}")
    return ACCEPTED


def _out(name: str, right: bool) -> str:
    """Results that go to a folder of that name."""
    world()
    ended = command("simulate", "c.yaml", "--jobs", "1", "--out", name)
    both("somebody's file", "mine", Path("full", "mine.txt").read_text())
    if not right:
        return refused_by_command(ended)
    expect(ended.code == 0, f"exit code {ended.code}: {ended.err[-300:]}")
    both("requests", 6, len(served(pq.read_table(Path(name, "requests.parquet")).to_pandas())))
    return ACCEPTED


def _reported(break_it: str) -> str:
    """A report of results of which one file is broken."""
    world()
    expect(command("simulate", "c.yaml", "--jobs", "1", "--out", "out").code == 0, "not simulated")
    file, _, how = break_it.partition(": ")
    path = Path("out", file)
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "another table":
        pd.DataFrame({"x": [1]}).to_parquet(path)
    elif how == "no rows":
        pd.read_parquet(path).head(0).to_parquet(path)
    ended = command("report", "out")
    if ended.code == 0:
        expect(file not in ("requests.parquet", "config.yaml"), "a report of broken results")
        expect("Traceback" not in Path("out/report.html").read_text(), "a traceback in the report")
        return ACCEPTED
    return refused_by_command(ended, "out")


def _twice(change: tuple[str, ...], right: bool) -> str:
    """A second simulation to the folder of the first."""
    world()
    expect(command("simulate", "c.yaml", "--jobs", "1", "--out", "out").code == 0, "not simulated")
    before = Path("out/requests.parquet").read_bytes()
    ended = command("simulate", "c.yaml", "--jobs", "1", "--out", "out", *change)
    if not right:
        both("the results", before, Path("out/requests.parquet").read_bytes())
        return refused_by_command(ended, "out")
    expect(ended.code == 0, f"exit code {ended.code}: {ended.err[-300:]}")
    return ACCEPTED


def _wrongs() -> Iterator[tuple[str, ...]]:
    for name in NAMES:
        if name not in ("",):
            yield (name,)
    for name in MISSING:
        yield "simulate", name
        yield "report", name
        yield "run", name
        yield "trace", "describe", name
        yield "timings", "describe", name.replace("t.csv", "r.csv")
        yield "validate", name, "--model", "folder", "--timings", "timings.csv"
        yield "validate", "c.yaml", "--model", "folder", "--timings", name
        yield "validate", "c.yaml", "--model", name, "--timings", "timings.csv"
        yield "calibrate", "--model", name, "--out", "o.csv"
    for options in (
        ("--jobs", "0"),
        ("--jobs", "-1"),
        ("--jobs", "many"),
        ("--jobs", "1.5"),
        ("--format", "xml"),
        ("--backend", "slurm"),
    ):
        yield "simulate", "c.yaml", *options
    yield "simulate", "c.yaml", "--out"
    yield "simulate", "c.yaml", "c.yaml"
    yield "simulate", "c.yaml", "--set"
    yield "simulate", "c.yaml", "--nothing"
    yield ("simulate",)
    yield ("report",)
    yield "report", "folder", "full"
    yield "report", "folder", "--out", "o.html"
    yield "config", "keys", "nothing"
    yield "config", "keys", "limits.nothing"
    yield "config", "keys", "--format", "yaml"
    yield "config", "nothing"
    yield "trace", "nothing"
    yield "timings", "nothing"
    for options in (
        ("--device", "tpu"),
        ("--device", "cuda:99"),
        ("--device", ""),
        ("--dtype", "int3"),
        ("--dtype", ""),
    ):
        yield "calibrate", "--model", "folder", "--out", "o.csv", *options
        yield "run", "c.yaml", *options
    for options in (
        ("--threads", "0"),
        ("--threads", "x"),
        ("--max-tokens", "0"),
        ("--max-batch", "-1"),
        ("--prompts", "missing"),
    ):
        yield "calibrate", "--model", "folder", "--out", "o.csv", *options
    yield "calibrate", "--model", "folder"
    yield "calibrate", "--out", "o.csv"
    yield "run", "c.yaml", "--model", "missing/model"
    yield "run", "c.yaml", "--out", "full"
    yield "run", "c.yaml", "--out", "t.csv"
    yield "run", "c.yaml", "--set", "requests=1000000000"
    yield "validate", "c.yaml", "--model", "folder", "--timings", "timings.csv", "--out", "full"


def cases() -> Iterator[Case]:
    """All of them."""
    for arguments in _wrongs():
        told = " ".join(repr(one) if not one.isprintable() or not one else one[:40] for one in arguments)
        yield Case(AREA, f"qllm {told}", partial(_wrong, arguments))
    for arguments, text in (
        (("--version",), "qllm "),
        (("--help",), "simulate"),
        (("simulate", "--help"), "--out"),
        (("config", "keys"), "limits.max_seqs"),
        (("config", "keys", "limits", "--format", "json"), '"limits.max_seqs"'),
        (("trace", "describe", "r.csv", "--json"), '"requests": 4'),
        (("timings", "describe"), "a100"),
    ):
        yield Case(AREA, f"qllm {' '.join(arguments)}", partial(_right, arguments, text))
    for name, right in (
        ("out", True),
        ("a/b/c", True),
        ("folder", True),
        ("日本 x", True),
        ("full", False),
        ("t.csv", False),
        ("t.csv/x", False),
        ("/dev/null", False),
        ("/proc/x", False),
        ("pipe", False),
        ("link", False),
        ("x" * 300, False),
        (".", False),
    ):
        yield Case(AREA, f"--out {name[:40]}", partial(_out, name, right))
    for file in ("requests.parquet", "config.yaml", "summary.csv", "ttft.png"):
        for how in ("gone", "empty", "a folder", "cut"):
            if not (file == "config.yaml" and how == "cut"):
                yield Case(AREA, f"report, {file}: {how}", partial(_reported, f"{file}: {how}"))
    for how in ("another table", "no rows"):
        yield Case(AREA, f"report, requests.parquet: {how}", partial(_reported, f"requests.parquet: {how}"))
    for change, right in (
        ((), True),
        (("--set", "rate=30"), False),
        (("--set", "rate=30", "--force"), True),
        (("--fresh",), True),
        (("--set", "seeds=2"), False),
    ):
        yield Case(AREA, f"again {' '.join(change)}", partial(_twice, change, right))
