import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.traces.requests.generate import assign_arrivals, assign_classes, generate
from qllm.traces.requests.quantile_table import BUNDLED, bundled_lengths
from qllm.traces.requests.trace import RequestTrace, TraceError
from qllm.traces.requests.writers import write_requests

ROOT = Path(__file__).parents[2]
AZURE = ROOT / "../shared/data/traces/AzureLLMInferenceTrace_conv.csv"
N = 20_000
LS = {"share": 0.2, "prompt": {"uniform": [50, 500]}, "output": {"fixed": 50}}
BE = {"prompt": {"lognormal": {"median": 1000, "sigma": 0.5}}, "output": {"quantiles": "azure_conv"}}
SPEC = {"arrival": {"process": "poisson"}, "classes": {"ls": LS, "be": BE}}
FIXED = {"prompt": {"fixed": 10}, "output": {"fixed": 5}}


def with_arrival(**arrival):
    return {"arrival": arrival, **FIXED}


def lengths(spec, n=N, seed=1):
    return generate({"prompt": spec, "output": {"fixed": 1}}, rate=1, requests=n, seed=seed).prompt_tokens


@pytest.mark.parametrize(
    ("arrival", "cv"),
    [({"process": "poisson"}, 1.0), ({"process": "gamma", "cv": 2.0}, 2.0), ({"process": "gamma", "cv": 0.25}, 0.25)],
)
def test_rate_and_variation_of_the_gaps(arrival, cv):
    trace = generate(with_arrival(**arrival), rate=4.0, requests=N, seed=7)
    assert trace.rate == pytest.approx(4.0, rel=4 * cv / np.sqrt(N))
    assert trace.describe()["arrival_cv"] == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize(("burst", "on_share"), [(None, 1.0), (4.0, 1.0), (2.0, 0.5), (1.0, 0.25)])
def test_onoff_keeps_the_mean_rate_and_shares_it_between_the_phases(burst, on_share):
    arrival = {"process": "onoff", "on_s": 5.0, "off_s": 15.0} | ({} if burst is None else {"burst": burst})
    trace = generate(with_arrival(**arrival), rate=3.0, requests=N, seed=3)
    assert trace.rate == pytest.approx(3.0, rel=0.03)
    in_on = np.mod(trace.arrival, 20.0) <= 5.0 + 1e-6
    assert in_on.mean() == pytest.approx(on_share, abs=0.02)
    assert (np.diff(trace.arrival) >= 0).all()


def test_onoff_within_a_phase_is_poisson():
    trace = generate(with_arrival(process="onoff", on_s=100.0, off_s=100.0), rate=5.0, requests=N, seed=3)
    gaps = np.diff(trace.arrival)
    gaps = gaps[gaps < 50]  # the silent phases
    assert gaps.mean() == pytest.approx(0.1, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.03)


def test_shares_and_lengths_by_class():
    trace = generate(SPEC, rate=2.0, requests=N, seed=5)
    assert trace.classes == ("ls", "be")
    described = trace.describe()["classes"]
    assert described["ls"]["share"] == pytest.approx(0.2, abs=0.01)
    assert (described["ls"]["prompt_tokens"]["min"], described["ls"]["prompt_tokens"]["max"]) == (50, 500)
    assert described["ls"]["prompt_tokens"]["mean"] == pytest.approx(275, rel=0.02)
    assert described["ls"]["output_tokens"]["max"] == 50
    assert described["be"]["prompt_tokens"]["p50"] == pytest.approx(1000, rel=0.03)
    assert described["be"]["output_tokens"]["p50"] == pytest.approx(129, rel=0.03)


def test_common_lengths_serve_classes_that_give_none():
    spec = {"classes": {"a": {"share": 0.5}, "b": {"prompt": {"fixed": 20}}}, **FIXED}
    trace = generate(spec, rate=1, requests=100, seed=0)
    assert set(trace.prompt_tokens[trace.cls == 0]) == {10}
    assert set(trace.prompt_tokens[trace.cls == 1]) == {20}
    assert set(trace.output_tokens) == {5}


