"""Pools of clients: the processes that they are, the folder of ServeGen's that they are read from."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.config.config import Config, load_config
from qllm.config.workload import request_trace
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.cache import keys
from qllm.experiment.results import write_config
from qllm.experiment.run import runs
from qllm.traces.requests.clients.draw import _renewals, draw
from qllm.traces.requests.clients.pool import ClientPool
from qllm.traces.requests.generate import _stream, assign_arrivals, generate
from qllm.traces.requests.trace import RequestTrace, TraceError

FIXED = {"prompt": {"fixed": 100}, "output": {"fixed": 10}}
#: Two clients in three windows of 600 s: bursts of one, silence of the other.
ROWS = {
    0: ["0,2.0,4.0,Gamma,0.0625,8", "600,0,0,,0,0", "1200,4.0,1,Gamma,1,0.25"],
    7: ["0,0.5,1.5,Weibull,0.7,1.5", "600,1.0,1,Weibull,1,1", "1200,1.5,1,Gamma,1,1"],
}
LENGTHS = {
    0: {"0": {"input_tokens": "{0: 0.5, 20: 0.25, 30: 0.25}", "output_tokens": "{5: 1.0}"}},
    7: {
        "0": {"input_tokens": "{70: 1.0}", "output_tokens": "{7: 1.0}", "reason_ratio": "{0.0: 1.0}"},
        "600": {"input_tokens": "{}", "output_tokens": "{}"},
        "1200": {"input_tokens": "{71: 1e-05, 72: 0.99999}", "output_tokens": "{8: 1.0}"},
    },
}


def folder(path: Path, rows=ROWS, lengths=LENGTHS) -> dict[str, str]:
    for number, lines in rows.items():
        (path / f"chunk-{number}-trace.csv").write_text("\n".join(lines) + "\n")
        if number in lengths:
            (path / f"chunk-{number}-dataset.json").write_text(json.dumps(lengths[number]))
    return {"process": "servegen", "folder": str(path)}


def clients(**arrival):
    return {"arrival": {"process": "clients", "cv": 2.0, **arrival}, **FIXED}


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([(True, 0.04), (True, 1.0), (True, 9.0), (False, 0.5), (False, 1.0), (False, 3.0)]),
    st.floats(0.3, 30),
    st.integers(0, 5),
)
def test_a_client_in_equilibrium_sends_as_many_as_its_rate_says_however_short_the_window(shape, until, seed):
    counts = [len(_renewals(_stream(seed, str(k)), *shape, until)) for k in range(3000)]
    error = np.std(counts) / np.sqrt(len(counts))
    assert abs(np.mean(counts) - until) < 5 * error + 1e-9


@pytest.mark.parametrize(("gamma", "shape", "cv"), [(True, 0.25, 2.0), (True, 4.0, 0.5), (False, 0.5, 5**0.5)])
def test_gaps_of_a_client_are_of_its_distribution(gamma, shape, cv):
    gaps = np.diff(_renewals(_stream(3, "gaps"), gamma, shape, 40_000.0))
    assert gaps.mean() == pytest.approx(1, abs=5 * cv / np.sqrt(len(gaps)))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 60), st.sampled_from([0.0, 1.0, 2.5]), st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 9))
def test_clients_come_at_their_share_of_the_rate(many, skew, cv, seed):
    trace = generate(clients(clients=many, skew=skew, cv=cv), rate=5.0, requests=4000, seed=seed)
    assert trace.rate == pytest.approx(5.0, rel=6 * max(cv, 1) / np.sqrt(4000))
    share = np.arange(1, many + 1) ** -skew
    share /= share.sum()
    counts = Counter(trace.tenants)
    for k in (1, many):
        expected = 4000 * share[k - 1]
        assert abs(counts[f"client-{k}"] - expected) < 6 * max(cv, 1) * np.sqrt(expected) + 6 * cv**2 + 3


def test_heavy_clients_carry_the_bursts():
    mine = generate(clients(clients=500, skew=1.5, cv=4.0), rate=10.0, requests=30_000, seed=2)
    alike = generate(clients(clients=500, skew=0.0, cv=4.0), rate=10.0, requests=30_000, seed=2)
    spread = [np.bincount(trace.arrival.astype(int)) for trace in (mine, alike)]
    heavy, light = (counts.var() / counts.mean() for counts in spread)  # 1 is Poisson, and 16 that of one client
    assert 1 < 1.5 * light < heavy < 16
    assert mine.describe()["arrival_cv"] > 1.2 * alike.describe()["arrival_cv"]
    busiest = Counter(mine.tenants).most_common(25)
    assert sum(count for _, count in busiest) > 0.75 * len(mine)
    first = np.array([tenant == "client-1" for tenant in mine.tenants])
    gaps = np.diff(mine.arrival[first])
    assert gaps.std() / gaps.mean() == pytest.approx(4, rel=0.15)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 30), st.floats(0.01, 50), st.integers(1, 300), st.integers(0, 5), st.sampled_from([0.2, 1.0, 9.0])
)
def test_rates_stretch_one_sequence_and_longer_draws_begin_with_shorter_ones(many, rate, requests, seed, cv):
    spec = clients(clients=many, length_sigma=0.7, cv=cv)
    one = generate(spec, rate=1.0, requests=requests, seed=seed)
    assert generate(spec, rate=1.0, requests=3 * requests, seed=seed).head(requests) == one
    other = generate(spec, rate=rate, requests=requests, seed=seed)
    np.testing.assert_array_equal(other.arrival, one.arrival / rate)
    assert (other.tenants, other.prompt_tokens.tolist()) == (one.tenants, one.prompt_tokens.tolist())


def test_lengths_of_clients_lie_apart_around_those_of_the_class():
    spec = clients(clients=200, skew=0.5, cv=1.0, length_sigma=0.8)
    spec |= {"prompt": {"fixed": 10_000}, "output": {"fixed": 5000}}
    trace = generate(spec, rate=1.0, requests=60_000, seed=4)
    prompts = {}
    for tenant, prompt in zip(trace.tenants, trace.prompt_tokens.tolist(), strict=True):
        assert prompts.setdefault(tenant, prompt) == prompt
    assert np.log([*prompts.values()]).std() == pytest.approx(0.8, abs=0.15)
    assert trace.prompt_tokens.mean() == pytest.approx(10_000, rel=0.05)
    assert trace.output_tokens.mean() == pytest.approx(5000, rel=0.05)
    plain = generate(clients(clients=200, skew=0.5, cv=1.0), rate=1.0, requests=500, seed=4)
    assert {*plain.prompt_tokens.tolist()} == {100}
    np.testing.assert_array_equal(plain.arrival, trace.arrival[:500])


def test_windows_of_a_folder_keep_their_rates_and_begin_again(tmp_path):
    spec = {"arrival": folder(tmp_path), "classes": {"a": {"share": 0.5}, "b": {}}}
    trace = generate(spec, rate=3.0, requests=60_000, seed=1)  # 3 is the mean of 2.5, 1 and 5.5
    rounds = int(trace.arrival[-1] // 1800)
    at = trace.arrival[trace.arrival < rounds * 1800] % 1800
    for window, rate in enumerate((2.5, 1.0, 5.5)):
        counts = ((at >= 600 * window) & (at < 600 * (window + 1))).sum()
        spread = 4 if window == 0 else 1
        assert counts == pytest.approx(600 * rate * rounds, abs=5 * spread * np.sqrt(600 * rate * rounds))
    mine = np.array([tenant == "chunk-0" for tenant in trace.tenants])
    window = (trace.arrival % 1800) // 600
    assert not (mine & (window == 1)).any()  # but at an edge
    assert {*trace.tenants} == {"chunk-0", "chunk-7"}
    # 0 tokens are 1; the latest lengths go on until others begin; a share of 1e-5 is next to nothing
    assert Counter(trace.prompt_tokens[mine].tolist()).keys() == {1, 20, 30}
    assert (trace.prompt_tokens[mine] == 1).mean() == pytest.approx(0.5, abs=0.02)
    assert {*trace.prompt_tokens[~mine & (window < 2)].tolist()} == {70}
    assert {*trace.output_tokens[~mine & (window == 2)].tolist()} == {8}
    assert {*trace.prompt_tokens[~mine & (window == 2)].tolist()} <= {71, 72}
    assert trace.describe()["classes"]["a"]["share"] == pytest.approx(0.5, abs=0.02)
    assert generate(spec, rate=3.0, requests=60_000, seed=1) == trace
    assert generate(spec, rate=3.0, requests=2000, seed=1) == trace.head(2000)
    double = generate(spec, rate=6.0, requests=60_000, seed=1)
    assert (double.arrival < 1800).sum() == pytest.approx(2 * (trace.arrival < 1800).sum(), rel=0.15)


def test_a_part_of_a_folder(tmp_path):
    arrival = folder(tmp_path) | {"begin_s": 300.0, "end_s": 900.0}
    trace = generate({"arrival": arrival}, rate=1.0, requests=9000, seed=0)
    mine = trace.arrival % 600
    assert (mine < 300).mean() == pytest.approx(2.5 / 3.5, abs=0.06)
    alone = generate({"arrival": folder(tmp_path) | {"busiest": 1}}, rate=1.0, requests=500, seed=0)
    assert {*alone.tenants} == {"chunk-0"}
    lengths = {"prompt": 50, "output": 3}
    (tmp_path / "chunk-0-dataset.json").unlink()  # nobody asks for them
    assert {*generate({"arrival": arrival, **lengths}, rate=1.0, requests=9, seed=0).prompt_tokens.tolist()} == {50}


def test_recorded_requests_get_the_arrivals_of_clients_and_keep_their_lengths(tmp_path):
    recorded = RequestTrace(np.zeros(50), np.arange(1, 51), np.ones(50, int), np.zeros(50, int))
    for arrival in (clients(clients=3)["arrival"], folder(tmp_path, lengths={})):
        trace = assign_arrivals(recorded, arrival, rate=2.0, seed=1)
        assert trace.prompt_tokens.tolist() == list(range(1, 51))
        assert trace.tenants is not None
        assert 0 < trace.arrival[0] < trace.arrival[-1]
    with pytest.raises(TraceError, match=r"^arrival\.length_sigma: .* leave it out"):
        assign_arrivals(recorded, {"process": "clients", "clients": 2, "cv": 1.0, "length_sigma": 1.0}, rate=1, seed=0)


def changed(number, row, line):
    rows = {key: [*lines] for key, lines in ROWS.items()}
    rows[number][row] = line
    return rows


BROKEN = [
    ({}, {}, "folder: .* holds no chunk-0-trace.csv"),
    (changed(0, 1, "600,0"), LENGTHS, r"chunk-0-trace\.csv, line 2: '600,0' must be begin"),
    (changed(0, 1, "600,x,0,,0,0"), LENGTHS, r"chunk-0-trace\.csv, line 2: .* must be begin"),
    (changed(0, 1, "600,-1,0,Gamma,1,1"), LENGTHS, r"line 2: .* >= 0"),
    (changed(0, 1, "600,nan,0,Gamma,1,1"), LENGTHS, r"line 2: .* finite"),
    (changed(0, 1, "0,1,1,Gamma,1,1"), LENGTHS, r"line 2: begins at 0 s, must begin after"),
    (changed(0, 1, "600,1,1,Pareto,1,1"), LENGTHS, r"line 2: 'Pareto' is unknown; allowed: Gamma, Weibull, or nothing"),
    (changed(0, 1, "600,1,1,Gamma,0,1"), LENGTHS, r"line 2: shape is 0; of Gamma must be from 0.0001"),
    (changed(7, 1, "700,1,1,Gamma,1,1"), LENGTHS, r"chunk-7-trace\.csv: window 2 begins at 700 s, must at 600 s"),
    ({**ROWS, 8: ROWS[0][:2]}, LENGTHS, r"chunk-8-trace\.csv: has 2 windows, must have 3"),
    ({**ROWS, 8: []}, LENGTHS, r"chunk-8-trace\.csv: holds no window"),
    ({0: ["0,0,0,,0,0"]}, LENGTHS, "no client sends a request"),
    (ROWS, {0: LENGTHS[0]}, r"chunk-7-dataset\.json: cannot be read"),
    (ROWS, LENGTHS | {0: []}, r"chunk-0-dataset\.json: must be a JSON object"),
    (ROWS, LENGTHS | {0: {"a": {}}}, r"chunk-0-dataset\.json: must be a JSON object"),
    (ROWS, LENGTHS | {0: {}}, r"chunk-0-dataset\.json: holds no lengths"),
    (
        ROWS,
        LENGTHS | {0: {"0": {"text_tokens": "{1: 1.0}"}}},
        r"chunk-0-dataset\.json, 0: input_tokens is missing; .*lang",
    ),
    (
        ROWS,
        LENGTHS | {0: {"0": {"input_tokens": "os.remove(1)"}}},
        r"0: input_tokens is 'os.remove\(1\)', must be text",
    ),
    (ROWS, LENGTHS | {0: {"0": {"input_tokens": {"1": 1.0}}}}, r"0: input_tokens is .* must be text"),
    (ROWS, LENGTHS | {0: {"0": {"input_tokens": "{1: 0.5}"}}}, r"0: input_tokens: shares .* \(they do to 0.5\)"),
    (ROWS, LENGTHS | {0: {"0": {"input_tokens": "{1: 1.0.0}"}}}, r"0: input_tokens must hold a count and its share"),
]


@pytest.mark.parametrize(("rows", "lengths", "says"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_broken_in_a_folder_is_told_with_file_and_row(tmp_path, rows, lengths, says):
    with pytest.raises(TraceError, match=says) as error:
        generate({"arrival": folder(tmp_path, rows, lengths)}, rate=1.0, requests=10, seed=0)
    assert "\n" not in str(error.value)


def test_a_pointer_in_place_of_a_file_is_told(tmp_path):
    arrival = folder(tmp_path)
    (tmp_path / "chunk-0-dataset.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(TraceError, match="run git lfs pull"):
        generate({"arrival": arrival}, rate=1.0, requests=10, seed=0)
    with pytest.raises(TraceError, match="begin_s: 9000 lies behind the last window; allowed: below 1800"):
        generate({"arrival": arrival | {"begin_s": 9000.0}}, rate=1.0, requests=10, seed=0)
    with pytest.raises(TraceError, match=r"^rate: 10 requests at 1e-300 per second pass more than 100000 windows"):
        generate({"arrival": arrival, **FIXED}, rate=1e-300, requests=10, seed=0)
    (tmp_path / "file").write_text("")
    for name, says in (("none", "no such folder"), ("file", "is no folder")):
        with pytest.raises(TraceError, match=rf"^arrival\.\w*\.?folder: {says}"):
            generate({"arrival": arrival | {"folder": str(tmp_path / name)}}, rate=1.0, requests=10, seed=0)


def test_a_configuration_of_clients(tmp_path):
    (tmp_path / "pool").mkdir()
    folder(tmp_path / "pool")
    text = "timings: a100-mixtral-8x7b-int4\nclasses: {all: {}}\npolicies: [fcfs]\nrequests: 50\nrate: 3\n"
    (tmp_path / "c.yaml").write_text(text + "arrival: {process: servegen, folder: pool}\n")
    config = load_config(tmp_path / "c.yaml")
    trace = request_trace(config, 0)
    assert {*trace.tenants} == {"chunk-0", "chunk-7"}
    assert len(request_trace(config.at({}).model_copy(update={"requests": None, "duration": 30.0}), 0)) > 10
    before = keys(runs(config))
    (tmp_path / "pool" / "chunk-7-trace.csv").write_text("\n".join(ROWS[0]))
    assert keys(runs(config)) != before  # the folder's files are part of what a run depends on
    (tmp_path / "out").mkdir()
    write_config(config, tmp_path / "out")
    assert "folder: ../pool" in (tmp_path / "out" / "config.yaml").read_text()
    data = config.model_dump(exclude_unset=True)
    with pytest.raises(ValueError, match="class all needs prompt and output"):
        Config.model_validate(data | {"arrival": {"process": "clients", "clients": 3, "cv": 1.0}})
    rates = {"all": {"rate": 1.0, "prompt": 5, "output": 5}}
    with pytest.raises(ValueError, match="has one rate"):
        Config.model_validate(data | {"classes": rates, "rate": None})
    with pytest.raises(ConfigError, match=r"arrival\..*end_s \(5\) must be at least a second above begin_s \(9\)"):
        load_config(tmp_path / "c.yaml", ["arrival.begin_s=9", "arrival.end_s=5"])


def test_a_pool_of_ones_own():
    pool = ClientPool(("a", "b"), np.array([10.0]), np.array([[1.0], [3.0]]), np.ones((2, 1), bool), np.ones((2, 1)))
    drawn = draw(pool, partial(_stream, 0), 8000, rate=2.0)
    assert pool.mean_rate == 4.0
    assert drawn.tenants.count("b") == pytest.approx(6000, abs=250)
    assert drawn.arrival[-1] == pytest.approx(4000, rel=0.06)
