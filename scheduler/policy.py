"""The base of all policies: the questions that the Scheduler asks, and what it does without further answers.

A policy of one's own is a subclass of :class:`Policy` in a file of its own. What it may ask: `s.waiting` (prefill
queues), `s.ready` (decode pool), `s.suspended_passes`, `s.has_slot`, `s.can_prefill`, `s.limits`, `s.kv`. What it may
do: call `batch.prefill(...)` and `batch.decode()`. It keeps no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import ne
from typing import TYPE_CHECKING, Any, Literal, get_args

from qllm.scheduler.pass_builder import PassBuilder
from qllm.scheduler.passes import NEVER, Pass
from qllm.scheduler.request import PolicyError, Request, UnknownPolicy

if TYPE_CHECKING:
    from qllm.scheduler.scheduler import Scheduler

Granularity = Literal["iteration", "layer", "expert"]
GoesOn = Callable[[float, float], bool]  #: see `Policy.alike`


class Policy:
    """The questions that the Scheduler asks. As it stands: one class, prefills first, never preempts.

    Attributes:
        granularity: Where a running pass may stop: at its end only ("iteration"), between layers ("layer"), or at
            every point inside a layer ("expert").
        merge: Whether the launches of the pass that runs take tokens of suspended passes that wait at the same experts.
        urgent: Levels up to this one are latency-sensitive (LS), the others best-effort (BE). Only LS requests may
            use the KV blocks that `Limits.urgent_blocks` reserves.
        max_suspended_s: Seconds. A pass that was suspended for so long in all is due: it goes on at the next decision.
        max_wait_s: Seconds. A BE request that was in no running pass for so long in all gets the level `urgent`.
        steady: Whether it decides by who waits, is ready or is suspended alone: not by the time, nor by how often it
            was asked; nor does it hear of passes (`ran`). A simulation asks it less often then. A subclass with answers
            of its own has to say so again.
        predicts: Whether it asks `s.seconds`, so that the scheduler keeps count of how long passes take.
    """

    granularity: Granularity = "iteration"
    merge: bool = False
    urgent: int = 0
    max_suspended_s: float = NEVER
    max_wait_s: float = NEVER
    steady: bool = False
    predicts: bool = False

    def start(self, s: Scheduler) -> None:
        """Begin to decide for `s`, which is new: forget what was noted for another one."""

    def admits(self, s: Scheduler, r: Request, now: float) -> str | None:
        """Return why `r`, which has just come, is turned away; None where it is let in."""
        return None

    def level(self, r: Request) -> int:
        """Return the class that decisions compare; lower is more urgent."""
        return r.priority

    def order(self, r: Request) -> tuple[Any, ...]:
        """Return the sort key within a level's prefill queue: first come, first served.

        Asked at arrival, and where the priority changes.
        """
        return (r.arrival, r.id)

    def select(self, s: Scheduler, batch: PassBuilder, now: float) -> None:
        """Fill the next pass. An empty one hands the device to a suspended pass."""
        if not batch.prefill():
            batch.decode()

    def preempts(self, s: Scheduler, running: Pass, now: float) -> bool:
        """Return whether what waits stops `running` at the preemption point where it stands. Must be O(1)."""
        return False

    def resume(self, s: Scheduler, suspended: Pass, now: float) -> bool:
        """Return whether `suspended`, the most urgent such pass, goes on before anything new is launched.

        By default it does, unless what waits would stop it at once.
        """
        return not self.preempts(s, suspended, now)

    def ran(self, s: Scheduler, p: Pass, now: float, ended: bool) -> None:
        """Note that `p` ran from `p.launched` until now, to its end or not. Its requests have no new tokens yet."""

    def recheck_at(self, s: Scheduler, running: Pass, now: float) -> float:
        """Return when (seconds) `preempts` may turn true though nothing happens; inf: never."""
        return NEVER

    def alike(self, s: Scheduler, p: Pass) -> GoesOn | bool:
        """Return whether passes like `p`, which begins and only decodes, follow it while nobody comes or ends.

        For policies that are not steady; a simulation asks them less often then. A subclass with answers of its own has
        to answer this again.

        Returns:
            Whether they do, whatever the time, and without being told (`ran`) of passes that end. Or a function that
            is called with begin and end (seconds) of each pass in turn. Where a pass alike follows, it takes note of
            that one as `ran` would, and returns True. Else it takes note of nothing.
        """
        return False

    def __repr__(self) -> str:
        return f"policy {type(self).__name__}"


def checked_policy(policy: Policy, name: str = "") -> Policy:
    """`policy`, which messages call `name`, if its attributes are what is allowed. Raises UnknownPolicy."""
    name = name or repr(policy)
    for key, (fits, allowed) in _ATTRIBUTES.items():
        try:
            value = getattr(policy, key)
        except Exception as error:
            raise policy_error(policy, key, error) from error
        if not fits(value):
            raise UnknownPolicy(f"{name}: {key} is {value!r:.80}{allowed}")
    return policy


def steadiness(policy: Policy) -> tuple[bool, bool]:
    """Whether `policy` is steady, and whether it is asked `alike`: by the class that its last answers are from."""
    if policy.max_wait_s < NEVER:
        return False, False
    alike = _said_last(policy, "alike").get("alike")
    steady = bool(_said_last(policy, "steady").get("steady")) and not policy.predicts
    return steady, alike is not None and alike is not vars(Policy)["alike"]


def _said_last(policy: Policy, name: str) -> Mapping[str, Any]:
    """What the object or class says that answers last, or that says `name`."""
    parts = (getattr(policy, "__dict__", {}), *map(vars, type(policy).__mro__))
    return next(part for part in parts if name in part or any(map(_answers, part.items())))


def _answers(item: tuple[str, Any]) -> bool:
    name, value = item
    return callable(value) and name not in _AT_ARRIVAL and not name.startswith("__")


def ask(policy: Policy, question: str, *args: Any) -> Any:
    """The policy's answer to `question`, the name of a method. Raises PolicyError where it breaks or is none."""
    try:
        answer = getattr(policy, question)(*args)
        if answer is None and question in _SILENT:
            return None
        if hasattr(answer, "send"):  # a generator or a coroutine: nothing of it ran
            answer.close()
            raise TypeError("yield and async are not for a policy's questions")
    except PolicyError:  # of a question within the question
        raise
    except Exception as error:
        raise policy_error(policy, question, error) from error
    return checked_answer(policy, question, answer)


