"""Sweeps: what runs, common random numbers, and the same bytes however often and on however many processes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qllm.config.config import load_config
from qllm.config.from_config import scheduler_limits
from qllm.config.workload import request_trace
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.results import CONFIG as RESOLVED
from qllm.experiment.results import REQUESTS, SUMMARY, Results, load_results
from qllm.experiment.run import runs
from qllm.experiment.sweep import differences, provenance, simulate
from qllm.plots.perfetto import record, timeline_runs, write_timeline
from qllm.traces.requests.readers import read_requests
from qllm.traces.requests.trace import RequestTrace, TraceError
from qllm.traces.requests.writers import write_requests
from qllm.traces.step_times.testing import affine_timings
from tests.cli_support import CONFIG, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return simulate(write_config(folder))


def test_every_point_policy_and_seed_is_run_once(results: Results) -> None:
    done = results.requests.groupby(["rate", "policy", "seed"], observed=True).size()
    assert sorted(done.index) == [(r, p, s) for r in (5.0, 50.0) for p in ("fcfs", "qllm") for s in (0, 1)]
    assert (done == 40).all()
    found = [(run.point["rate"], run.policy, run.seed) for run in runs(results.config)]
    assert found == [(r, p, s) for r in (5, 50) for p in (0, 1) for s in (0, 1)]


def test_every_policy_and_rate_sees_the_same_requests(results: Results) -> None:
    same = ["class", "prompt_tokens", "output_tokens"]
    by_run = dict(list(results.requests.groupby(["rate", "policy", "seed"], observed=True)))
    for (rate, _, seed), rows in by_run.items():
        first = by_run[5.0, "fcfs", seed]
        assert (rows[same].to_numpy() == first[same].to_numpy()).all()
        np.testing.assert_allclose(rows["arrival_s"] * rate, first["arrival_s"] * 5)
    assert (by_run[5.0, "fcfs", 0]["prompt_tokens"].to_numpy() != by_run[5.0, "fcfs", 1]["prompt_tokens"]).any()


def test_rows_add_up(results: Results) -> None:
    rows = results.requests
    assert (rows["status"] == "finished").all()
    turnaround = rows["finish_s"] - rows["arrival_s"]
    np.testing.assert_allclose(rows["queueing_s"] + rows["running_s"] + rows["suspended_s"], turnaround, atol=1e-9)
    assert (rows["arrival_s"] <= rows["first_launch_s"]).all()
    assert (rows["first_launch_s"] < rows["first_token_s"]).all()
    # on an idle device a request takes its isolated time, but for the routing that it draws
    assert ((rows["first_token_s"] - rows["arrival_s"]) / rows["isolated_ttft_s"]).min() == pytest.approx(1, abs=0.1)
    assert results.summary["sent"].sum() == len(rows)


@pytest.mark.parametrize("jobs", [1, 2])
def test_identical_bytes_for_every_run_and_any_number_of_jobs(
    jobs: int, folder: Path, results: Results, tmp_path: Path
) -> None:
    again = simulate(folder / "config.yaml", jobs=jobs)
    for name in (REQUESTS, SUMMARY):
        first = (results.save(tmp_path / "first") / name).read_bytes()
        assert first == (again.save(tmp_path / "again") / name).read_bytes()


def test_the_resolved_configuration_repeats_the_results(results: Results, tmp_path: Path) -> None:
    first = results.save(tmp_path / "first")
    second = simulate(first / RESOLVED).save(tmp_path / "second")
    assert (first / REQUESTS).read_bytes() == (second / REQUESTS).read_bytes()
    resolved = load_config(first / RESOLVED)
    assert resolved.seed_list == [0, 1]
    assert resolved.provenance["timings"].startswith("affine: modelled")
    assert differences(resolved.provenance, provenance(resolved)) == []
    assert differences({"numpy": "0.1"}, {"numpy": "2.0"}) == ["numpy: 0.1 then, 2.0 now"]


def test_results_are_read_back(results: Results, tmp_path: Path) -> None:
    back = load_results(results.save(tmp_path))
    pd.testing.assert_frame_equal(back.summary, results.summary, check_dtype=False)
    assert (pd.read_csv(tmp_path / SUMMARY).columns == results.summary.columns).all()
    with pytest.raises(ConfigError, match=r"requests\.parquet: no such file"):
        load_results(tmp_path / "nowhere")


def test_any_key_can_be_swept(tmp_path: Path) -> None:
    text = CONFIG.replace("rate: [5, 50]", "rate: [50]\n  limits.max_seqs: [1, 8]\n  policies.1.fill_tokens: [0, 64]")
    swept = simulate(write_config(tmp_path, text), set=["seeds=1"])
    fcfs = swept.summary[(swept.summary["policy"] == "fcfs") & (swept.summary["class"] == "ls")]
    assert fcfs["limits.max_seqs"].tolist() == [1, 1, 8, 8]
    slow, _, quick, _ = fcfs["ttft_mean_s"]
    assert slow > quick
    assert set(swept.requests["policies.1.fill_tokens"]) == {0, 64}


MIXED = {
    "null and numbers": ("policies.1.fill_tokens", "[null, 0, 512]", ["none", "0", "512"]),
    "null and a number": ("limits.kv_blocks", "[null, 5000]", ["none", "5000"]),
    "true and false": ("policies.1.merge", "[true, false]", ["true", "false"]),
    "kinds of length": (
        "classes.ls.prompt",
        "[9, {uniform: [1, 5]}, azure_conv]",
        ["9", "{uniform: [1, 5]}", "azure_conv"],
    ),
    "policies": ("policies.0", "[fcfs, {name: chunked, budget: 64}]", ["fcfs", "{budget: 64, name: chunked}"]),
    "whole and not": ("max_step", "[1, 0.5]", [1.0, 0.5]),
}


@pytest.mark.parametrize("kind", MIXED)
def test_values_of_any_kind_can_be_swept_written_and_read(kind: str, tmp_path: Path) -> None:
    key, values, shown = MIXED[kind]
    small = ["sweep.rate=[5]", "seeds=1", "requests=10", f"sweep.{key}={values}"]
    swept = simulate(write_config(tmp_path), set=small)
    assert swept.requests[key].drop_duplicates().tolist() == shown
    assert swept.summary[key].drop_duplicates().tolist() == shown
    back = load_results(swept.save(tmp_path / "out"))
    assert back.summary[key].tolist() == swept.summary[key].tolist()
    assert pd.read_csv(tmp_path / "out" / SUMMARY)[key].notna().all()
    again = simulate(tmp_path / "out" / RESOLVED)
    assert again.requests[key].tolist() == swept.requests[key].tolist()


def test_an_override_may_be_one_text(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    assert load_config(path, "requests=3") == load_config(path, ["requests=3"])


def test_rejected_requests_are_kept_with_their_reason(tmp_path: Path) -> None:
    limited = simulate(write_config(tmp_path), set=["limits.kv_blocks=40", "sweep.rate=[5]", "seeds=1"])
    rejected = limited.requests[limited.requests["status"] == "rejected"]
    assert 0 < len(rejected) < len(limited.requests)
    assert rejected["reason"].str.contains("KV blocks").all()
    assert rejected["finish_s"].isna().all()
    assert limited.summary["rejected"].sum() == len(rejected)


def test_duration_takes_what_arrives_until_then(tmp_path: Path) -> None:
    path = write_config(tmp_path, CONFIG.replace("requests: 40", "duration: 3"))
    config = load_config(path)
    at = config.at({"rate": 50})
    trace = request_trace(at, seed=0)
    assert 2.5 < trace.arrival[-1] <= 3
    longer = request_trace(at.model_copy(update={"duration": 6.0}), seed=0)
    assert longer.head(len(trace)) == trace
    assert longer.arrival[len(trace)] > 3
    with pytest.raises(ConfigError, match="no request arrives within"):
        request_trace(config.at({"rate": 1e-9}), seed=0)


def replay(tmp_path: Path, trace: RequestTrace, classes: str) -> Path:
    write_requests(trace, tmp_path / "trace.csv")
    start, end = CONFIG.index("classes:"), CONFIG.index("arrival:")
    text = CONFIG[:start] + classes + CONFIG[end:]
    text = text.replace("process: poisson", "process: trace, file: trace.csv").replace("requests: 40\n", "")
    return write_config(tmp_path, text)


def recorded(classes: tuple[str, ...], cls: list[int]) -> RequestTrace:
    n = len(cls)
    return RequestTrace(np.arange(n) / 10, np.arange(n) + 1, np.full(n, 3), np.array(cls), classes)


def test_a_replayed_trace_is_stretched_and_given_classes(tmp_path: Path) -> None:
    path = replay(tmp_path, recorded(("all",), [0] * 200), "classes: {ls: {share: 0.3}, be: {priority: 1}}\n")
    config = load_config(path)
    trace = request_trace(config.at({"rate": 5}), seed=0)
    assert trace.rate == pytest.approx(5)
    assert trace.classes == ("ls", "be")
    assert 0.15 < (trace.cls == 0).mean() < 0.45
    assert (trace.prompt_tokens == np.arange(200) + 1).all()
    assert (request_trace(config.at({"rate": 5}), seed=1).cls != trace.cls).any()
    assert request_trace(config.at({"rate": 50}), seed=0).cls.tolist() == trace.cls.tolist()
    with pytest.raises(TraceError, match="500 requests asked for, the trace holds 200"):
        request_trace(config.at({"rate": 5}).model_copy(update={"requests": 500}), seed=0)


def test_a_replayed_trace_may_bring_its_classes(tmp_path: Path) -> None:
    trace = recorded(("be", "ls"), [0, 1, 0, 0])
    config = load_config(replay(tmp_path, trace, "classes: {ls: {}, be: {priority: 1}}\n"))
    assert request_trace(config, seed=0).cls.tolist() == [0, 1, 0, 0]
    rows = simulate(config).requests
    assert rows["class"].tolist()[:4] == ["be", "ls", "be", "be"]
    config = load_config(replay(tmp_path, trace, "classes: {ls: {}, other: {priority: 1}}\n"))
    with pytest.raises(ConfigError, match=r"has the class 'be'; allowed: ls, other"):
        request_trace(config, seed=0)
    config = load_config(replay(tmp_path, trace, "classes: {ls: {share: 0.5}, be: {priority: 1}}\n"))
    with pytest.raises(ConfigError, match="leave share out"):
        request_trace(config, seed=0)


def test_a_broken_trace_names_file_and_line(tmp_path: Path) -> None:
    path = replay(tmp_path, recorded(("all",), [0] * 3), "classes: {ls: {}}\n")
    broken = (tmp_path / "trace.csv").read_text().replace("0.1,2,3", "0.1,two,3")
    (tmp_path / "trace.csv").write_text(broken)
    line = next(i for i, text in enumerate(broken.splitlines(), start=1) if "two" in text)
    with pytest.raises(TraceError, match=rf"trace\.csv, line {line}"):
        request_trace(load_config(path), seed=0)
    with pytest.raises(TraceError):
        read_requests(tmp_path / "trace.csv")


def test_kv_blocks_follow_from_the_memory(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    timings = affine_timings(memory_bytes=100_000, weights_bytes=30_000, kv_bytes_per_token=10)
    given = config.limits.model_copy(update={"activation_bytes": 10_000, "memory_fraction": 0.8, "urgent_share": 0.1})
    limits = scheduler_limits(config.model_copy(update={"limits": given}), timings)
    assert limits.kv_blocks == (80_000 - 30_000 - 10_000) // (10 * 16)
    assert limits.urgent_blocks == 25
    assert limits.max_resident is None
    windows = affine_timings(memory_bytes=100_000, weights_bytes=30_000, kv_bytes_per_token=10, sequence_bytes=200)
    short = scheduler_limits(config.model_copy(update={"limits": given.model_copy(update={"max_seqs": 32})}), windows)
    assert (short.max_resident, short.kv_blocks) == (64, (40_000 - 64 * 200) // (10 * 16))
    few = scheduler_limits(config.model_copy(update={"limits": given.model_copy(update={"max_resident": 5})}), windows)
    assert (few.max_resident, few.kv_blocks) == (5, (40_000 - 5 * 200) // (10 * 16))
    full = given.model_copy(update={"memory_fraction": 0.3})
    with pytest.raises(ConfigError, match=r"limits\.memory_fraction.*no room for KV"):
        scheduler_limits(config.model_copy(update={"limits": full}), timings)


def test_the_timeline_shows_passes_and_matching_suspensions(folder: Path, tmp_path: Path) -> None:
    config = load_config(folder / "config.yaml")
    shown = timeline_runs(config)
    assert [str(run) for run in shown] == [f"policy {p} at rate=50, seed=0" for p in ("fcfs", "qllm")]
    count = write_timeline(record(shown), tmp_path / "timeline.json")
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert len(events) == count
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(tracks.values()) == {"ls", "be"}
    assert all(tid > 0 for _, tid in tracks)  # 0 is no track of its own
    for process, _ in enumerate(shown, start=1):
        mine = [e for e in events if e["pid"] == process]
        # Perfetto rounds starts and durations to whole nanoseconds, each for itself.
        slices = sorted((round(e["ts"] * 1e3), round(e["dur"] * 1e3)) for e in mine if e["ph"] == "X")
        assert all(start + length <= following for (start, length), (following, _) in pairwise(slices))
        assert all(isinstance(e["id"], int) for e in mine if e["ph"] in "sf")
        stops = [e for e in mine if e["name"].startswith("preempted in layer")]
        goes_on = [e for e in mine if e["name"].startswith("resumed in layer")]
        assert len(stops) == len(goes_on)
        assert bool(stops) == (process == 2)  # fcfs never preempts
        assert sum(e["ph"] == "s" for e in mine) == sum(e["ph"] == "f" for e in mine) == len(stops)
        assert all(0 <= e["args"]["layer"] < 4 for e in stops)
