"""Requests that follow others, in files: written and read again they are the same, and so is what comes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from qllm import simulate
from qllm.capacity.capacity import find_capacity
from qllm.config.config import load_config
from qllm.config.workload import check_for_engine, request_trace
from qllm.config.yaml_lines import ConfigError
from qllm.traces.requests.generate import assign_arrivals
from qllm.traces.requests.readers import read_requests
from qllm.traces.requests.trace import RequestTrace, TraceError, TraceWarning
from qllm.traces.requests.writers import write_requests
from qllm.traces.sessions import Sessions
from tests.cli_support import qllm

CONFIG = {
    "timings": "a100-mixtral-8x7b-int4",
    "classes": {
        "ls": {"priority": 0, "share": 0.5, "prompt": 50, "output": {"uniform": [2, 9]}, "slo": {"ttft": 1.0}},
        "be": {"priority": 1, "prompt": 300, "output": 20},
    },
    "policies": ["fcfs", "hybrid"],
    "requests": 40,
}
TALK = {"process": "conversations", "turns": 3, "think_s": 2.0}
LOOP = {"process": "closed", "clients": 5, "think_s": 0.7}
#: A chat of three turns, one of one, and a turn whose parent is not in this part of the trace.
CHATS = [
    {"chat_id": 1, "parent_chat_id": -1, "timestamp": 100.5, "input_length": 40, "output_length": 5, "turn": 1},
    {"chat_id": 2, "parent_chat_id": -1, "timestamp": 101.0, "input_length": 50, "output_length": 5, "turn": 1},
    {"chat_id": 3, "parent_chat_id": 1, "timestamp": 103.5, "input_length": 60, "output_length": 5, "turn": 2},
    {"chat_id": 9, "parent_chat_id": 8, "timestamp": 104.0, "input_length": 70, "output_length": 5, "turn": 2},
    {"chat_id": 4, "parent_chat_id": 3, "timestamp": 104.0, "input_length": 80, "output_length": 5, "turn": 3},
]


def written(path: Path, config: dict, name: str = "c.yaml") -> Path:
    (path / name).write_text(yaml.safe_dump(config))
    return path / name


def lines(path: Path, rows: list) -> Path:
    text = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(text) + "\n")
    return path


@pytest.mark.filterwarnings("ignore:.*hash_ids")
@pytest.mark.parametrize("arrival", [TALK, LOOP], ids=["conversations", "closed"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_what_a_configuration_sends_is_written_and_replayed_with_the_same_sessions(tmp_path, arrival, suffix):
    config = CONFIG | {"arrival": arrival, "seeds": [3]} | ({"rate": 2.0} if arrival is TALK else {})
    source = written(tmp_path, config)
    made = qllm("trace", "make", f"t.{suffix}", "--config", source, "--seed", 3, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    trace = request_trace(load_config(source), 3)
    again = read_requests(tmp_path / f"t.{suffix}")
    assert again == (trace if suffix == "jsonl" else replace(trace, prefixes=None))
    assert ("hash_ids (prompts that begin alike) are left out" in made.stderr) == (suffix == "csv" and arrival is TALK)
    assert (again.sessions.follows >= 0).sum() > 20
    classes = {
        name: {key: job[key] for key in ("priority", "slo") if key in job} for name, job in CONFIG["classes"].items()
    }
    replay = {key: config[key] for key in ("timings", "policies", "seeds")} | {"classes": classes}
    replay["arrival"] = {"process": "trace", "file": f"t.{suffix}"}
    first, second = simulate(source).requests, simulate(written(tmp_path, replay, "r.yaml")).requests
    assert (first["arrival_s"] > trace.arrival.max()).any()
    pd.testing.assert_frame_equal(first.drop(columns="rate"), second.drop(columns="rate"), check_exact=True)
    told = qllm("trace", "describe", f"t.{suffix}", cwd=tmp_path).stdout
    assert f"{(again.sessions.follows >= 0).sum()} requests follow others, after " in told


def test_a_configuration_that_sweeps_says_at_which_rate(tmp_path):
    swept = written(tmp_path, CONFIG | {"arrival": TALK, "sweep": {"rate": [1, 2]}})
    assert qllm("trace", "make", "t.csv", "--config", swept, "--rate", 2, cwd=tmp_path).returncode == 0
    sent = request_trace(load_config(swept).at({"rate": 2.0}), 0)
    assert read_requests(tmp_path / "t.csv") == replace(sent, prefixes=None)
    refused = qllm("trace", "make", "t.csv", "--config", swept, cwd=tmp_path)
    assert (refused.returncode, "sweeps rate; allowed: --rate" in refused.stderr) == (2, True)
    refused = qllm("trace", "make", "t.csv", "--config", swept, "--prompt", 5, cwd=tmp_path)
    assert "--prompt: is a matter of the configuration (--config)" in refused.stderr


def test_chats_follow_their_parents_on_request(tmp_path):
    file = lines(tmp_path / "chats.jsonl", CHATS)
    assert read_requests(file).sessions is None
    trace = read_requests(file, sessions=True)
    assert trace.sessions == Sessions(np.array([-1, -1, 0, -1, 2]), np.array([0, 0, 3.0, 0, 0.5]))
    assert trace == read_requests(lines(tmp_path / "text.jsonl", [
        row | {key: str(row[key]) for key in ("chat_id", "parent_chat_id")} for row in CHATS
    ]), sessions=True)  # fmt: skip
    config = {key: CONFIG[key] for key in ("timings", "policies")} | {"classes": {"all": {}}}
    arrival = {"process": "trace", "file": str(file)}
    plain = simulate(written(tmp_path, config | {"arrival": arrival})).requests
    assert plain["arrival_s"].tolist() == [0, 0.5, 3.0, 3.5, 3.5] * 2
    talked = simulate(written(tmp_path, config | {"arrival": arrival | {"sessions": True}})).requests
    for _, found in talked.groupby("policy", observed=True):
        arrived, ended = found["arrival_s"].to_numpy(), found["finish_s"].to_numpy()
        np.testing.assert_allclose(arrived[[0, 1, 3]], [0, 0.5, 3.5])
        np.testing.assert_allclose(arrived[[2, 4]] - ended[[0, 2]], [3.0, 0.5], atol=1e-5)
    made = qllm("trace", "make", "own.csv", "--from", file, "--sessions", "--rate", 4, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    own = read_requests(tmp_path / "own.csv")
    assert own == trace.at_rate(4.0)
    assert own.sessions == trace.sessions  # who thinks does not hurry


@pytest.mark.parametrize("key", ["chat_id", "parent_chat_id"])
@pytest.mark.parametrize("value", [None, 1.5, True, [1]])
def test_a_chat_without_a_name_is_told(tmp_path, key, value):
    broken = lines(tmp_path / "chats.jsonl", [CHATS[0], CHATS[1] | {key: value}])
    with pytest.raises(TraceError, match=rf"chats\.jsonl, line 2: {key} is .*, must be an integer or text"):
        read_requests(broken, sessions=True)


HEAD = "arrival_s,prompt_tokens,output_tokens,follows,think_s"
BROKEN = [
    ("1,5,5,1,0", {"follows": 1}, r"line 3: follows is 1, must be the number of a row before its own, from 0 on \(1\)"),
    ("1,5,5,-1,0", {"follows": -1}, "line 3: follows is .*-1.*, must be the number"),
    ("1,5,5,0.5,0", {"follows": 0.5}, "line 3: follows is .*0.5.*, must be the number"),
    ("1,5,5,x,0", {"follows": "x"}, "line 3: follows is .*x.*, must be the number"),
    ("1,5,5,0,-1", {"follows": 0, "think_s": -1}, "line 3: think_s is .*-1.*, must be a number >= 0"),
    ("1,5,5,0,nan", {"follows": 0, "think_s": "nan"}, "line 3: think_s is .*nan.*, must be a number >= 0"),
    ("1,5,5,,3", {"think_s": 3}, "line 3: think_s is 3, must be .* where follows says whom it follows"),
]


@pytest.mark.parametrize(("row", "keys", "says"), BROKEN)
def test_what_is_wrong_with_a_row_is_told_with_its_line(tmp_path, row, keys, says):
    plain = {"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 5}
    files = [
        lines(tmp_path / "t.csv", [HEAD, "0,5,5,,", row, "2,5,5,1,4"]),
        lines(
            tmp_path / "t.jsonl", ["", plain, plain | {"arrival_s": 1} | keys, plain | {"arrival_s": 2, "follows": 1}]
        ),
    ]
    for file in files:
        with pytest.raises(TraceError, match=says):
            read_requests(file)
        with pytest.warns(TraceWarning, match="1 invalid rows left out"):
            trace = read_requests(file, skip_invalid=True)
        # The third row still says whom it follows, who is not there: it comes by itself.
        assert (trace.arrival.tolist(), trace.sessions) == ([0, 2], None)


def test_rows_count_from_0_with_the_broken_ones_and_in_any_order_of_arrival(tmp_path):
    rows = ["# a comment", HEAD, "5,1,5,,", "broken", "9,2,5,0,", "7,3,5,,", "8,4,5,3,1.5"]
    with pytest.warns(TraceWarning):
        trace = read_requests(lines(tmp_path / "t.csv", rows), skip_invalid=True)
    assert trace.prompt_tokens.tolist() == [1, 3, 4, 2]
    assert trace.sessions == Sessions(np.array([-1, -1, 1, 0]), np.array([0, 0, 1.5, 0]))
    own = [{"arrival_s": at, "prompt_tokens": 1, "output_tokens": 1} for at in (5, 9, 7)]
    broken = [{"classes": ["all"]}, own[0], "{", own[1] | {"follows": 0}, own[2] | {"follows": 2, "think_s": 0}]
    with pytest.raises(TraceError, match="line 5: arrives before the request that it follows"), pytest.warns():
        read_requests(lines(tmp_path / "t.jsonl", broken), skip_invalid=True)


def test_traces_are_cut_and_moved_with_their_sessions(tmp_path):
    said = Sessions(np.array([-1, 0, 0, 2]), np.array([9.0, 1, 2, 3]))
    trace = RequestTrace(np.array([0.0, 0, 2, 2]), np.arange(1, 5), np.ones(4, int), np.zeros(4, int), sessions=said)
    assert said.think_s.tolist() == [0, 1, 2, 3]  # the first one follows none
    assert trace.head(3).sessions == Sessions(said.follows[:3], said.think_s[:3])
    assert trace.head(1).sessions is None
    for moved in (trace.spread(), trace.scaled(2), assign_arrivals(trace, rate=1, seed=0)):
        assert moved.sessions == said
    assert trace.describe()["sessions"] == {"first": 1, "following": 3, "think_s_p50": 2.0}
    assert said != 3
    assert Sessions(np.array([-1]), np.zeros(1)).describe()["think_s_p50"] == 0
    with pytest.raises(TraceError, match="sessions: are of 4 requests, arrival has 1 elements"):
        RequestTrace(np.zeros(1), np.ones(1, int), np.ones(1, int), np.zeros(1, int), sessions=said)
    write_requests(trace, tmp_path / "t.csv")
    config = {key: CONFIG[key] for key in ("timings", "policies")} | {"classes": {"all": {"slo": {"ttft": 1}}}}
    config |= {"arrival": {"process": "trace", "file": "t.csv"}, "rate": 1.0, "warmup": {"share": 0.1}}
    with pytest.raises(ConfigError, match="arrival: requests that follow others are simulated only"):
        check_for_engine(load_config(written(tmp_path, config)))
    with pytest.raises(ConfigError, match="warmup: requests of trace come when the last was answered"):
        find_capacity(written(tmp_path, config))
    (tmp_path / "azure.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,5,5\n")
    with pytest.raises(
        TraceError, match="rows of format azure do not say whom they follow; allowed: bailian, csv, jsonl"
    ):
        read_requests(tmp_path / "azure.csv", sessions=True)
