"""What a timing trace answers: monotone, exact at clean points, never a silent extrapolation."""

import itertools
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllm.traces.step_times.interpolate import isotonic, isotonic_grid
from qllm.traces.step_times.testing import affine_timings
from qllm.traces.step_times.timings import ExtrapolationWarning, TimingError, Timings, bundled_timings

CURVES = ("dense_pre", "dense_post", "expert", "head")
GRIDS = ("attention_prefill", "attention_decode")
NAMES = ["a100-mixtral-8x7b-4bit-hf", "a100-mixtral-8x7b-int4", "a100-qwen3-30b-a3b-bf16"]


@pytest.fixture(scope="module", params=NAMES)
def shipped(request) -> Timings:
    return Timings.load(request.param)


def test_the_bundled_names():
    assert set(NAMES) <= set(bundled_timings())
    assert bundled_timings() == sorted(bundled_timings())


@pytest.mark.filterwarnings("ignore::qllm.traces.step_times.timings.ExtrapolationWarning")
@pytest.mark.parametrize("step", CURVES)
def test_shipped_curves_never_fall_and_start_at_zero(shipped, step):
    curve = getattr(shipped, step)
    high = shipped.range(step)[1]
    seconds = curve(np.arange(high + 100))
    assert seconds[0] == 0
    assert seconds[1] > 0
    assert (np.diff(seconds) >= 0).all()


@pytest.mark.filterwarnings("ignore::qllm.traces.step_times.timings.ExtrapolationWarning")
@pytest.mark.parametrize("step", GRIDS)
def test_shipped_grids_never_fall_in_either_direction(shipped, step):
    tokens = np.unique(np.geomspace(1, 40000, 60).astype(int))
    context = np.linspace(0, 80000, 97)
    seconds = getattr(shipped, step)(tokens[:, None], context[None, :])
    assert (seconds > 0).all()
    tolerance = -1e-15  # the last digit of a float sum
    assert (np.diff(seconds, axis=0) >= tolerance).all()
    assert (np.diff(seconds, axis=1) >= tolerance).all()


@given(
    pre=st.lists(st.floats(0, 1), min_size=2, max_size=8),
    asked=st.lists(st.floats(0, 50), min_size=2, max_size=20),
)
def test_any_noisy_curve_answers_monotonically(pre, asked):
    from qllm.traces.step_times.interpolate import Curve

    curve = Curve("dense_pre", [1 + 3 * at for at in range(len(pre))], pre)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExtrapolationWarning)
        seconds = [curve(x) for x in sorted(asked)]
    assert all(left <= right + 1e-12 for left, right in itertools.pairwise(seconds))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30))
def test_isotonic_keeps_the_sum_and_the_order(values):
    fitted = isotonic(values)
    assert (np.diff(fitted) >= 0).all()
    assert fitted.sum() == pytest.approx(sum(values), abs=1e-9)
    assert isotonic(sorted(values)) == pytest.approx(sorted(values))


def test_isotonic_grid_leaves_a_monotone_grid_alone_and_repairs_another():
    good = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert (isotonic_grid(good) == good).all()
    fixed = isotonic_grid(np.array([[5.0, 2.0, 7.0], [3.0, 4.0, 1.0]]))
    assert (np.diff(fixed, axis=0) >= 0).all()
    assert (np.diff(fixed, axis=1) >= 0).all()


def test_numbers_and_arrays_agree(shipped):
    tokens = np.array([0, 1, 5, 77, 300, 900])
    for step in CURVES:
        curve = getattr(shipped, step)
        assert [curve(int(n)) for n in tokens] == pytest.approx(curve(tokens).tolist(), rel=1e-12)
        assert curve(np.int64(77)) == curve(77) == curve(77.0)
    for step in GRIDS:
        grid = getattr(shipped, step)
        context = np.array([10.0, 100.5, 4000, 1, 300, 31000])
        one_by_one = [grid(int(n), c) for n, c in zip(np.minimum(tokens, 512), context, strict=True)]
        assert grid(np.minimum(tokens, 512), context).tolist() == pytest.approx(one_by_one, rel=1e-12)
        assert grid(np.int64(5), 300) == grid(5, 300)
        assert grid(5, context).tolist() == pytest.approx([grid(5, c) for c in context])


def test_a_straight_line_is_met_exactly_inside_and_outside():
    timings = affine_timings(dense_pre=(1e-3, 1e-5), decode=(1e-3, 1e-4, 1e-8), tokens=100, context=1000)
    assert timings.dense_pre(50) == pytest.approx(1e-3 + 50e-5)
    assert timings.attention_decode(50, 500) == pytest.approx(1e-3 + 50e-4 + 50 * 500e-8)
    with pytest.warns(ExtrapolationWarning):
        assert timings.dense_pre(200) == pytest.approx(1e-3 + 200e-5)
    with pytest.warns(ExtrapolationWarning):
        assert timings.attention_decode(200, 3000) == pytest.approx(1e-3 + 200e-4 + 200 * 3000e-8)
    assert timings.attention_decode(np.array([200]), 3000)[0] == pytest.approx(timings.attention_decode(200, 3000))


