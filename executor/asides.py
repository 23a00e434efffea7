"""What else the engine's thread does, while the engine's clock stands still."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from executor.clock import RealClock
from executor.engine import Engine
from traces.steps import StepModel

_END = object()


class PausingClock(RealClock):
    """Real time, but for what is done aside."""

    def __init__(self, steps: StepModel | None = None):
        super().__init__(steps)
        self.paused = 0.0  #: seconds until now

    def now(self) -> float:
        return super().now() - self.paused

    def aside(self, doings: Iterator[object]) -> bool:
        """Take a step of `doings` while the clock stands still; whether there was one."""
        start = time.monotonic()
        try:
            return next(doings, _END) is not _END
        finally:
            self.paused += time.monotonic() - start


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
