"""Workloads of a configuration: rates of classes, closed loops, conversations, batches, phases, several GPUs."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm import simulate
from qllm.config.config import Config, load_config
from qllm.config.workload import check_for_engine, request_trace, sessions
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.run import runs
from qllm.plots.perfetto import record, write_timeline
from qllm.plots.schedule import save_timeline
from qllm.sim import ROUTERS
from qllm.traces.requests.generate import generate

BASE = {
    "timings": "a100-mixtral-8x7b-int4",
    "classes": {
        "ls": {"priority": 0, "prompt": {"fixed": 50}, "output": {"fixed": 5}},
        "be": {"priority": 1, "prompt": {"fixed": 700}, "output": {"fixed": 20}},
    },
    "policies": ["fcfs"],
}


def config(rates: dict[str, float] | None = None, **values) -> Config:
    classes = {name: {**job} for name, job in BASE["classes"].items()}
    for name, rate in (rates or {}).items():
        classes[name]["rate"] = rate
    if not rates:
        classes["ls"]["share"] = 0.5
    return Config.model_validate({**BASE, "classes": classes, **values})


def of_class(trace, name):
    mine = trace.cls == trace.classes.index(name)
    return trace.arrival[mine], trace.prompt_tokens[mine]


def test_the_rate_of_one_class_moves_no_request_of_another():
    few, many = (request_trace(config({"ls": rate, "be": 0.2}, duration=200), 3) for rate in (1.0, 5.0))
    for a, b in zip(of_class(few, "be"), of_class(many, "be"), strict=True):
        np.testing.assert_array_equal(a, b)
    for trace, rate in ((few, 1.0), (many, 5.0)):
        assert abs(len(of_class(trace, "ls")[0]) - 200 * rate) < 5 * np.sqrt(200 * rate)
        assert abs(len(of_class(trace, "be")[0]) - 40) < 5 * np.sqrt(40)


def test_a_rate_of_the_whole_scales_those_of_the_classes():
    trace = request_trace(config({"ls": 3.0, "be": 1.0}, rate=40.0, requests=2000), 1)
    assert len(trace) == 2000
    assert trace.rate == pytest.approx(40.0, rel=0.15)
    assert np.bincount(trace.cls)[0] == pytest.approx(1500, abs=100)
    np.testing.assert_allclose(of_class(trace, "ls")[0][:50], of_class(
        request_trace(config({"ls": 3.0, "be": 1.0}, requests=2000), 1), "ls")[0][:50] / 10)  # fmt: skip


def test_a_class_may_be_too_rare_to_come():
    trace = request_trace(config({"ls": 5.0, "be": 1e-6}, duration=10), 1)
    assert set(trace.cls.tolist()) == {0}
    with pytest.raises(ConfigError, match="no request arrives"):
        request_trace(config({"ls": 1e-6, "be": 1e-6}, duration=10), 1)


def test_classes_are_swept_alone_and_have_a_column(tmp_path):
    swept = config({"ls": 1.0, "be": 0.2}, duration=20, sweep={"classes.ls.rate": [1.0, 4.0]})
    summary = simulate(swept).summary
    assert summary.loc[summary["class"] == "be", "sent"].nunique() == 1
    assert summary.loc[summary["class"] == "ls", "sent"].is_monotonic_increasing
    assert {1.0, 4.0} == {*summary["classes.ls.rate"]}
    assert summary["rate"].round(6).tolist()[:1] == [1.2]


def test_a_batch_comes_at_once_and_ends_as_soon_as_it_can():
    found = simulate(config(arrival="batch", requests=40)).requests
    assert (found["arrival_s"] == 0).all()
    assert found["finish_s"].max() < 100


def test_clients_of_a_closed_loop_wait_for_their_answers():
    closed = config(arrival={"process": "closed", "clients": 4, "think_s": 0.5}, requests=80)
    found = simulate(closed).requests
    events = np.concatenate([found["arrival_s"], found["finish_s"]])
    steps = np.concatenate([np.ones(80), -np.ones(80)])[np.lexsort((np.repeat([1, 0], 80), events))]
    assert np.cumsum(steps).max() <= 4
    gaps = found["arrival_s"].to_numpy()[4:] - found["finish_s"].to_numpy()[:-4]
    assert (gaps >= -1e-6).all()
    assert gaps.mean() == pytest.approx(0.5, rel=0.4)
    assert sessions(closed, 1, 80).think_s.tolist() == sessions(closed, 1, 80).think_s.tolist()
    assert sessions(closed, 2, 80).think_s.tolist() != sessions(closed, 1, 80).think_s.tolist()


@pytest.mark.parametrize("size", [{"requests": 50}, {"duration": 60.0}])
def test_turns_of_a_conversation_repeat_what_was_said(size):
    talking = config(arrival={"process": "conversations", "turns": 3, "think_s": 1.0}, rate=1.5, **size)
    trace, said = request_trace(talking, 0), sessions(talking, 0, 6)
    n = len(trace) // 3 * 3
    prompts, outputs, cls = (
        column[:n].reshape(-1, 3) for column in (trace.prompt_tokens, trace.output_tokens, trace.cls)
    )
    assert (cls == cls[:, :1]).all()
    own = np.where(cls == 0, 50, 700)
    np.testing.assert_array_equal(prompts, np.cumsum(own + outputs, axis=1) - outputs)
    assert said.follows.tolist() == [-1, 0, 1, -1, 3, 4]
    found = simulate(talking).requests
    assert len(found) == len(trace)
    ends, starts = found["finish_s"].to_numpy()[:n].reshape(-1, 3), found["arrival_s"].to_numpy()[:n].reshape(-1, 3)
    assert (starts[:, 1:] >= ends[:, :-1] - 1e-6).all()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.5, 50), st.sampled_from([0.0, 0.3, 1.0, 5.0])), min_size=1, max_size=6),
    st.floats(0.1, 20),
    st.integers(0, 5),
)
def test_a_changing_rate_keeps_its_mean_and_nobody_comes_where_it_is_zero(phases, rate, seed):
    if not any(share for _, share in phases):
        phases.append((3.0, 1.0))
    recipe = {
        "arrival": {"process": "phases", "phases": [{"seconds": s, "rate": r} for s, r in phases]},
        "prompt": 1,
        "output": 1,
    }
    trace = generate(recipe, rate=rate, requests=400, seed=seed)
    cycle = sum(s for s, _ in phases)
    at, edges = trace.arrival % cycle, np.cumsum([0.0] + [s for s, _ in phases])
    counts = np.histogram(at, edges)[0]
    for (_, share), count in zip(phases, counts, strict=True):
        assert share > 0 or count <= 400 * 0.01  # an edge belongs to the next phase
    whole = int(trace.arrival[-1] // cycle)
    if whole >= 1:
        n = int((trace.arrival < whole * cycle).sum())
        assert abs(n - rate * cycle * whole) < 6 * np.sqrt(rate * cycle * whole) + 2
    shorter = generate(recipe, rate=rate, requests=100, seed=seed)
    np.testing.assert_array_equal(shorter.arrival, trace.arrival[:100])


def test_one_phase_is_a_poisson_process():
    of = {"prompt": 1, "output": 1}
    phases = generate(
        {"arrival": {"process": "phases", "phases": [{"seconds": 7, "rate": 3}]}, **of}, rate=2, requests=99, seed=1
    )
    np.testing.assert_allclose(phases.arrival, generate(of, rate=2, requests=99, seed=1).arrival, rtol=1e-9)


def test_an_end_to_end_bound_is_one_of_the_slo():
    classes = {**BASE["classes"], "ls": {**BASE["classes"]["ls"], "share": 0.5}}
    classes["be"] = {**classes["be"], "slo": {"e2e": 2.0}}
    bounded = Config.model_validate({**BASE, "classes": classes, "rate": 0.5, "requests": 40})
    results = simulate(bounded)
    row = results.summary.query("`class` == 'be'").iloc[0]
    took = results.requests.query("`class` == 'be'").eval("finish_s - arrival_s")
    assert row["slo_e2e_met"] == row["slo_attainment"] == pytest.approx((took <= 2.0).mean())
    assert pd.isna(results.summary.query("`class` == 'ls'").iloc[0]["slo_e2e_met"])


def test_a_configuration_names_the_routers_that_there_are():
    assert get_args(Config.model_fields["router"].annotation) == ROUTERS


def test_more_gpus_serve_more_and_say_which(tmp_path):
    swept = simulate(config(rate=8.0, requests=60, sweep={"replicas": [1, 4]}))
    summary = swept.summary.query("`class` == 'ls'").set_index("replicas")
    assert summary.loc[4, "ttft_mean_s"] < summary.loc[1, "ttft_mean_s"]
    found = swept.requests
    assert set(found.loc[found["replicas"] == 4, "replica"]) == {0, 1, 2, 3}
    alone = simulate(config(rate=8.0, requests=60))
    assert "replica" not in alone.requests
    for router in ("round_robin", "ls_aware", "shared_queue"):
        assert (simulate(config(rate=8.0, requests=20, replicas=2, router=router)).requests["finish_s"] > 0).all()


def test_timelines_of_several_gpus_keep_them_apart(tmp_path):
    recorded = record(runs(config(rate=8.0, requests=20, replicas=3)))
    write_timeline(recorded, tmp_path / "timeline.json")
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert [name.rpartition(", ")[2] for name in names] == ["GPU 0", "GPU 1", "GPU 2"]
    for process in (1, 2, 3):  # one pass at a time on each
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["pid"] == process)
        assert mine
        assert all(a[1] <= b[0] + 1e-3 for a, b in pairwise(mine))
    assert save_timeline(recorded, tmp_path / "timeline.png", "Simulated.")


def test_what_is_simulated_only_is_refused_for_the_engine():
    check_for_engine(config(rate=1.0, requests=1))
    for odd, told in (
        ({"replicas": 2, "rate": 1.0}, "replicas: 2 are simulated only"),
        ({"arrival": {"process": "closed", "clients": 1}}, "arrival: closed is simulated only"),
    ):
        with pytest.raises(ConfigError, match=told):
            check_for_engine(config(requests=1, **odd))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("arrival: closed", "clients"),
        ("arrival: {process: closed, clients: 0}", "clients"),
        ("arrival: batch\nrate: 1", "arrival batch has no rate; leave rate out"),
        ("arrival: batch\nsweep: {rate: [1]}", "arrival batch has no rate; leave rate out"),
        ("arrival: batch\nrequests: null\nduration: 5", "arrival batch needs requests"),
        ("arrival: {process: phases, phases: []}\nrate: 1", "at least 1"),
        ("arrival: {process: phases, phases: [{seconds: 1, rate: 0}]}\nrate: 1", "above 0"),
        ("arrival: {process: conversations, turns: 2}", "give rate"),
        ("replicas: 0\nrate: 1", "replicas"),
        ("router: random\nrate: 1", "round_robin"),
        ("classes: {ls: {rate: 1, prompt: 1, output: 1}, be: {prompt: 1, output: 1}}", "for each class, also be"),
        ("classes: {ls: {rate: 1, share: 1, prompt: 1, output: 1}}", "and no share"),
        ("classes: {ls: {rate: 0, prompt: 1, output: 1}}", "rate"),
        ("classes: {ls: {rate: 1, prompt: 1}}", "needs prompt and output"),
        (
            "classes: {ls: {rate: 1, prompt: 1, output: 1}}\narrival: {process: conversations, turns: 2}",
            "conversations has one rate; give classes a share",
        ),
    ],
)  # fmt: skip
def test_odd_workloads_are_refused_in_one_line(tmp_path, text, told):
    lines = ["timings: a100-mixtral-8x7b-int4", "policies: [fcfs]"]
    if "requests:" not in text:
        lines.append("requests: 5")
    if "classes:" not in text:
        lines.append("classes: {ls: {prompt: 1, output: 1}}")
    (tmp_path / "odd.yaml").write_text("\n".join([*lines, text]))
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "odd.yaml")
    assert told in str(error.value)
    assert "\n" not in str(error.value)