def test_uniform_includes_both_ends_evenly():
    counts = np.bincount(lengths({"uniform": [1, 4]}), minlength=5)
    assert counts[0] == 0
    assert counts[1:] == pytest.approx([N / 4] * 4, rel=0.05)


def test_lognormal_by_mean_and_clipped_to_its_bounds():
    assert lengths({"lognormal": {"mean": 1000, "sigma": 1.0}}).mean() == pytest.approx(1000, rel=0.05)
    drawn = lengths({"lognormal": {"median": 1000, "sigma": 1.0, "min": 500, "max": 2000}})
    beyond = 0.2441  # P(normal > ln 2)
    assert (drawn == 500).mean() == pytest.approx(beyond, abs=0.015)
    assert (drawn == 2000).mean() == pytest.approx(beyond, abs=0.015)
    assert np.median(drawn) == pytest.approx(1000, rel=0.03)


def test_quantile_table_gives_its_quantiles_back(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("# mine\nquantile,prompt_tokens,output_tokens\n0,1,1\n0.5,101,1\n1,1001,1\n")
    drawn = lengths({"quantiles": str(path)})
    assert np.quantile(drawn, [0.25, 0.5, 0.75]) == pytest.approx([51, 101, 551], rel=0.05)
    path.write_text("quantile,prompt_tokens,output_tokens\n0,7,1\n1.0,7,1\n")
    assert set(lengths({"quantiles": str(path)})) == {7}  # a changed file is read anew


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantile,prompt,output\n0,1,1\n", "line 1: the columns must be quantile, prompt_tokens, output_tokens"),
        ("quantile,prompt_tokens,output_tokens\n0,1,1\n1,x,1\n", "line 3: '1,x,1' must be"),
        ("quantile,prompt_tokens,output_tokens\n0,0,1\n1,1,1\n", "line 2: '0,0,1' must be"),
        ("quantile,prompt_tokens,output_tokens\n0,5,1\n1,4,1\n", "line 3: quantiles must increase"),
        ("quantile,prompt_tokens,output_tokens\n0,5,1\n0.9,6,1\n", "end with 1"),
    ],
)
def test_broken_table_names_its_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(TraceError, match=rf"quantiles: .*t.csv.*{message}"):
        lengths({"quantiles": str(tmp_path / "t.csv")})


def test_trace_lengths_alone_or_in_pairs(tmp_path):
    source = RequestTrace(np.zeros(3), np.array([10, 20, 30]), np.array([1, 2, 3]), np.zeros(3, dtype=int))
    path = str(tmp_path / "source.csv")
    write_requests(source, path)
    pairs = generate({"lengths": {"trace": path}}, rate=1, requests=300, seed=0)
    assert (pairs.prompt_tokens == 10 * pairs.output_tokens).all()
    assert set(pairs.output_tokens) == {1, 2, 3}
    alone = generate({"prompt": {"trace": path}, "output": {"trace": path}}, rate=1, requests=300, seed=0)
    assert set(alone.prompt_tokens) == {10, 20, 30}
    assert not (alone.prompt_tokens == 10 * alone.output_tokens).all()


def test_same_seed_gives_the_same_bytes_and_another_seed_others():
    one, two, other = (generate(SPEC, rate=2.0, requests=500, seed=seed) for seed in (1, 1, 2))
    assert one == two
    for name in ("arrival", "prompt_tokens", "output_tokens", "cls"):
        assert not np.array_equal(getattr(one, name), getattr(other, name))


