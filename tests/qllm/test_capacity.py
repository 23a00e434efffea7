"""Capacity: where it is known in closed form, and that neither workers nor early ends change what is found."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.capacity.capacity import find_capacity, load_for_capacity
from qllm.capacity.judge import Judge
from qllm.capacity.search import SATURATION, at_rate, find, requests
from qllm.capacity.tables import FILES
from qllm.config.config import Config, load_config
from qllm.config.from_config import isolated
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.folders import claim
from qllm.experiment.metrics import BOUNDS
from qllm.experiment.results import Results
from qllm.experiment.results import write_config as write_resolved
from qllm.experiment.run import Run, run_table, runs, simulate_run, sweep_rows
from qllm.plots.capacity import draw_capacity
from qllm.traces import Timings
from tests.cli_support import CONFIG, qllm, write_config

#: One request at a time, one token each: a server with a fixed service time.
ONE_SERVER = """\
name: server
timings: timings.csv
classes: {ls: {prompt: 100, output: 1, slo: {ttft: 1}}}
requests: 800
seeds: 4
limits: {max_seqs: 1, max_batched_tokens: 2048}
policies: [fcfs]
capacity: {attainment: 0.9, precision: 0.01, curve: 0}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_for_capacity(write_config(tmp_path_factory.mktemp("server"), ONE_SERVER))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config(write_config(tmp_path_factory.mktemp("small")), ["sweep={}", "rate=1"])


def service_s(config: Config) -> float:
    """Seconds of one request."""
    return float(isolated(config, np.array([100]))[0])


def bounded(config: Config, ttft: float, **more: object) -> Config:
    """`config` with that bound on TTFT."""
    ls = config.classes["ls"]
    slo = type(ls.slo).model_validate({"ttft": ttft})
    return config.model_copy(update={"classes": {"ls": ls.model_copy(update={"slo": slo})}, **more})


def waits_less(load: float, service: float, seconds: float) -> float:
    """P(W <= seconds) in M/D/1 (Erlang 1909)."""
    rate, total = load / service, 0.0
    for k in range(int(seconds / service) + 1):
        left = seconds - k * service
        total += (-rate * left) ** k / math.factorial(k) * math.exp(rate * left)
    return (1 - load) * total


def test_capacity_of_m_d_1_is_that_of_the_formula(server: Config) -> None:
    service = service_s(server)
    config = bounded(server, 3 * service)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if waits_less(middle, service, 2 * service) > 0.9 else (low, middle)
    found = find_capacity(config).capacity.iloc[0]
    assert found["limit"] == "ls: ttft"
    assert found["rate_lo_rps"] * service <= low <= found["rate_hi_rps"] * service
    assert found["rate_rps"] * service == pytest.approx(low, rel=0.05)
    assert found["saturation_rps"] * service == pytest.approx(1, rel=0.01)


def test_a_loose_slo_leaves_saturation_and_a_tight_one_nothing(server: Config) -> None:
    service = service_s(server)
    loose = find_capacity(bounded(server, 1e6 * service, seeds=[3])).capacity.iloc[0]
    assert loose["limit"] == SATURATION
    assert loose["rate_rps"] * service == pytest.approx(1, rel=0.01)
    assert math.isnan(loose["rate_lo_rps"])  # one seed
    capacity = type(server.capacity).model_validate({"price_per_gpu_hour": 2.5, "curve": 3})
    tight = find_capacity(bounded(server, 0.5 * service, seeds=[3], requests=100, capacity=capacity))
    row = tight.capacity.iloc[0]
    assert (row["rate_rps"], row["limit"]) == (0.0, "ls: ttft")
    assert math.isnan(row["cost_per_million_tokens"])
    assert len(tight.classes) == 0
    assert (tight.curve["slo_attainment"] == 0).all()


def test_price_over_tokens_is_the_cost(server: Config) -> None:
    capacity = type(server.capacity).model_validate({"price_per_gpu_hour": 3.6, "curve": 0})
    row = find_capacity(bounded(server, 1e3, seeds=[0], requests=50, capacity=capacity)).capacity.iloc[0]
    assert row["output_tokens_per_s"] == pytest.approx(row["rate_rps"])
    assert row["tokens_per_s"] == pytest.approx(101 * row["rate_rps"])
    assert row["cost_per_million_output_tokens"] == pytest.approx(1000 / row["rate_rps"])


