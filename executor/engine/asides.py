"""What else the engine's thread does, while the engine's clock stands still."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from qllm.executor.engine.clock import RealClock
from qllm.executor.engine.engine import Engine
from qllm.traces.step_times.cost_model import PassCostModel

_END = object()


class PausingClock(RealClock):
    """Real time, but for what is done aside."""

    def __init__(self, steps: PassCostModel | None = None, *, polls: bool = False):
        super().__init__(steps, polls=polls)
        self.paused = 0.0  #: seconds until now
        self._stands: float | None = None  # at that time

    def now(self) -> float:
        stands = self._stands
        return super().now() - self.paused if stands is None else stands

    def aside(self, doings: Iterator[object]) -> bool:
        """Take a step of `doings` while the clock stands still; whether there was one."""
        self._stands = stands = self.now()
        try:
            return next(doings, _END) is not _END
        finally:
            self.paused = super().now() - stands
            self._stands = None


@contextmanager
def asides(engine: Engine, clock: PausingClock, doings: Iterator[object], every: float) -> Iterator[None]:
    """While this is open, the thread of `engine`, whose clock is `clock`, takes a step of `doings` every so many
    seconds, at its next preemption point. Raises at the end what a step raised, after which none was taken, or
    EngineClosed."""
    over = Event()

    def go_on() -> None:
        while not over.wait(every) and engine.call(lambda _: clock.aside(doings)):
            pass

    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(go_on)
        try:
            yield
        finally:
            over.set()
        going.result()
