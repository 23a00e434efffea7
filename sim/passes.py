"""A pass on the simulated GPU: how long it takes, where it can stop, and what is left of it when it does."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from qllm.scheduler import Pass
from qllm.sim.routing import RecordedRouting, ResampledRouting, Routing
from qllm.traces.step_times.cost_model import PassCost, PassCostModel

_VARIANTS = 32  # routing draws kept per size of a decode pass


class SimulatedPass:
    """One pass under way.

    Attributes:
        steps: How long its steps take.
        total: Seconds on the device from its start to its end, in whole ticks. Where passes merge at experts
            (sim/merging.py), it is what is planned for the stretch that begins.
        at: Seconds of it that are done where it stands suspended, in whole ticks.
        done: Steps of `PassCostModel.times` that are done.
    """

    __slots__ = (
        "_cost",
        "_cum",
        "_draw",
        "_gpu",
        "_left",
        "_points",
        "_seconds",
        "_size",
        "at",
        "done",
        "steps",
        "total",
    )

    def __init__(self, gpu: GpuModel, p: Pass, draw: int, total: float, cost: PassCost | None = None):
        self._gpu = gpu
        self.steps = gpu.steps
        self._size = (p.tokens, p.n_decode, p.decode_context, p.after_prefill)
        self._draw = draw
        self._cost = cost
        self.total = total
        self.at = 0.0
        self.done = 0
        self._cum: list[float] | None = None
        self._points: list[int] = []
        self._left: tuple[int, np.ndarray] | None = None  # a layer, and tokens(layer) there
        self._seconds: dict[int, np.ndarray] = {}  # of the groups of experts of layers that differ from the routing

    @property
    def cost(self) -> PassCost:
        """How the pass is split. In a pass that only decodes it is computed when first asked for."""
        if self._cost is None:
            _, n, context, after_prefill = self._size
            self._cost = self.steps.cost((), n, context, n, after_prefill=after_prefill)
        return self._cost

    def counts(self) -> np.ndarray:
        """Tokens per expert, int[layers, experts]."""
        return self._gpu.routing.counts(self._size[0], self._draw)

    def ends(self) -> list[float]:
        """Seconds from the pass's start to the end of each step."""
        if self._cum is None:
            steps = self.steps
            times = steps.times(self.cost, self.counts())
            for layer, seconds in self._seconds.items():
                first = self.first_group(layer)
                times[first : first + len(seconds)] = seconds
            self._cum = np.cumsum(times).tolist()
            self._points = steps.points(self.cost, self._gpu.granularity).tolist()
        return self._cum

    def points(self) -> list[int]:
        """Steps after which it may stop."""
        self.ends()
        return self._points

    def next_point(self, elapsed: float) -> int:
        """Steps done at the first preemption point at or after `elapsed` seconds of the pass.

        Where none is left: at its end. Points that lie where the pass last went on do not count.
        """
        ends, points = self.ends(), self._points
        i = bisect_left(points, elapsed, key=ends.__getitem__)
        while i < len(points) and points[i] < self.done:
            i += 1
        return points[i] + 1 if i < len(points) else len(ends)

    def place(self) -> tuple[int, str, int]:
        """(layer, stage, index) of the step that comes next."""
        return self.steps.position(self.cost, self.done)

    def expert_queues(self) -> np.ndarray:
        """Tokens that wait at each expert of the layer where the pass stands, int[experts].

        All zero unless it stands before or between the experts.
        """
        layer, stage, group = self.place()
        if stage != "experts":
            return np.zeros(self.steps.n_experts, dtype=np.int64)
        queues = self.tokens(layer).copy()
        queues[: group * self.cost.experts_per_group] = 0
        return queues

    def wake(self) -> None:
        """The device stood idle before the pass, which has not begun."""
        self.cost.prologue_s += self.steps.wake_s
        self.total += self.steps.wake_s

    # ---- merging -----------------------------------------------------------------------------------------------

    def first_group(self, layer: int) -> int:
        """The step that is the first group of experts of `layer`."""
        return 3 + layer * self.cost.steps_per_layer + self.cost.query_blocks

    def tokens(self, layer: int) -> np.ndarray:
        """Tokens per expert of `layer`, int[experts], without those that another pass has merged."""
        if self._left is not None and self._left[0] == layer:
            return self._left[1]
        counts: np.ndarray = self.counts()[layer]
        return counts

    def mark_merged(self, experts: np.ndarray) -> None:
        """Another pass merged what waited at `experts`, bool[experts], of the layer where this one stands."""
        layer = self.place()[0]
        left = self.tokens(layer).copy()
        left[experts] = 0
        self._left = layer, left

    def changed(self) -> set[int]:
        """Layers whose experts may take another time than their routing says."""
        return {*self._seconds, *(() if self._left is None else self._left[:1])}

    def retime(self, layer: int, seconds: np.ndarray) -> None:
        """Those groups of experts of `layer` that are still to run take `seconds`, float64[groups]."""
        old = self._seconds.get(layer)
        if old is None:
            old = self.steps.group_seconds(self.cost, self.counts()[layer])
        new = old.copy()
        first = max(0, self.done - self.first_group(layer))
        new[first:] = seconds[first:]
        self._seconds[layer] = new
        self.total += float((new - old).sum())
        self._cum = None


class GpuModel:
    """Passes of one model on one GPU: step times, and the routing that its tokens draw."""

    def __init__(self, steps: PassCostModel, routing: Routing | RecordedRouting | ResampledRouting, granularity: str):
        self.steps = steps
        self.routing = routing
        self.granularity = granularity
        self._decodes: dict[int, list[tuple[int, float]]] = {}

    def start(self, p: Pass) -> SimulatedPass:
        """`p` is launched for the first time."""
        steps, draw = self.steps, self.routing.draw()
        if self.routing.pooled and not p.prefill and p.restored is None and p.offloaded is None:
            n = p.n_decode
            variants = self._decodes.get(n)
            if variants is None:
                cost = steps.cost((), n, p.decode_context, n)  # the experts' cut is that of any pass of n tokens
                variants = self._decodes[n] = self._variants(n, cost)
            draw, experts_s = variants[draw % _VARIANTS]
            return SimulatedPass(self, p, draw, steps.decode_total(n, p.decode_context, p.after_prefill) + experts_s)
        cost = steps.cost(p.prefill, p.n_decode, p.decode_context, p.rows, p.moved_tokens, p.after_prefill)
        experts_s = steps.experts_of_pass(cost, self.routing.counts(p.tokens, draw))
        return SimulatedPass(self, p, draw, steps.total(cost, experts_s), cost)

    def _variants(self, tokens: int, cost: PassCost) -> list[tuple[int, float]]:
        """Routing draws for decode passes of `tokens` tokens, each with the seconds of all its experts."""
        draws = [self.routing.draw() for _ in range(_VARIANTS)]
        return [(d, self.steps.experts_of_pass(cost, self.routing.counts(tokens, d))) for d in draws]
