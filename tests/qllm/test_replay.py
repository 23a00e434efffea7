"""Replaying a recorded trace: units, coinciding arrivals, rows left out, batches; from YAML and the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

from qllm.config.config import load_config
from qllm.config.workload import request_trace
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.sweep import simulate
from qllm.traces.requests.readers import read_requests
from qllm.traces.requests.trace import TraceError, TraceWarning
from tests.cli_support import qllm

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


def replay(folder: Path, text: str, arrival: str = "", more: str = "", suffix: str = "csv") -> Path:
    (folder / f"trace.{suffix}").write_text(text)
    path = folder / "replay.yaml"
    path.write_text(
        "timings: a100-mixtral-8x7b-int4\nclasses: {all: {slo: {ttft: 1.0}}}\npolicies: [fcfs, qllm]\n"
        f"arrival: {{process: trace, file: trace.{suffix}{arrival}}}\n{more}"
    )
    return path


def test_unit_and_spread_are_keys(tmp_path: Path) -> None:
    text = HEADER + "0,10,2\n0,20,2\n3000,30,2\n"
    config = load_config(replay(tmp_path, text, ", unit: ms, spread: true"))
    assert request_trace(config, 0).arrival.tolist() == [0, 1.5, 3]
    stretched = load_config(replay(tmp_path, text, ", unit: ms, spread: true", "rate: 2\n"))
    assert request_trace(stretched, 0).arrival.tolist() == [0, 0.5, 1]
    plain = load_config(replay(tmp_path, text), ["arrival.unit=ms"])
    assert request_trace(plain, 0).arrival.tolist() == [0, 0, 3]
    first = load_config(replay(tmp_path, text, ", unit: ms, spread: true", "requests: 2\n"))
    assert request_trace(first, 0).arrival.tolist() == [0, 1.5], "spread before it is cut"
    for arrival, message in ((", unit: h", "arrival.unit: 'h' is unknown"), (", spread: 3", "arrival.spread: ")):
        with pytest.raises(ConfigError, match=message):
            load_config(replay(tmp_path, text, arrival))


def test_bailian_can_be_named(tmp_path: Path) -> None:
    rows = [{"timestamp": time, "input_length": 20, "output_length": 2} for time in (1.25, 2.5)]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    with pytest.raises(TraceError, match=r"line 1: timestamp is 1.25.*say which by format"):
        request_trace(load_config(replay(tmp_path, text, suffix="jsonl")), 0)
    config = load_config(replay(tmp_path, text, ", format: bailian", suffix="jsonl"))
    assert request_trace(config, 0).arrival.tolist() == [0, 1.25]


def test_skip_invalid_is_a_key_and_each_sweep_says_what_it_left_out(tmp_path: Path) -> None:
    text = HEADER + "0,10,2\n1,0,2\n2,20,2\n3,5,0.5\n"
    with pytest.raises(TraceError, match="line 3: prompt_tokens is '0'"):
        simulate(replay(tmp_path, text))
    path = replay(tmp_path, text, ", skip_invalid: true")
    for _ in range(2):  # the second finds the trace in memory
        with pytest.warns(TraceWarning, match="2 invalid rows left out; the first: line 3: prompt_tokens is '0'"):
            assert len(simulate(path).requests) == 2 * 2


def test_unused_prefixes_are_told_by_a_sweep(tmp_path: Path) -> None:
    row = '{"timestamp": %d, "input_length": 100, "output_length": 2, "hash_ids": [1]}\n'
    row = row.replace("100,", "512,", 1)
    with pytest.warns(TraceWarning, match=r"hash_ids .* 50.0 % of the prompt tokens. .* without limits.prefix_cache"):
        simulate(replay(tmp_path, row % 0 + row % 1000, suffix="jsonl"))


@pytest.mark.parametrize("text", ["0,100,10\n0,200,20\n0,300,5\n", "3,100,10\n", "1.5,100,10\n1.5,100,10\n"])
def test_a_batch_is_simulated_without_a_rate(tmp_path: Path, text: str) -> None:
    path = replay(tmp_path, HEADER + text)
    out = tmp_path / "out"
    done = qllm("simulate", path, "--out", out, "--jobs", 1, "--format", "json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert {row["rate"] for row in summary} == {0.0}
    assert {row["completed"] for row in summary} == {text.count("\n")}
    results = simulate(path)
    assert set(results.requests["rate"]) == {0.0}
    assert np.isfinite(results.summary[["rate", "ttft_mean_s", "throughput_rps", "turnaround_mean_s"]]).all(axis=None)
    refused = qllm("simulate", path, "--set", "rate=2", "--out", tmp_path / "other")
    assert refused.returncode == 2
    assert "rate: " in refused.stderr
    assert "leave rate out (a batch), or give the trace arrivals" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_batch_is_described_and_converted(tmp_path: Path) -> None:
    replay(tmp_path, HEADER + "5,100,10\n5,200,20\n")
    trace, out = tmp_path / "trace.csv", tmp_path / "made.csv"
    told = qllm("trace", "describe", trace).stdout
    assert "rate_rps     none" in told
    assert "2 of 2 requests share 1 of 1 instants: a batch, without a rate" in told
    assert "2 requests, all at one instant" in qllm("trace", "make", out, "--from", trace).stdout
    assert read_requests(out) == read_requests(trace)
    refused = qllm("trace", "make", out, "--from", trace, "--spread")
    assert refused.returncode == 2
    assert "spread: all 2 requests of this trace arrive at one instant" in refused.stderr
    given = qllm("trace", "make", out, "--from", trace, "--rate", 2, "--arrival", "poisson")
    assert given.returncode == 0
    assert read_requests(out).rate is not None


def test_the_command_line_says_format_unit_and_what_coincides(tmp_path: Path) -> None:
    row = '{"timestamp": %d, "input_length": 1000, "output_length": 2, "hash_ids": [%d, %d]}\n'
    text = row % (0, 1, 2) + row % (0, 1, 3) + row % (3000, 1, 2)
    replay(tmp_path, text, suffix="jsonl")
    trace, out = tmp_path / "trace.jsonl", tmp_path / "made.csv"
    told = qllm("trace", "describe", trace)
    assert told.stderr == ""
    assert "format       mooncake\ntime_unit    ms\n" in told.stdout
    assert "2 of 3 requests share 1 of 2 instants, 3 s apart" in told.stdout
    assert "hash_ids (prompts that begin alike) in blocks of 512 tokens" in told.stdout
    assert "34.1 % of the prompt tokens" in told.stdout
    as_json = json.loads(qllm("trace", "describe", trace, "--json", "--unit", "s").stdout)
    assert (as_json["format"], as_json["time_unit"], as_json["duration_s"]) == ("mooncake", "s", 3000.0)
    made = qllm("trace", "make", out, "--from", trace, "--spread")
    assert "hash_ids" in made.stderr
    assert read_requests(out).arrival.tolist() == [0, 1.5, 3]
    refused = qllm("trace", "make", out, "--rate", 1, "--requests", 2, "--prompt", 5, "--output", 5, "--spread")
    assert "--spread: belongs to --from FILE" in refused.stderr
