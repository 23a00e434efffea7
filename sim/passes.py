"""A pass on the simulated GPU: how long it takes, where it can stop, and what is left of it when it does."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from qllm.scheduler import Pass
from qllm.scheduler.policy import GoesOn
from qllm.sim.routing import RecordedRouting, ResampledRouting, Routing
from qllm.traces.step_times.cost_model import PassCost, PassCostModel

_VARIANTS = 32  # routing draws kept per size of a decode pass
_KEPT = 1 << 17  # seconds of experts, 20 MB


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
        "_draw",
        "_gpu",
        "_layers",
        "_left",
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
        self._layers: tuple[list[float], np.ndarray] | None = None
        self._left: tuple[int, np.ndarray] | None = None  # a layer, and tokens(layer) there
        self._seconds: dict[int, np.ndarray] = {}  # of the groups of experts of layers that differ from the routing

    @property
    def cost(self) -> PassCost:
        """How the pass is split. In a pass that only decodes it is computed when first asked for."""
        if self._cost is None:
            _, n, context, after_prefill = self._size
            self._cost = self.steps.cost((), n, context, n, after_prefill=after_prefill)
        return self._cost

    def steps_in_all(self) -> int:
        """How many steps it has."""
        return 2 + self.steps.layers * self.cost.steps_per_layer

    def counts(self) -> np.ndarray:
        """Tokens per expert, int[layers, experts]."""
        return self._gpu.routing.counts(self._size[0], self._draw)

    def end(self, step: int) -> float:
        """Seconds from the pass's start to the end of `step`, any but the head: the sum of all steps up to it."""
        cost = self.cost
        if self._layers is None:
            self._layers = self._timed_layers()
        starts, groups = self._layers
        if step == 0:
            return starts[0]
        layer, inside = divmod(step - 1, cost.steps_per_layer)
        seconds = starts[layer] + cost.pre_s + cost.query_block_s * min(inside, cost.query_blocks)
        group = inside - cost.query_blocks - 2
        if group >= -1:
            seconds += cost.post_s
        return seconds + float(groups[layer, group]) if group >= 0 else seconds

    def _timed_layers(self) -> tuple[list[float], np.ndarray]:
        """When each layer starts, and when its groups of experts end after their start, float64[layers, groups]."""
        cost = self.cost
        seconds = self.steps.group_seconds(cost, self.counts())
        for layer, retimed in self._seconds.items():
            seconds[layer] = retimed
        groups = np.cumsum(seconds, axis=1)
        each = groups[:, -1] + (cost.pre_s + cost.query_block_s * cost.query_blocks + cost.post_s)
        return np.cumsum(np.concatenate(([cost.prologue_s], each))).tolist(), groups

    def next_point(self, elapsed: float) -> int:
        """Steps done at the first preemption point at or after `elapsed` seconds of the pass.

        Where none is left: at its end. Points that lie where the pass last went on do not count.
        """
        steps = self.steps_in_all()
        first = bisect_left(range(steps - 1), elapsed, lo=self.done, key=self.end)
        point = self.steps.next_point(self.cost, self._gpu.granularity, first)
        return steps if point is None else point + 1

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
        self._layers = None


class GpuModel:
    """Passes of one model on one GPU: step times, and the routing that its tokens draw."""

    def __init__(self, steps: PassCostModel, routing: Routing | RecordedRouting | ResampledRouting, granularity: str):
        self.steps = steps
        self.routing = routing
        self.granularity = granularity
        self.ahead = routing.ahead if isinstance(routing, Routing) else None  #: draws to come, where they are known
        self._decodes: dict[int, list[int]] = {}  # by size, the draws that decode passes take turns with
        self._experts_s: dict[tuple[int, int], float] = {}  # by tokens and draw, of those that may come again

    def start(self, p: Pass) -> SimulatedPass:
        """`p` is launched for the first time."""
        steps, draw = self.steps, self.routing.draw()
        if self.routing.pooled and not p.prefill and p.restored is None and p.offloaded is None:
            n, context = p.n_decode, p.decode_context
            draws = self._decodes.get(n)
            if draws is None:
                drawn = [self.routing.draw() for _ in range(_VARIANTS)]
                draws = self._decodes[n] = [self.routing.place(n, each) for each in drawn]
            draw = draws[draw % _VARIANTS]
            experts_s = self._experts_s.get((n, draw))
            if experts_s is None:
                experts_s = self._experts(n, draw, context)
            return SimulatedPass(self, p, draw, steps.decode_total(n, context, p.after_prefill) + experts_s)
        cost = steps.cost(p.prefill, p.n_decode, p.decode_context, p.rows, p.moved_tokens, p.after_prefill)
        key = p.tokens, self.routing.place(p.tokens, draw)
        experts_s = self._experts_s.get(key)
        if experts_s is None:
            experts_s = self._experts_of(key, cost)
        return SimulatedPass(self, p, draw, steps.total(cost, experts_s), cost)

    def repeat(
        self, p: Pass, end: float, times: int, until: float, goes_on: GoesOn | None = None
    ) -> tuple[list[float], int, float]:
        """Passes like decode pass `p`, one after the other, the last of which begins before `until`.

        Args:
            p: The first; it ends at `end`, before `until`.
            end: Seconds.
            times: How many follow it at most, at least 1.
            until: Seconds.
            goes_on: Whether another follows one, from when that begins and ends; default: as long as it may.

        Returns:
            When those ended that another followed, and of the last: its draw of the routing, and its seconds.
        """
        assert self.ahead is not None  # else nobody asks
        n, context, draws = p.n_decode, p.decode_context, self.ahead()
        variants, known, seconds = self._decodes[n], self._experts_s, self.steps.decode_seconds(n, context)
        times = min(times, len(draws))
        done, begins, draw, total = 0, p.launched, 0, 0.0
        ends: list[float] = []
        while done < times and end < until and (goes_on is None or goes_on(begins, end)):
            done += 1
            begins = end
            ends.append(end)
            context += n
            draw = variants[draws[-done] % _VARIANTS]
            experts_s = known.get((n, draw))
            if experts_s is None:
                experts_s = self._experts(n, draw, context)
            total = seconds(context) + experts_s
            end = begins + total
        del draws[len(draws) - done :]
        return ends, draw, total

    def _experts(self, n: int, draw: int, context: int) -> float:
        """Seconds of all experts of a decode pass of `n` sequences, kept for the next one."""
        return self._experts_of((n, draw), self.steps.cost((), n, context, n))  # cut like those of any n tokens

    def _experts_of(self, key: tuple[int, int], cost: PassCost) -> float:
        """Seconds of all experts of a pass of so many tokens with that draw, kept for the next one."""
        if len(self._experts_s) > _KEPT:
            self._experts_s.clear()
        experts_s = self._experts_s[key] = self.steps.experts_of_pass(cost, self.routing.counts(*key))
        return experts_s