def test_each_gpu_has_its_own_price(server: Config) -> None:
    device = Timings.load(server.timings).device
    prices = {"h200": 9.0, device[:3].lower(): 1.8, device.upper(): 3.6}
    capacity = type(server.capacity).model_validate({"prices": prices, "curve": 0})
    row = find_capacity(bounded(server, 1e3, seeds=[0], requests=50, capacity=capacity)).capacity.iloc[0]
    assert row["cost_per_million_output_tokens"] == pytest.approx(1000 / row["rate_rps"])
    capacity = type(server.capacity).model_validate({"prices": {"h200": 9.0, "b200": 9.0}})
    with pytest.raises(ConfigError, match=f"capacity.prices: none is that of '{device}'; allowed: .* h200, b200"):
        find_capacity(bounded(server, 1e3, capacity=capacity))


def test_a_duration_sends_more_at_a_higher_rate(server: Config) -> None:
    service = service_s(server)
    config = bounded(server, 3 * service, requests=None, duration=1500 * service, seeds=[1, 2])
    row = find_capacity(config).capacity.iloc[0]
    assert row["saturation_rps"] * service == pytest.approx(1, rel=0.05)
    assert 0.3 < row["rate_rps"] * service < 0.8


def same(one, other) -> None:
    for name in FILES:
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name))


def test_workers_change_nothing_and_the_summary_agrees(small: Config) -> None:
    capacity = type(small.capacity).model_validate({"curve": 2, "precision": 0.05})
    config = small.model_copy(update={"sweep": {"limits.max_seqs": [2, 8]}, "capacity": capacity})
    alone = find_capacity(config, jobs=1)
    same(alone, find_capacity(config, jobs=2))
    assert len(alone.capacity) == 4
    ls = alone.classes[alone.classes["class"] == "ls"]
    assert (ls["slo_attainment"] >= 0.99).all()
    assert alone.classes.groupby(["policy", "limits.max_seqs"])["rate_rps"].sum().to_numpy() == pytest.approx(
        alone.capacity.set_index(["policy", "limits.max_seqs"])["rate_rps"].sort_index().to_numpy()
    )
    assert set(alone.differences["metric"]) == {"rate_rps", "saturation_rps"}
    figure = draw_capacity(alone, "simulated")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["limits.max_seqs = 2", "", "limits.max_seqs = 8", ""]


def test_ending_runs_early_changes_no_rate(small: Config) -> None:
    config = small.model_copy(update={"requests": 100})
    for run in runs(config)[:2]:
        early, late = find([run]), find([run], cut=False)
        assert early.cut > 0
        assert late.cut == 0
        assert replace(early, cut=0) == late
    seeds = runs(config)[:2]
    before = [find([run]) for run in seeds]
    assert find(seeds, before).rate == find(seeds, before, cut=False).rate


slos = st.fixed_dictionaries(
    {},
    optional={
        "ttft": st.sampled_from([0.003, 0.01, 0.05]),
        "ttft_over_isolated": st.sampled_from([1.01, 3.0, 20.0]),
        "tpot": st.sampled_from([0.0005, 0.001, 0.004]),
    },
).filter(bool)


@settings(max_examples=30, deadline=None)
@given(
    slos,
    st.none() | slos,
    st.sampled_from([20.0, 80.0, 300.0]),
    st.sampled_from([0.5, 0.9, 0.99, 1.0]),
    st.sampled_from([None, {"share": 0.2}, {"seconds": 0.1}]),
    st.integers(0, 3),
)
def test_who_misses_is_who_misses_in_the_summary(small: Config, ls, be, rate, attainment, warmup, which) -> None:
    """And a run that is ended early would have failed."""
    data = small.model_dump(exclude_unset=True, by_alias=True) | {"capacity": {"attainment": attainment}}
    data |= {"warmup": warmup, "limits": {"max_seqs": 4, "max_batched_tokens": 512, "kv_blocks": 64}}
    data["classes"]["ls"]["slo"], data["classes"]["be"]["slo"] = ls, be
    config = Config.model_validate(data)
    run: Run = at_rate(runs(config)[which], rate)
    trace = requests(run, rate)
    judge = Judge(config, trace)
    whole = simulate_run(run, trace)
    misses = judge.misses(whole)
    results = Results.of(sweep_rows(run, run_table(run)), config)
    for number, name in enumerate(trace.classes):
        row = results.summary[results.summary["class"] == name].iloc[0]
        assert row["sent"] == judge.sent[number]
        for key, column in {"": "slo_attainment", **BOUNDS}.items():
            if not math.isnan(row[column]):
                assert misses[key][number] == round((1 - row[column]) * row["sent"])
            elif key in misses:
                assert misses[key][number] == 0
        judged = not math.isnan(row["slo_attainment"]) and row["sent"] > 0
        assert judge.fails(misses[""])[number] == (judged and row["slo_attainment"] < attainment)
    asked: list[bool] = []

    def stop(*given) -> bool:
        asked.append(judge.hopeless(*given))
        return False

    simulate_run(run, trace, stop=stop)
    if any(asked):
        assert judge.fails(misses[""]).any()
        assert asked[asked.index(True) :].count(True) > 0


