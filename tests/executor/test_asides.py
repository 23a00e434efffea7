"""What the engine's thread does aside, while its clock stands still."""

import threading
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from qllm.executor.calibration import engine_overhead as loop_cost
from qllm.executor.calibration.calibrate import CalibrationWarning, Extent, calibration
from qllm.executor.calibration.profiler import Bench
from qllm.executor.calibration.subject import Subject
from qllm.executor.engine.asides import PausingClock, asides
from qllm.executor.engine.engine import THREAD, Engine
from qllm.executor.engine.replay import replay
from qllm.executor.model.loading import prepare_model
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.timings import Timings

LIMITS = Limits(max_seqs=4, max_batched_tokens=32, kv_blocks=60)
EXTENT = Extent(max_tokens=16, max_context=32, max_batch=3)


@pytest.fixture(scope="module")
def subject(one_thread) -> Subject:
    return Subject("tiny", prepare_model(tiny_model("qwen3_moe", num_hidden_layers=2)), 2, 1000, "random")


def requests(n: int, seconds: float) -> RequestTrace:
    ones = np.ones(n, dtype=int)
    return RequestTrace(np.linspace(0, seconds, n), 6 * ones, 8 * ones, 0 * ones, ("all",))


def test_the_clock_stands_still_meanwhile():
    clock = PausingClock()
    slept: list[float] = []

    def doings() -> Iterator[None]:
        for _ in range(2):
            start = time.monotonic()
            time.sleep(0.05)
            slept.append(time.monotonic() - start)
            yield

    steps, before, began = doings(), clock.now(), time.monotonic()
    assert [clock.aside(steps) for _ in range(3)] == [True, True, False]
    assert sum(slept) <= clock.paused
    assert clock.now() - before <= time.monotonic() - began - sum(slept)
    assert clock.idle(clock.now() - 1) == 0


def test_requests_do_not_pay_for_what_is_done_aside(subject):
    threads: list[str] = []
    slept: list[float] = []

    def doings() -> Iterator[None]:
        while True:
            threads.append(threading.current_thread().name)
            start = time.monotonic()
            time.sleep(0.1)
            slept.append(time.monotonic() - start)
            yield

    clock = PausingClock()
    with Engine(subject.model, limits=LIMITS, clock=clock) as engine, asides(engine, clock, doings(), 0.02):
        began = time.monotonic()
        result = replay(engine, requests(6, 0.2), priorities={"all": 0})
        took, paused = time.monotonic() - began, clock.paused
    assert set(threads) == {THREAD}
    most = took - paused + max(slept)  # a step may have ended after the replay
    assert result.arrival[-1] <= result.makespan <= most
    assert paused >= 0.1 * 5


def test_what_breaks_aside_is_told_at_the_end(subject):
    def doings() -> Iterator[None]:
        yield
        raise ValueError("a visit broke")

    clock = PausingClock()
    with Engine(subject.model, limits=LIMITS, clock=clock) as engine:
        with pytest.raises(ValueError, match="a visit broke"), asides(engine, clock, doings(), 0.001):
            result = replay(engine, requests(20, 0.3), priorities={"all": 0})
        assert np.isfinite(result.finish).all()


@pytest.mark.filterwarnings(f"ignore::{CalibrationWarning.__module__}.CalibrationWarning")
def test_a_model_is_calibrated_inside_a_run_and_generates_what_it_would(subject, tmp_path, monkeypatch):
    threads: list[str] = []
    visit = Bench.visit

    def watched(self, cell, watch):
        threads.append(threading.current_thread().name)
        return visit(self, cell, watch)

    monkeypatch.setattr(Bench, "visit", watched)
    monkeypatch.setattr(loop_cost, "PAUSES", 1)
    visits = calibration(subject, tmp_path / "tiny.csv", EXTENT, (1, 1))
    clock = PausingClock()

    def served() -> list[list[int]]:
        streams = [engine.submit([1, 2, n], max_new_tokens=40) for n in range(3)]
        return [stream.result().tokens for stream in streams]

    with Engine(subject.model, limits=LIMITS, clock=clock) as engine:
        alone = served()
        with asides(engine, clock, islice(visits, 20), 0.001):  # after the last visit comes an engine of its own
            assert served() == alone
    assert threads.count(THREAD) >= 1
    for _ in visits:
        pass
    assert Timings.load(tmp_path / "tiny.csv").repeats >= 1
