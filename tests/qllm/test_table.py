"""The printed table: what stands in it and below it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qllm.cli.table import print_table
from qllm.experiment.results import Results
from qllm.experiment.sweep import simulate
from tests.cli_support import write_config


def printed(results: Results, capsys: pytest.CaptureFixture[str]) -> str:
    print_table(results, "Timings: made up", Path("out/x"))
    return capsys.readouterr().out


def row(text: str, cls: str, policy: str) -> list[str]:
    """The cells of a line of the table after class and policy."""
    [line] = [line for line in text.splitlines() if re.search(rf"\b{cls} +{policy}\b", line)]
    return line.split(policy)[1].split()


def test_rejections_come_with_their_reason_and_a_count(tmp_path: Path, capsys) -> None:
    limited = ["limits.kv_blocks=40", "sweep.rate=[5]", "seeds=1"]
    results = simulate(write_config(tmp_path), set=limited)
    text = printed(results, capsys)
    rejected = results.summary.set_index(["class", "policy"])["rejected"]
    assert rejected["be", "fcfs"] > 0
    assert row(text, "be", "fcfs")[-2] == str(rejected["be", "fcfs"])
    [told] = re.findall(r"Rejected (\d+) of (\d+) requests, such as: request \d+: .* KV blocks of 16 tokens", text)
    assert told == (str(rejected.sum()), str(len(results.requests)))
    whole = printed(simulate(write_config(tmp_path), set=["sweep.rate=[5]", "seeds=1"]), capsys)
    assert "Rejected" not in whole


def test_evictions_peak_kv_use_and_saturation_have_columns(tmp_path: Path, capsys) -> None:
    tight = ["limits.kv_blocks=60", "sweep.rate=[200]", "requests=100", "limits.max_seqs=4", "seeds=1"]
    results = simulate(write_config(tmp_path), set=[*tight, "policies=[priority]"])
    [be] = results.summary[results.summary["class"] == "be"].to_dict("records")
    assert be["evictions"] > 0
    assert be["saturated"]
    assert results.requests["kv_peak"].between(0.5, 1).all()
    text = printed(results, capsys)
    evictions, rejected = str(be["evictions"]), str(be["rejected"])
    assert row(text, "be", "priority")[-5:] == [
        "yes",
        str(be["preemptions"]),
        evictions,
        rejected,
        f"{be['kv_peak']:.0%}",
    ]
    assert "Done per s: finished requests of the class / makespan" in text
    assert "Saturated: its queue still grew when arrivals ended" in text


def test_no_number_is_cut_and_no_name_is_taken_for_markup(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    swept = ["policies=[{name: fcfs, label: '[red]x[/blue]'}]", "sweep.rate=[5]", "seeds=1"]
    text = printed(simulate(write_config(tmp_path), set=[*swept, "sweep.timings=[timings.csv]"]), capsys)
    assert "…" not in text
    assert "[red]x[/blue]" in text
    assert "timings.csv" in text


def test_a_batch_has_no_rate(tmp_path: Path, capsys) -> None:
    (tmp_path / "batch.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,100,5\n0,50,5\n")
    text = "name: batch\ntimings: timings.csv\nclasses: {ls: {}}\narrival: {process: trace, file: batch.csv}\n"
    table = printed(simulate(write_config(tmp_path, text + "policies: [fcfs]\n")), capsys)
    assert re.search(r"^ +- +ls +fcfs", table, re.MULTILINE)
