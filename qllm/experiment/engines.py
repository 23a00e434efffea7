"""The engines of several runs. On a GPU one serves many: to record its passes takes it longer than some runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from qllm.executor.engine.clock import Clock, predictor
from qllm.executor.engine.engine import Engine
from qllm.executor.engine.loop import Loop
from qllm.executor.graphs.runner import Graphs, Progress
from qllm.executor.model.loading import LoadedModel
from qllm.scheduler import Limits, Policy, Scheduler


class Engines:
    """Makes an engine for each run, or has one go on with another policy. Close it, or use it as a context manager.

    Args:
        loaded: the model that they serve.
        kept: whether an engine is kept for the next run; by default on an accelerator.
        graphs: see Engine.
        progress: see Engine.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        kept: bool | None = None,
        graphs: Graphs = "load",
        progress: Progress | None = None,
    ):
        self._model = loaded.model
        self._keeps = loaded.model.device.type != "cpu" if kept is None else kept
        self._graphs: Graphs = graphs
        self._progress = progress
        self._kept: tuple[Engine, Limits, bool, float] | None = None  #: with what it cannot change

    @contextmanager
    def engine(
        self, policy: Policy, limits: Limits, clock: Clock, *, seed: int | None = None, max_step: float = 0.01
    ) -> Iterator[Engine]:
        """An idle engine. It is closed where the block raises, and unless it is kept, at its end."""
        try:
            yield self._idle(policy, limits, clock, seed, max_step)
        except BaseException:
            self.close()
            raise
        if not self._keeps:
            self.close()

    def _idle(self, policy: Policy, limits: Limits, clock: Clock, seed: int | None, max_step: float) -> Engine:
        if self._kept is not None and self._kept[1:] == (limits, policy.merge, max_step):
            engine = self._kept[0]
            scheduler = Scheduler(policy, engine.limits, predictor(clock))

            def go_on(loop: Loop) -> None:
                loop.serve_by(scheduler, clock)

            engine.call(go_on)
            engine.scheduler, engine.clock = scheduler, clock
            return engine
        self.close()  # before another takes memory
        engine = Engine(
            self._model,
            policy=policy,
            limits=limits,
            clock=clock,
            max_step=max_step,
            seed=seed,
            graphs=self._graphs,
            progress=self._progress,
        )
        self._kept = engine, limits, policy.merge, max_step
        return engine

    def close(self) -> None:
        """Close the engine that is there."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept[0].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
