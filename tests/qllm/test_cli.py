"""The command line from outside: exit codes, one line for a mistake, what is written and printed."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from qllm.experiment.sweep import simulate
from tests.cli_support import CONFIG, qllm, write_config


def test_simulate_writes_its_files_and_prints_a_table(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    done = qllm("simulate", config, "--out", tmp_path / "out", "--jobs", 2, "--timeline")
    assert done.returncode == 0, done.stderr
    files = {path.name for path in (tmp_path / "out").iterdir()}
    tables = {"requests.parquet", "summary.csv", "differences.csv", "config.yaml", "timeline.json"}
    figures = {f"{name}.{kind}" for name in ("ttft", "throughput", "slo") for kind in ("png", "svg")}
    assert files == tables | figures | {"points", "timeline.png"}
    assert "qllm" in done.stdout
    assert "affine: modelled" in done.stdout  # a modelled number is never shown as a measured one
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_names_are_shown_as_they_are_written(tmp_path: Path) -> None:
    odd = ["[red]x[/blue]", "/tmp <b>& %s {}"]
    text = CONFIG.replace("- fcfs", f"- {{name: fcfs, label: '{odd[0]}'}}").replace("  be:", "  '[/b]':")
    text = text.replace("name: qllm", f"name: qllm, label: '{odd[1]}'")
    config = write_config(tmp_path, text.replace("rate: [5, 50]", "rate: [5]\n  classes.[/b].priority: [1, 2]"))
    done = qllm("simulate", config, "--out", tmp_path / "out", "--jobs", 1, "--timeline", "--set", "seeds=1")
    assert done.returncode == 0, done.stderr
    for name in (*odd, "[/b]", "classes.[/b].priority"):
        assert name in done.stdout
    report = qllm("report", tmp_path / "out")
    assert report.returncode == 0, report.stderr
    html = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;&amp;" in html
    assert "<b>& " not in html


def test_json_is_the_summary(tmp_path: Path) -> None:
    arguments = ["simulate", write_config(tmp_path), "--out", tmp_path / "out", "--format", "json"]
    done = qllm(*arguments, "--set", "sweep.rate=[5]", "--set", "seeds=1")
    rows = json.loads(done.stdout)
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert list(rows[0]) == list(summary.columns)
    assert [row["sent"] for row in rows] == summary["sent"].tolist()
    assert rows[1]["slo_attainment"] is None  # be has no SLO, and NaN is no JSON


def test_a_written_configuration_warns_where_versions_differ(tmp_path: Path) -> None:
    results = simulate(write_config(tmp_path), set=["sweep.rate=[5]", "seeds=1"])
    written = results.save(tmp_path / "out") / "config.yaml"
    text = written.read_text()
    old = next(line for line in text.splitlines() if line.strip().startswith("numpy:"))
    written.write_text(text.replace(old, "  numpy: 0.0.1"))
    done = qllm("simulate", written, "--out", tmp_path / "again")
    assert done.returncode == 0
    assert done.stderr.startswith(f"warning: {written}: numpy: 0.0.1 then")
    assert done.stderr.count("\n") == 1  # nothing else differs


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["simulate", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["simulate", "config.yaml", "--set", "sweep.rate=[-1]"], "--set sweep.rate=[-1]"),
        (["simulate", "config.yaml", "--set", "polices=[fcfs]"], "did you mean 'policies'"),
        (["simulate", "config.yaml", "--out", "config.yaml"], "--out config.yaml"),
        (["simulate", "config.yaml", "--set", "limits.memory_fraction=0.01"], "no room for KV"),
        (["simulate", "config.yaml", "--set", "popularity=mixtral-8x7b", "--set", "timings=other.csv"], "experts"),
        (["trace", "describe", "nowhere.csv"], "nowhere.csv"),
        (["trace", "describe", "config.yaml"], "config.yaml"),
        (["trace", "make", "out.csv", "--requests", "3", "--prompt", "5", "--output", "5"], "--rate: is missing"),
        (
            ["trace", "make", "out.txt", "--requests", "3", "--rate", "1", "--prompt", "5", "--output", "5"],
            ".csv or .jsonl",
        ),
        (["trace", "make", "out.csv", "--from", "config.yaml", "--prompt", "5"], "brings its own lengths"),
        (
            ["trace", "make", "out.csv", "--format", "azure", "--rate", "1", "--requests", "1"],
            "--format: belongs to --from",
        ),
        (["timings", "describe", "nowhere"], "a100-mixtral-8x7b-int4"),
        (["timings", "describe", "config.yaml"], "config.yaml"),
        (["timings", "import", "out.csv", "--model", "mixtral"], "did you mean 'mixtral-8x7b'"),
        (["timings", "import", "out.csv", "--model", "{name: x}"], "layers"),
        (["timings", "import", "out.csv", "--model", "mixtral-8x7b", "--source", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], expected: str, tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "other.csv").write_text((tmp_path / "timings.csv").read_text().replace("# experts: 8", "# experts: 4"))
    done = qllm(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert done.stdout == ""


def test_a_policy_that_breaks_is_named(tmp_path: Path) -> None:
    broken = (
        "from qllm.scheduler import Policy\n\nclass Mine(Policy):\n    def level(self, r):\n        return {}[r.cls]\n"
    )
    (tmp_path / "mine.py").write_text(broken)
    config = write_config(tmp_path, CONFIG.replace("- fcfs", "- {file: mine.py}"))
    done = qllm("simulate", config, "--out", tmp_path / "out", "--jobs", 2)
    assert done.returncode == 1
    assert "mine.py:5: KeyError" in done.stderr
    assert done.stdout.count("KeyError") == 4  # both rates and seeds; qllm's results stand above them
    assert "Traceback" not in done.stderr


def test_traces_are_made_described_and_converted(tmp_path: Path) -> None:
    made = tmp_path / "made.csv"
    recipe = [
        "--prompt",
        "{lognormal: {mean: 100, sigma: 1}}",
        "--output",
        "7",
        "--classes",
        "{ls: {share: 0.5}, be: {}}",
    ]
    done = qllm("trace", "make", made, "--rate", 4, "--requests", 200, *recipe)
    assert done.returncode == 0, done.stderr
    told = json.loads(qllm("trace", "describe", made, "--json").stdout)
    assert told["requests"] == 200
    assert told["rate_rps"] == pytest.approx(4, rel=0.3)
    assert told["output_tokens"]["min"] == told["output_tokens"]["max"] == 7
    assert set(told["classes"]) == {"ls", "be"}

    other = tmp_path / "other.jsonl"
    assert qllm("trace", "make", other, "--from", made, "--rate", 8, "--requests", 50).returncode == 0
    told = json.loads(qllm("trace", "describe", other, "--json").stdout)
    assert told["requests"] == 50
    assert told["rate_rps"] == pytest.approx(8)
    assert "be  " in qllm("trace", "describe", other).stdout


def test_timings_describe_says_where_the_numbers_come_from() -> None:
    listed = qllm("timings", "describe").stdout
    assert "a100-qwen3-30b-a3b-bf16" in listed
    told = qllm("timings", "describe", "a100-mixtral-8x7b-4bit-hf").stdout
    assert "modelled" in told
    assert "licence" in told
    described = json.loads(qllm("timings", "describe", "a100-mixtral-8x7b-int4", "--json").stdout)
    assert described["source"] == "imported"


def test_help_and_import_load_nothing_heavy() -> None:
    """What makes `qllm --help` quick: none of the slow imports happen."""
    from subprocess import run
    from sys import executable

    code = """
import sys, qllm, qllm.cli
heavy = {"pandas", "pyarrow", "matplotlib", "numpy", "torch", "simpy", "joblib"} & set(sys.modules)
assert not heavy, heavy
from qllm import sim
assert "torch" not in sys.modules
from qllm import simulate, load_results, plot_slo
assert callable(simulate) and callable(load_results) and callable(plot_slo)
assert "torch" not in sys.modules
"""
    assert run([executable, "-c", code], capture_output=True, text=True).stderr == ""
    assert qllm("--help").returncode == 0
