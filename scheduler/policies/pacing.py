"""What `slack` keeps of time: when LS has to go on, what BE is owed, and how fast requests are launched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qllm.scheduler.passes import NEVER
from qllm.scheduler.request import Request

if TYPE_CHECKING:
    from qllm.scheduler.scheduler import Scheduler

LONGEST_GAP = 3.0  #: LS decodes again at the latest after so many times what was allowed for it, whatever its slack
CLOSE = 0.97  #: share of a bound that is aimed at: passes stop at their next preemption point, not at once
OWED_S = 0.5  #: BE goes before an LS prefill where it is owed more than this
SLICE = 0.75  #: BE runs between passes of LS for no less than this share of one, so that it is stopped less often
LEAST_SLICE_S = 0.001  #: no pass goes on for less
RECENT = 1 / 24  #: weight of the last launch


class Decoding:
    """The LS requests that are ready to decode, as they are until the next launch.

    Attributes:
        n: How many there are; at most as many as a pass holds.
        context: Tokens that they hold, all together.
        seconds: What a pass takes that decodes them alone; None where that is not known.
        due: When the first of them wants its next token, by its bound.
        bounds: The least of their bounds from token to token.
        unbounded: Whether any of them has none.
    """

    __slots__ = ("bounds", "context", "due", "n", "seconds", "unbounded")

    def __init__(self, s: Scheduler, urgent: float):
        batch = s.ready.batch
        found = context = 0
        self.due = self.bounds = NEVER
        self.unbounded = False
        for r in batch.members.values():
            if r.level <= urgent:
                done = batch.passes - r.joined
                found += 1
                context += r.computed + done
                if r.max_tpot_s < NEVER:
                    self.due = min(self.due, r.first_token + (r.generated + done) * r.max_tpot_s * CLOSE)
                    self.bounds = min(self.bounds, r.max_tpot_s)
                else:
                    self.unbounded = True
        self.n = min(s.ready.count(urgent), s.limits.max_seqs)
        self.context = context * self.n // max(found, 1)
        self.seconds = s.seconds((), self.n, self.context)

    def a_pass_later(self, s: Scheduler) -> Decoding:
        """The same requests, none of which has a bound, when each has a token more."""
        later: Decoding = object.__new__(Decoding)
        later.n, later.due, later.bounds, later.unbounded = self.n, NEVER, NEVER, True
        later.context = self.context + self.n
        later.seconds = s.seconds((), self.n, later.context)
        return later


class Pacing:
    """When the next pass of LS has to start, and what BE is owed of the device.

    Args:
        stretch: How many times slower than alone LS may be served, where it has no bounds.
        share: Of the device, BE's at least while LS work is there.
    """

    def __init__(self, stretch: float, share: float):
        self._stretch = stretch
        self._owed_per_s = share / (1 - share)
        self._start = -NEVER  # of the next pass of LS, by `stretch`
        self._fresh = True  # there was no LS before the pass of LS that runs next
        self._ended = -NEVER  # the last one
        self.owed = 0.0  #: seconds of the device that BE has not had yet

    def start_by(self, decoding: Decoding) -> float:
        """When LS has to decode next."""
        alone = decoding.seconds
        if alone is None:
            return -NEVER
        start, most = NEVER, NEVER
        if decoding.unbounded:
            start, most = self._start, self._stretch * alone
        if decoding.bounds < NEVER:
            start, most = min(start, decoding.due - alone), min(most, decoding.bounds)
        start = min(start, self._ended + LONGEST_GAP * most - alone)
        if self.owed < least_slice(alone):
            return start
        return max(start, self._ended + min(self.owed, max(1.0, 2 * self._owed_per_s) * alone))

    def ls_ran(self, now: float, seconds: float, alone: float | None, be_part: float, be_waits: bool) -> None:
        """A pass of LS ended now. It took `seconds`, of which BE had `be_part`; without BE it would take `alone`."""
        alone = seconds if alone is None else min(alone, seconds)
        most = LONGEST_GAP * alone
        base = now - seconds if self._fresh else max(self._start, now - most)
        self._start, self._fresh = min(base + self._stretch * alone, now + most), False
        self._ended = now
        owed = self.owed + seconds * ((1 - be_part) * self._owed_per_s - be_part)
        self.owed = min(max(0.0, owed), 2 * OWED_S) if be_waits else 0.0

    def state(self) -> tuple[float, bool, float, float]:
        """What `ls_ran` changes, for `back`."""
        return self._start, self._fresh, self._ended, self.owed

    def back(self, state: tuple[float, bool, float, float]) -> None:
        """Take back what was told since `state`."""
        self._start, self._fresh, self._ended, self.owed = state

    def ls_left(self) -> None:
        """There is no LS at the moment."""
        self._fresh = True

    def be_ran(self, seconds: float) -> None:
        """BE had the device for so long."""
        self.owed = max(0.0, self.owed - seconds)


def least_slice(alone: float) -> float:
    """Seconds below which BE does not run between two passes of LS, which take `alone` by themselves."""
    return min(max(SLICE * alone, LEAST_SLICE_S), OWED_S)


class LaunchRate:
    """How long requests take, each after the other, until they are launched."""

    def __init__(self) -> None:
        self._last = -NEVER
        self._seconds = 0.0  # for which one was the first to wait
        self._known = 0

    def launched(self, r: Request) -> None:
        """`r` was launched for the first time."""
        first_for = r.first_launch - max(self._last, r.arrival)
        self._last = max(self._last, r.first_launch)
        self._known += 1
        self._seconds += max(RECENT, 1 / self._known) * (max(first_for, 0.0) - self._seconds)

    def wait(self, ahead: int) -> float:
        """Seconds until so many are launched, as it goes now; 0 where nobody was launched yet."""
        return ahead * self._seconds