MISTAKES = [
    (["classes.ls.slo=null"], "", r"config.yaml: classes: none has an slo.* classes.ls.slo: \{ttft: 1.0\}"),
    (["capacity.price_per_gpu_hour=-2"], "", r"--set .*: capacity.price_per_gpu_hour: must be greater than 0, got -2"),
    ([], "price_per_gpu_hour: 0", r"config.yaml:2\d: capacity.price_per_gpu_hour: must be greater than 0, got 0"),
    (["capacity.attainment=1.5"], "", r"capacity.attainment: .*1"),
    (["capacity.price_per_gpu_hour=2", "capacity.prices={a100: 1}"], "", "give either price_per_gpu_hour or prices"),
    (["capacity.price=2"], "", "capacity.price: .*price_per_gpu_hour"),
]


@pytest.mark.parametrize(("changed", "added", "told"), MISTAKES)
def test_mistakes_are_answered_in_one_line(tmp_path: Path, changed, added, told) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        find_capacity(write_config(tmp_path, CONFIG + f"capacity: {{{added}}}\n"), set=changed)
    assert "\n" not in str(caught.value)


def test_a_replayed_trace_keeps_its_rate_until_one_is_given(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,50,3\n0.5,60,3\n1,50,3\n")
    text = """\
timings: timings.csv
classes: {ls: {slo: {ttft: 0.05}}}
arrival: {process: trace, file: mine.csv}
policies: [fcfs]
"""
    path = write_config(tmp_path, text)
    with pytest.raises(ConfigError, match=r"config.yaml:3: arrival: a replayed trace keeps .* allowed: a rate"):
        find_capacity(path)
    assert find_capacity(path, set=["rate=1"]).capacity["rate_rps"][0] > 1
    with pytest.raises(ConfigError, match="rate: this key is missing"):
        find_capacity(load_config(path))


def test_the_command_writes_its_files_and_prints_a_table(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, CONFIG.replace("requests: 40", "requests: 40\ncapacity: {curve: 2, precision: 0.1}")
    )
    given = ["capacity", config, "--out", tmp_path / "out", "--jobs", 1]
    done = qllm(*given, "--set", "capacity.price_per_gpu_hour=2.5")
    assert done.returncode == 0, done.stderr
    tables = {f"{name}.{kind}" for name in FILES for kind in ("csv", "parquet")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == tables | {
        *("capacity.json", "capacity.png", "capacity.svg", "config.yaml")
    }
    for told in ("cost per", "qllm minus fcfs: ", "affine: modelled", "fails above it"):
        assert told in done.stdout
    with pytest.raises(ConfigError, match="holds the results of a search for capacity"):
        claim(tmp_path / "out", load_config(config), "simulation")
    printed = qllm(*given, "--force", "--policies", "qllm", "--set", "seeds=1", "--format", "json")
    told = json.loads(printed.stdout)
    assert [row["policy"] for row in told["capacity"]] == ["qllm"]
    assert told["differences"] == []
    refused = qllm(*given)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "policies, seeds differ" in refused.stderr


def test_the_same_command_goes_into_the_same_folder(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    found = load_for_capacity(path, ["sweep.rate=[1, 2]"])
    told = found.model_copy(update={"provenance": {"capacity": "found"}})
    claim(tmp_path / "out", found, "capacity")
    write_resolved(told, tmp_path / "out")
    claim(tmp_path / "out", load_for_capacity(path, ["rate=3"]), "capacity")
    with pytest.raises(ConfigError, match="--policies qlm: did you mean 'qllm'"):
        load_for_capacity(path, policies=["qlm"])


def test_two_gpus_serve_twice_as_much_for_twice_the_price(server: Config) -> None:
    capacity = type(server.capacity).model_validate({"price_per_gpu_hour": 3.6, "curve": 0})
    config = bounded(server, 1e3, seeds=[0], requests=100, capacity=capacity)
    one, two = (find_capacity(config.model_copy(update={"replicas": n})).capacity.iloc[0] for n in (1, 2))
    assert two["rate_rps"] == pytest.approx(2 * one["rate_rps"], rel=0.03)
    assert two["rate_per_gpu_rps"] == two["rate_rps"] / 2
    assert two["cost_per_million_tokens"] == pytest.approx(one["cost_per_million_tokens"], rel=0.03)


def test_what_has_no_rate_has_no_capacity(tmp_path: Path) -> None:
    text = CONFIG.partition("sweep:")[0]
    for process in ("batch", "{process: closed, clients: 3}"):
        with pytest.raises(ConfigError, match=r"config.yaml: arrival: (batch|closed) has no rate.*such as poisson"):
            find_capacity(write_config(tmp_path, text.replace("{process: poisson}", process)))