def checked_answer(policy: Policy, question: str, answer: Any) -> Any:
    """`answer`, if it is one that `question` allows. Raises PolicyError."""
    fits, allowed = _ANSWERS[question]
    try:
        good = fits(answer)
    except Exception:  # it does not even compare
        good = False
    if not good:
        raise PolicyError(f"{policy!r}: {question} gave {answer!r:.80}; allowed: {allowed}")
    return answer


def classify(policy: Policy, r: Request) -> tuple[int, tuple[Any, ...]]:
    """The level that the policy gives `r`, and its place in the queue. Raises PolicyError."""
    before, level = r.level, ask(policy, "level", r)
    r.level = level  # which `order` may ask for
    try:
        return level, ask(policy, "order", r)
    finally:
        r.level = before


def policy_error(policy: Policy, question: str, error: Exception) -> PolicyError:
    """What is told of an exception of a policy: the question, and file and line where it broke."""
    where, trace = "", error.__traceback__
    while trace is not None:  # the last frame is where it broke
        where, trace = f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})", trace.tb_next
    return PolicyError(f"{policy!r}: {question} raised {type(error).__name__}: {' '.join(str(error).split())}{where}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _is_time(value: Any) -> bool:
    return _is_number(value) and float(value) <= NEVER  # OverflowError where a whole number is too large


def _is_bound(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_nothing(answer: Any) -> bool:
    return answer is None or isinstance(answer, bool)  # "return batch.decode()" is well meant


def _is_yes_or_no(answer: Any) -> bool:
    return answer in (True, False)  # those of numpy too


def _is_key(answer: Any) -> bool:
    return isinstance(answer, tuple) and not any(map(ne, answer, answer))


def _is_reason(answer: Any) -> bool:
    return answer is None or (isinstance(answer, str) and bool(answer))


_Check = tuple[Callable[[Any], bool], str]

#: questions that are mostly answered by None, which is checked first
_SILENT = {"select", "ran"}

#: questions that are not asked between two passes
_AT_ARRIVAL = {"start", "admits", "level", "order"}

#: what the attributes of a policy may be, and how that is told
_ATTRIBUTES: dict[str, _Check] = {
    "granularity": (lambda value: value in get_args(Granularity), f"; allowed: {', '.join(get_args(Granularity))}"),
    "merge": (_is_bool, ", must be true or false"),
    "predicts": (_is_bool, ", must be true or false"),
    "steady": (_is_bool, ", must be true or false"),
    "urgent": (_is_number, ", must be a number"),
    "max_suspended_s": (_is_bound, ", must be a number of at least 0"),
    "max_wait_s": (_is_bound, ", must be a number of at least 0"),
}

#: what a policy may answer
_ANSWERS: dict[str, _Check] = {
    "start": (_is_nothing, "None"),
    "admits": (_is_reason, "why the request is turned away, in words, or None"),
    "level": (lambda answer: isinstance(answer, int), "a whole number"),
    "order": (_is_key, "a tuple without NaN"),
    "select": (_is_nothing, "None, since `batch` takes what is chosen"),
    "preempts": (_is_yes_or_no, "True or False"),
    "resume": (_is_yes_or_no, "True or False"),
    "ran": (_is_nothing, "None"),
    "recheck_at": (_is_time, "seconds, or inf for never"),
    "alike": (lambda answer: _is_bool(answer) or callable(answer), "True, False, or a function of a pass's times"),
}
