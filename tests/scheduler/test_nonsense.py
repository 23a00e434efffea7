"""A policy that answers with nonsense is refused; the error names the policy, the question and the answer."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np
import pytest

from qllm.scheduler import Limits, Policy, PolicyError, Request, Scheduler, SchedulerError, UnknownPolicy
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings
from tests.worlds import run


class Raises:
    """Stands for a question that raises."""

    def __repr__(self) -> str:
        return "raises"


RAISES = Raises()
ANSWERS: dict[str, list[Any]] = {
    "start": ["soon", nan, [1], RAISES],
    "admits": [True, nan, 5, "", RAISES],
    "level": [None, nan, "urgent", 0.5, RAISES],
    "order": [None, 5.0, (0, nan), [1], (np.zeros(2),), RAISES],
    "select": [["request 0"], nan, "prefill", RAISES],
    "preempts": [None, nan, "yes", 2, np.zeros(2), RAISES],
    "resume": [None, nan, "yes", (), RAISES],
    "ran": ["well", nan, 0.5, RAISES],
    "recheck_at": [None, nan, "soon", True, 10**400, RAISES],
}
ATTRIBUTES: dict[str, list[Any]] = {
    "granularity": ["token", nan, None, RAISES],
    "merge": ["yes", nan, 1, RAISES],
    "predicts": ["yes", nan, None, RAISES],
    "steady": ["yes", nan, None, RAISES],
    "urgent": ["ls", nan, True, RAISES],
    "max_suspended_s": ["1 s", nan, -1.0, None, RAISES],
    "max_wait_s": ["1 s", nan, -1, True, RAISES],
}
QUESTIONS = [(question, answer) for question, answers in ANSWERS.items() for answer in answers]
VALUES = [(key, value) for key, values in ATTRIBUTES.items() for value in values]


class Preempting(Policy):
    """So that every question is asked."""

    granularity = "expert"

    def preempts(self, s, running, now):
        return s.waiting.level() < running.prefill_level and s.can_prefill(s.waiting.level())


def odd(name: str, answer: Any) -> Policy:
    """Answers one question, or sets one attribute, so."""

    def given(*args: Any) -> Any:
        return 1 / 0 if answer is RAISES else answer

    if name in ANSWERS:
        return type("Odd", (Preempting,), {name: given})()
    return type("Odd", (Preempting,), {name: property(given) if answer is RAISES else answer})()


def told(name: str, answer: Any) -> list[str]:
    """What the error says."""
    if answer is RAISES:
        return [f"policy Odd: {name} raised ZeroDivisionError: division by zero"]
    says = "gave" if name in ANSWERS else "is"
    return [f"policy Odd: {name} {says} {answer!r:.80}", "allowed" if name in ANSWERS else ""]


def check(error: BaseException | None, name: str, answer: Any) -> None:
    assert isinstance(error, PolicyError | UnknownPolicy)
    for words in told(name, answer):
        assert words in str(error)
    assert len(str(error)) < 400
    assert "\n" not in str(error)


@pytest.mark.parametrize(("name", "answer"), [*QUESTIONS, *VALUES], ids=lambda part: f"{part!r:.20}")
def test_a_simulation_ends_with_the_policy_the_question_and_the_answer(name: str, answer: Any) -> None:
    steps = PassCostModel(affine_timings(layers=8, experts=8))
    trace = RequestTrace(
        np.array([0.0, 1e-3]), np.array([4000, 10]), np.array([1, 1]), np.array([1, 0]), ("ls", "be", "bulk")
    )
    with pytest.raises(SchedulerError) as caught:
        run(trace, odd(name, answer), Limits(), steps)
    check(caught.value, name, answer)


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("torch")
    from tests.engine_worlds import make_model

    return make_model()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("name", "answer"),
    # Those that are wrong in other ways are refused where these are. An engine asks at every point, without timers.
    [one for one in (*QUESTIONS, *VALUES) if (one[1] is RAISES or one[1] is nan) and one[0] != "recheck_at"],
    ids=lambda part: f"{part!r:.20}",
)
def test_an_engine_ends_with_the_policy_the_question_and_the_answer(name: str, answer: Any, model, one_thread) -> None:
    from qllm.executor.engine.clock import VirtualClock
    from qllm.executor.engine.engine import Engine
    from qllm.executor.errors import EngineClosed
    from qllm.executor.sampling.params import SamplingParams
    from tests.engine_worlds import ROOMY, step_model

    policy = odd(name, answer)
    if name in ("start", *ATTRIBUTES):
        with pytest.raises(SchedulerError) as refused:
            Engine(model, policy=policy, limits=ROOMY)
        check(refused.value, name, answer)
        return

    def serve(engine: Engine) -> None:
        asked = [
            engine.make_request([5] * 60, 2, 1, SamplingParams(), 0.0),
            engine.make_request([5] * 3, 2, 0, SamplingParams(), 3e-4),
        ]
        engine.call(lambda loop: loop.scheduled.extend(asked))
        for one in asked:
            engine.stream_of(one).result()

    clock, says = VirtualClock(step_model()), f"policy Odd: {name}"
    with (
        Engine(model, policy=policy, limits=ROOMY, clock=clock) as engine,
        pytest.raises(EngineClosed, match=says) as e,
    ):
        serve(engine)
    check(e.value.__cause__, name, answer)


def test_what_is_meant_well_is_taken() -> None:
    class WellMeant(Preempting):
        def select(self, s, batch, now):
            return batch.prefill() or batch.decode()

        def preempts(self, s, running, now):
            return np.bool_(super().preempts(s, running, now))

        def recheck_at(self, s, running, now):
            return -inf

        def admits(self, s, r, now):
            return None

    s = Scheduler(WellMeant(), Limits())
    s.add(Request(0, 100, 1, 1), 0.0)
    p = s.next(0.0)
    s.add(Request(1, 10, 1, 0), 0.1)
    assert s.should_yield(p, 0.1) is True
    assert s.recheck_at(p, 0.1) == -inf


def test_a_batch_is_not_asked_for_a_part_of_nothing() -> None:
    class Part(Policy):
        def select(self, s, batch, now):
            batch.prefill(tokens=nan)

    s = Scheduler(Part(), Limits())
    s.add(Request(0, 100, 1, 1), 0.0)
    with pytest.raises(PolicyError, match=r"policy Part: select raised ValueError: batch.prefill: tokens is nan"):
        s.next(0.0)
