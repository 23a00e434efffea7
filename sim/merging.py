"""Merging: the running pass takes along tokens of suspended passes that wait at the same experts.

`PassCostModel.mergeable` is the rule. Which passes are suspended does not change while a pass runs. So the fast device
plans a stretch when it begins, and empties the queues when it ends (`Merging`). The step-by-step device does the same
group by group (`merged_group_seconds`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qllm.scheduler import Scheduler
from qllm.sim.passes import SimulatedPass


def suspended_runs(scheduler: Scheduler) -> list[SimulatedPass]:
    """What the device keeps of the passes that stand suspended."""
    return [p.cursor for p in scheduler.suspended_passes]


class Merging:
    """For the fast device: call `begin` when a pass starts or goes on, and `end` when it stops or ends."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._partners: dict[int, list[SimulatedPass]] = {}  # by layer, who stands before or between its experts

    def begin(self, run: SimulatedPass) -> None:
        """Plan the times of `run`: with the tokens it will merge, without those that others have merged."""
        partners = self._partners = {}
        for q in suspended_runs(self._scheduler):
            layer, stage, _ = q.place()
            if stage == "experts":
                partners.setdefault(layer, []).append(q)
        steps = run.steps
        for layer in {*partners, *run.changed()}:
            counts = steps.merged(run.tokens(layer), [q.expert_queues() for q in partners.get(layer, ())])
            run.retime(layer, steps.group_seconds(run.cost, counts))

    def end(self, run: SimulatedPass, first: int, last: int | None) -> None:
        """`run` did the steps from `first` to before `last` (None: to its end): what it merged waits no more."""
        for layer, partners in self._partners.items():
            start, size = run.first_group(layer), run.cost.experts_per_group
            own = run.tokens(layer).copy()
            own[: max(0, first - start) * size] = 0
            if last is not None:
                own[max(0, last - start) * size :] = 0
            for q in partners:
                merged = run.steps.mergeable(own, q.expert_queues())
                if merged.any():
                    q.mark_merged(merged)


def merged_group_seconds(run: SimulatedPass, suspended: Iterable[SimulatedPass]) -> float:
    """Seconds of the group of experts that comes next in `run`; what it merges leaves the queues of `suspended`."""
    layer, _, group = run.place()
    cost, steps = run.cost, run.steps
    experts = range(group * cost.experts_per_group, min((group + 1) * cost.experts_per_group, steps.n_experts))
    own = run.tokens(layer)
    partners = [q for q in suspended if q.place()[:2] == (layer, "experts")]
    seconds = 0.0
    for e in experts:
        rows = int(own[e])
        for q in partners:
            waiting = int(q.expert_queues()[e])
            if own[e] > 0 and 0 < waiting <= steps.merge_rows:
                rows += waiting
                q.mark_merged(np.arange(steps.n_experts) == e)
        seconds += float(steps.experts(np.array(rows)))
    if group == 0:
        return seconds + cost.experts_base_s
    return seconds + cost.group_launch_s if any(own[e] for e in experts) else seconds
