"""The mean of timing traces: of one model on one device, and nothing dropped in silence."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from qllm.cli import app
from qllm.traces.step_times.timing_mean import mean_of
from qllm.traces.step_times.timings import TimingError, Timings, affine_timings

ONE = affine_timings(host_s=1e-3, conditions={"threads": 1, "engine_loop_s": 1e-4, "note": "a", "fit": 0.1}, repeats=2)


def at_half_speed(timings: Timings) -> Timings:
    return replace(timings.scaled(2.0), conditions={**timings.conditions, "engine_loop_s": 3e-4, "note": "b", "fit": 1})


def test_a_mean_lies_between():
    mean = mean_of([ONE, at_half_speed(ONE), ONE, at_half_speed(ONE)])
    assert mean.host_s == pytest.approx(1.5e-3)
    for step, args in (("dense_pre", (100,)), ("attention_prefill", (7, 300)), ("expert", (3,)), ("head", (2,))):
        assert getattr(mean, step)(*args) == pytest.approx(1.5 * getattr(ONE, step)(*args))
    assert mean.conditions == {"threads": 1, "engine_loop_s": pytest.approx(2e-4), "fit": pytest.approx(0.55)}
    assert mean.repeats == 8
    assert "mean of 4" in mean.name
    assert "mean of 4" in mean.provenance
    assert mean.source == ONE.source


def test_the_mean_of_one_is_that_one():
    assert mean_of([ONE]) is ONE


def test_spreads_are_averaged_and_repeats_added_where_all_state_them():
    point = ONE.points[0]
    stated = replace(ONE, points=(point._replace(spread_s=1e-6, repeats=3), *ONE.points[1:]))
    wider = replace(ONE, points=(point._replace(spread_s=3e-6, repeats=4), *ONE.points[1:]))
    assert mean_of([stated, wider]).points[0] == point._replace(spread_s=2e-6, repeats=7)
    assert mean_of([stated, ONE]).points[0] == point


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (replace(ONE, device="another"), "device is 'another', and 'none'"),
        (replace(ONE, versions={"torch": "1"}), "versions is"),
        (replace(ONE, query_block_s=1e-6), "query_block_s stands in only one"),
        (replace(ONE, points=ONE.points[::-1]), "row 1: holds attention_decode at tokens"),
        (replace(ONE, points=(*ONE.points, ONE.points[0]._replace(tokens=7))), "row 17: holds dense_pre at tokens 7"),
        (replace(ONE, points=(ONE.points[0]._replace(source="imported"), *ONE.points[1:])), "row 1: holds .*imported"),
    ],
)
def test_unlike_traces_are_refused(other, told):
    with pytest.raises(TimingError, match=told):
        mean_of([ONE, other])


def test_no_trace_is_refused():
    with pytest.raises(TimingError, match="no timing trace"):
        mean_of([])


def test_command(tmp_path):
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for file, timings in zip(files, (ONE, at_half_speed(ONE)), strict=True):
        timings.save(file)
    done = CliRunner().invoke(app, ["timings", "mean", *map(str, files), "--out", str(tmp_path / "out" / "mean.csv")])
    assert done.exit_code == 0, done.output
    assert Timings.load(tmp_path / "out" / "mean.csv").host_s == pytest.approx(1.5e-3)
    replace(ONE, model="another").save(files[1])
    done = CliRunner().invoke(app, ["timings", "mean", *map(str, files), "--out", str(tmp_path / "out" / "mean.csv")])
    assert done.exit_code != 0
    assert "model is 'another'" in str(done.exception or done.output)
