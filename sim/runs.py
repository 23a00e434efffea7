"""A pass on the simulated GPU: how long it takes, where it can stop, and what is left of it when it does."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from scheduler import Pass
from traces.steps import Shape, StepModel

from .routing import Recorded, Routing

_VARIANTS = 32  # routing draws kept per size of a decode pass


class Run:
    """One pass under way. `total`: seconds on the device from its start to its end; `at`: seconds of it done where it
    stands suspended; both whole ticks. `done`: pieces of `StepModel.times` that are done."""

    __slots__ = ("_cum", "_draw", "_gpu", "_points", "_shape", "_size", "at", "done", "total")

    def __init__(self, gpu: GpuModel, p: Pass, draw: int, total: float, shape: Shape | None = None):
        self._gpu = gpu
        self._size = (p.tokens, p.n_decode, p.decode_context)
        self._draw = draw
        self._shape = shape
        self.total = total
        self.at = 0.0
        self.done = 0
        self._cum: list[float] | None = None
        self._points: list[int] = []

    @property
    def shape(self) -> Shape:
        """How the pass is cut; worked out when first asked for in passes that only decode."""
        if self._shape is None:
            _, n, context = self._size
            self._shape = self._gpu.steps.shape((), n, context, n)
        return self._shape

    def counts(self) -> np.ndarray:
        """Tokens per expert, int[layers, experts]."""
        return self._gpu.routing.counts(self._size[0], self._draw)

    def ends(self) -> list[float]:
        """Seconds from the pass's start to the end of each piece."""
        if self._cum is None:
            steps = self._gpu.steps
            self._cum = np.cumsum(steps.times(self.shape, self.counts())).tolist()
            self._points = steps.points(self.shape, self._gpu.granularity).tolist()
        return self._cum

    def points(self) -> list[int]:
        """Pieces after which it may stop."""
        self.ends()
        return self._points

    def next_point(self, elapsed: float) -> int:
        """Pieces done at the first preemption point at or after `elapsed` seconds of the pass, or, where none is
        left, at its end. Points that lie where the pass last went on do not count."""
        ends, points = self.ends(), self._points
        i = bisect_left(points, elapsed, key=ends.__getitem__)
        while i < len(points) and points[i] < self.done:
            i += 1
        return points[i] + 1 if i < len(points) else len(ends)

    def place(self) -> tuple[int, str, int]:
        """(layer, stage, index) of the piece that comes next."""
        return self._gpu.steps.where(self.shape, self.done)

    def expert_queues(self) -> np.ndarray:
        """Tokens that wait at each expert of the layer where the pass stands, int[experts]: all zero unless it stands
        before or between its experts."""
        layer, stage, group = self.place()
        if stage != "experts":
            return np.zeros(self._gpu.steps.n_experts, dtype=np.int64)
        queues = self.counts()[layer].copy()
        queues[: group * self.shape.group] = 0
        return queues


class GpuModel:
    """Passes of one model on one GPU: step times, and the routing that its tokens draw."""

    def __init__(self, steps: StepModel, routing: Routing | Recorded, granularity: str):
        self.steps = steps
        self.routing = routing
        self.granularity = granularity
        self._decodes: dict[int, list[tuple[int, float]]] = {}

    def start(self, p: Pass) -> Run:
        """`p` is launched for the first time."""
        steps, draw = self.steps, self.routing.draw()
        if self.routing.pooled and not p.prefill and p.restored is None and p.offloaded is None:
            n = p.n_decode
            variants = self._decodes.get(n)
            if variants is None:
                variants = self._decodes[n] = self._variants(n)
            draw, experts_s = variants[draw % _VARIANTS]
            return Run(self, p, draw, steps.decode_total(n, p.decode_context) + experts_s)
        rows = p.n_decode
        for r, new, cached in p.prefill:
            rows += cached + new == r.prompt_tokens + r.generated
        moved = sum(r.computed for r in (*(p.restored or ()), *(p.offloaded or ())))
        shape = steps.shape(p.prefill, p.n_decode, p.decode_context, rows, moved)
        experts_s = float(steps.experts(self.routing.counts(p.tokens, draw)).sum())
        return Run(self, p, draw, steps.total(shape, experts_s), shape)

    def _variants(self, tokens: int) -> list[tuple[int, float]]:
        """Routing draws for decode passes of `tokens` tokens, each with the seconds of all its experts."""
        draws = [self.routing.draw() for _ in range(_VARIANTS)]
        return [(d, float(self.steps.experts(self.routing.counts(tokens, d)).sum())) for d in draws]