@pytest.mark.parametrize(
    ("step", "arguments", "named"),
    [
        ("dense_pre", (101,), "dense_pre: 101 tokens asked for, measured from 1 to 100"),
        ("expert", (np.array([3, 500]),), "expert: 500 tokens asked for, measured from 1 to 100"),
        (
            "attention_decode",
            (101, 5),
            r"attention_decode: \(101, 5\) asked for, measured from \(1, 0\) to \(100, 1000",
        ),
        ("attention_prefill", (5, 1001), r"attention_prefill: \(5, 1001\) asked for"),
        ("attention_prefill", (np.array([5, 500]), 10), r"attention_prefill: \(500, 10\) asked for"),
    ],
)
def test_outside_the_range_one_warning_a_step_names_the_range(step, arguments, named):
    timings = affine_timings(tokens=100, context=1000)
    with pytest.warns(ExtrapolationWarning, match=named):
        getattr(timings, step)(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(timings, step)(*arguments)


def test_inside_the_range_nothing_warns(shipped):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in CURVES:
            low, high = shipped.range(step)
            getattr(shipped, step)(np.array([0, low, high]))
        for step in GRIDS:
            (low, shallow), (high, deep) = shipped.range(step)
            getattr(shipped, step)(low, shallow)
            getattr(shipped, step)(high, deep)


def test_below_the_smallest_measured_size_the_first_value_holds_and_warns():
    points = [point for point in affine_timings().points if point.step != "head"]
    head = [point._replace(tokens=point.tokens + 7) for point in affine_timings().points if point.step == "head"]
    timings = replace(affine_timings(), points=(*points, *head))
    with pytest.warns(ExtrapolationWarning, match="head: 3 tokens asked for, measured from 8"):
        assert timings.head(3) == timings.head(8)


def test_steps_that_a_trace_may_leave_out(tmp_path):
    plain, whole = affine_timings(), affine_timings(launch=(1e-4, -1e-6), after_prefill=(1e-3, 1e-4), tokens=50)
    assert (plain.launch(8), plain.after_prefill(8)) == (plain.launch_s, 0.0)
    whole.save(tmp_path / "t.csv")
    for timings in (whole, Timings.load(tmp_path / "t.csv")):
        assert [timings.launch(n) for n in (1, 20, 50, 80)] == pytest.approx([9.9e-5, 8e-5, 5e-5, 5e-5])
        assert timings.after_prefill(20) == pytest.approx(3e-3)
        assert timings.steps == (*plain.steps, "launch", "after_prefill")
        assert timings.describe()["steps"]["launch"]["cleaned_max"] == 0
    with pytest.raises(TimingError, match=r"unknown step 'launch'; allowed: dense_pre, .*, head$"):
        plain.range("launch")
    with pytest.raises(TimingError, match="step 'launch' has 1 points; at least 2 are needed"):
        replace(whole, points=tuple(point for point in whole.points if point[:2] != ("launch", 50)))


def test_negative_sizes_are_refused():
    timings = affine_timings()
    for call in (lambda: timings.expert(np.array([1, -1])), lambda: timings.dense_pre(-1)):
        with pytest.raises(ValueError, match="at least 0, got -1"):
            call()
    with pytest.raises(ValueError, match="at least 0, got -2"):
        timings.attention_decode(-2, 10)


def test_expert_table_is_f_by_index(shipped):
    table = shipped.expert_table(64)
    assert table.shape == (65,)
    assert table.tolist() == pytest.approx([shipped.expert(m) for m in range(65)])


def test_describe_tells_measured_from_modelled(shipped):
    told = shipped.describe()
    assert told["source"] == ("modelled" if shipped.name.endswith("-hf") else "imported")
    assert told["modelled"]
    prefill = told["steps"]["attention_prefill"]
    assert prefill["points"]["modelled"] > 0
    assert sum(sum(step["points"].values()) for step in told["steps"].values()) == len(shipped.points)
    assert all(0 <= step["cleaned_max"] < 0.25 for step in told["steps"].values())
    with pytest.raises(TimingError, match="unknown step 'dense'; allowed"):
        shipped.range("dense")


def test_loading_needs_neither_pandas_nor_torch():
    code = (
        "import sys; from qllm.traces.step_times.timings import Timings, bundled_timings;"
        "[Timings.load(n).expert(3) for n in bundled_timings()];"
        "sys.exit(bool({'pandas', 'torch', 'pyarrow', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
