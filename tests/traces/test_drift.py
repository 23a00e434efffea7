"""Kinds of passes and the machine's speed are told apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllm.executor.calibration.grid import Cell
from qllm.executor.calibration.stopwatch import PassTimes
from qllm.executor.calibration.store import Kept
from qllm.traces.step_times import drift
from qllm.traces.step_times.drift import slowness, smooth

LEVELS = np.array([0.01, 0.05, 0.3, 1.0])


def visits(seed: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(at, kinds, seconds, speed): 400 visits in 100 s to a machine that takes up to 30 % more at times."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.uniform(0, 100, 400))
    kinds = rng.integers(len(LEVELS), size=400)
    speed = 1.15 + 0.15 * np.sin(at / 8 + rng.uniform(0, 6))
    return at, kinds, LEVELS[kinds] * speed * rng.lognormal(0, noise, 400), speed


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.05]))
def test_the_speed_is_found_and_kinds_are_left_with_their_own_time(seed, noise):
    at, kinds, seconds, speed = visits(seed, noise)
    slow = slowness(at, kinds, seconds)
    assert slow.mean() == pytest.approx(1)
    true = speed / speed.mean()
    assert np.abs(slow / true - 1).mean() < 0.02 + noise / 4
    for kind, level in enumerate(LEVELS):
        steady = seconds[kinds == kind] / slow[kinds == kind]
        assert steady.mean() == pytest.approx(level * speed.mean(), rel=0.02 + noise / 2)
        assert steady.std() / steady.mean() < 0.03 + 1.3 * noise  # 0.09 and more before


def test_a_machine_that_stood_still_once_is_not_slow_all_around():
    at, kinds, seconds, _ = visits(0, 0.0)
    seconds[200] *= 1000
    assert np.abs(slowness(at, kinds, seconds) / slowness(*visits(0, 0.0)[:3]) - 1).max() < 0.25


def test_a_time_far_from_all_visits_is_like_the_closest():
    assert smooth(np.array([0.0, 1.0]), np.array([1.0, 2.0]), np.array([1e6])) == pytest.approx([2.0], rel=1e-6)


def test_many_times_at_once_are_smoothed_in_parts(monkeypatch):
    at, _, seconds, _ = visits(0, 0.05)
    whole = smooth(at, seconds, at[:50])
    monkeypatch.setattr(drift, "AT_ONCE", 3 * len(at))
    assert smooth(at, seconds, at[:50]) == pytest.approx(whole, rel=1e-12)
    assert smooth(at, seconds, at[:0]).shape == (0,)


def test_a_calibration_is_that_of_the_average_speed(tmp_path):
    """Kinds that were visited while the machine was slow are not slower than the others."""
    kept = Kept(tmp_path / "out.measured", {})
    small, other, large = Cell(1, 1, 0), Cell(2, 1, 0), Cell(1, 64, 0)
    for second in range(60):
        slow = 2.0 if second < 30 else 1.0
        for cell in (small, other, large) if second % 2 else (small, large):
            if cell != other or second > 30:  # the other one only knows the fast half
                seconds = cell.tokens * (slow if cell != large else 1.0)
                kept.add(cell, PassTimes((("lead", seconds / 4), ("tail", seconds * 3 / 4)), ()), float(second))
    found, varied = Kept(kept.path, {}).steady([small, other, large], 16)
    assert found[other].total() / found[small].total() == pytest.approx(2, rel=0.05)
    assert found[small].total("tail") == pytest.approx(0.75 * found[small].total())
    assert found[small].seconds.sum(axis=1).std() < 0.25  # 0.5 before
    assert found[large].total() == pytest.approx(64)  # larger passes have a speed of their own
    assert varied > 0.2