@settings(max_examples=30, deadline=None)
@given(rate=st.floats(1e-3, 1e3), seed=st.integers(0, 2**63), cv=st.floats(0.2, 4.0))
def test_another_rate_is_the_same_trace_on_a_stretched_axis(rate, seed, cv):
    for arrival in ({"process": "poisson"}, {"process": "gamma", "cv": cv}):
        one, other = (generate({**SPEC, "arrival": arrival}, rate=r, requests=50, seed=seed) for r in (1.0, rate))
        assert other.arrival * rate == pytest.approx(one.arrival, rel=1e-9)
        for name in ("prompt_tokens", "output_tokens", "cls"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_a_longer_trace_begins_with_the_shorter_one():
    spec = {**SPEC, "arrival": {"process": "gamma", "cv": 2.0}}
    long = generate(spec, rate=2.0, requests=1001, seed=1)
    assert long.head(100) == generate(spec, rate=2.0, requests=100, seed=1)


def test_streams_do_not_disturb_each_other():
    base = generate(SPEC, rate=2.0, requests=500, seed=1)

    share = generate({**SPEC, "classes": {"ls": {**LS, "share": 0.5}, "be": BE}}, rate=2.0, requests=500, seed=1)
    assert np.array_equal(base.arrival, share.arrival)
    same = base.cls == share.cls
    assert 0 < same.sum() < 500
    assert (share.cls[base.cls == 0] == 0).all()  # a larger share only adds to the class
    assert np.array_equal(base.prompt_tokens[same], share.prompt_tokens[same])

    longer = generate(
        {**SPEC, "classes": {"ls": {**LS, "prompt": {"fixed": 9}}, "be": BE}}, rate=2.0, requests=500, seed=1
    )
    be = base.cls == 1
    assert np.array_equal(base.arrival, longer.arrival)
    assert np.array_equal(base.cls, longer.cls)
    assert np.array_equal(base.output_tokens, longer.output_tokens)
    assert np.array_equal(base.prompt_tokens[be], longer.prompt_tokens[be])

    bursty = generate({**SPEC, "arrival": {"process": "gamma", "cv": 3.0}}, rate=2.0, requests=500, seed=1)
    assert not np.array_equal(base.arrival, bursty.arrival)
    for name in ("prompt_tokens", "output_tokens", "cls"):
        assert np.array_equal(getattr(base, name), getattr(bursty, name))


def test_assign_classes_and_arrivals():
    plain = generate(FIXED, rate=1.0, requests=N, seed=0)
    assert plain.classes == ("all",)
    trace = assign_classes(plain, {"ls": 0.2, "be": 0.8}, seed=1)
    assert trace == assign_classes(plain, {"ls": 0.2, "be": None}, seed=1)
    assert (trace.cls == 0).mean() == pytest.approx(0.2, abs=0.01)
    assert np.array_equal(trace.arrival, plain.arrival)
    timed = assign_arrivals(trace, rate=8.0, seed=2)
    assert timed.rate == pytest.approx(8.0, rel=0.03)
    assert np.array_equal(timed.cls, trace.cls)
    bursty = assign_arrivals(trace, {"process": "gamma", "cv": 2.0}, rate=8.0, seed=2)
    assert bursty.describe()["arrival_cv"] == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"arivals": {}}, "^arivals: unknown key 'arivals'; did you mean 'arrival'.* allowed: arrival, classes"),
        (with_arrival(process="gama"), "arrival.process: 'gama' is unknown; .* allowed: poisson, gamma, onoff"),
        (with_arrival(process="gamma"), "arrival.cv: this key is missing"),
        (with_arrival(process="gamma", cv=0), "arrival.cv: must be greater than 0, got 0"),
        (with_arrival(process="gamma", cv=1e-200), "arrival.cv: 1e-200 must lie between 0.001 and 100"),
        (with_arrival(process="poisson", cv=2), "arrival.cv: unknown key 'cv'; allowed: process"),
        (with_arrival(process="onoff", on_s=1, off_s=1, burst=3), r"arrival: burst \(3.0\) must lie between 1 .* = 2"),
        (with_arrival(process="onoff", on_s=1, off_s="x"), "arrival.off_s: must be a number, got 'x'"),
        ({"arrival": ["poisson"], **FIXED}, "arrival: must be the name of a process, such as poisson, or a mapping"),
        ({"arrival": "poison", **FIXED}, "arrival.process: 'poison' is unknown; did you mean 'poisson'"),
        ({**FIXED, "prompt": {"unifrm": [1, 2]}}, "prompt.unifrm: unknown key .* allowed: fixed, uniform"),
        ({**FIXED, "prompt": {"fixed": 1, "uniform": [1, 2]}}, "prompt: give one of fixed, .*; got fixed, uniform"),
        ({**FIXED, "prompt": {"fixed": 0}}, "prompt.fixed: must be greater than or equal to 1, got 0"),
        ({**FIXED, "prompt": {"uniform": [5, 1]}}, r"prompt: uniform: low \(5\) must not exceed high \(1\)"),
        ({**FIXED, "prompt": {"lognormal": {"median": 5}}}, "prompt.lognormal.sigma: this key is missing"),
        ({**FIXED, "prompt": {"lognormal": {"sigma": 5}}}, "prompt.lognormal: give either mean or median"),
        ({**FIXED, "prompt": {"lognormal": {"mean": 5, "sigma": 1, "min": 9, "max": 8}}}, r"min \(9\) must not exceed"),
        ({**FIXED, "prompt": {"lognormal": {"median": 5, "sigma": 101}}}, "sigma: must be less than or equal to 10"),
        ({**FIXED, "prompt": {"lognormal": {"median": 1e15, "sigma": 2}}}, "prompt.lognormal: draws .*: give a max"),
        ({**FIXED, "prompt": {"quantiles": "azur"}}, "prompt.quantiles: unknown .* allowed: .*azure_conv, or a path"),
        ({"lengths": {"trace": "none.csv"}}, "lengths.trace: no such file: none.csv"),
        ({"lengths": {"trace": __file__}, **FIXED}, "either lengths .* or prompt and output"),
        ({"prompt": {"fixed": 1}}, "class all needs prompt and output"),
        ({"classes": {"a": {"share": 0.5}, "b": {"share": 0.4}}, **FIXED}, r"shares \(a 0.5, b 0.4\) add up to 0.9"),
        ({"classes": {"a": {}, "b": {}}, **FIXED}, "classes: a, b have no share; one class may leave it out"),
        ({"classes": {"a": {"share": 1.5}}, **FIXED}, "classes.a.share: must be less than or equal to 1, got 1.5"),
        ({"classes": {"a": {"shre": 1}}, **FIXED}, "classes.a.shre: unknown key 'shre'; .* allowed: share, prompt"),
        ({"classes": {}, **FIXED}, "classes: .*at least one class"),
    ],
)
def test_wrong_spec_names_the_key_and_what_is_allowed(spec, message):
    with pytest.raises(TraceError, match=message):
        generate(spec, rate=1.0, requests=100, seed=0)


@pytest.mark.parametrize(
    "change", [{"rate": 0}, {"rate": float("inf")}, {"requests": 0}, {"requests": 1.5}, {"seed": -1}]
)
def test_wrong_argument_is_named(change):
    with pytest.raises(TraceError, match=rf"{next(iter(change))}: .* must be"):
        generate(FIXED, **{"rate": 1.0, "requests": 10, "seed": 0, **change})


def test_bundled_tables_say_where_they_come_from():
    assert "azure_conv" in bundled_lengths()
    for name in bundled_lengths():
        text = (BUNDLED / f"{name}.csv").read_text()
        assert "# Source:" in text
        assert "# Licence:" in text
        assert len(lengths({"quantiles": name}, n=10)) == 10


@pytest.mark.skipif(not AZURE.exists(), reason="the Azure trace is not here")
def test_bundled_azure_table_is_what_the_script_derives():
    script = ROOT / "tools/derive_lengths.py"
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("derive_lengths", script))
    spec.loader.exec_module(module)
    trace = module.read_requests(AZURE)
    assert module.table(trace) == (BUNDLED / "azure_conv.csv").read_text()
    assert lengths({"quantiles": "azure_conv"}).mean() == pytest.approx(trace.prompt_tokens.mean(), rel=0.02)
