"""How a pass is split into steps.

A split is a function of the pass alone, never of the clock or of who waits: the same pass is always split in the same
way, and gives the same bits. `qllm.traces.step_times.cost_model.PassCostModel` splits passes in the same terms (its
`PassCost.experts_per_group` and `PassCost.query_blocks`), so the engine and the simulator can stop at the same points.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from qllm.executor.model.packed_batch import Batch


class Split(NamedTuple):
    """What one pass is split into.

    Attributes:
        experts_per_group: consecutive experts in a group, with a preemption point before each group.
        query_blocks: groups of query blocks in an attention, at most.
        merge_rows: most rows waiting at an expert that another pass may merge into its own while this one is
            suspended; 0: none.
    """

    experts_per_group: int = 1
    query_blocks: int = 1
    merge_rows: int = 0


Splitter = Callable[[Batch], Split]


@dataclass(frozen=True)
class LinearSplitter:
    """Splits passes by linear step times, so that no step that can be split exceeds `max_step`.

    The rows of an expert are estimated at three standard deviations above an even share: routing is not known when a
    pass is split. As many rows of a suspended pass may be merged into another's as cost no more than reading an
    expert's weights.

    Where a group of experts is one launch (`launch` is given), it takes as long as reading its weights or as the
    arithmetic of its rows, whichever is longer.

    Attributes:
        n_experts: of each MoE layer.
        top_k: experts that each token goes to.
        max_step: longest step, in seconds.
        expert: seconds of an expert, however few its rows.
        row: seconds of each of its rows.
        cell: seconds of attention for each query row and key.
        launch: seconds of a group of experts beside those of its rows; None where each expert is launched for itself.
    """

    n_experts: int
    top_k: int
    max_step: float = 0.01
    expert: float = 1e-4
    row: float = 1e-5
    cell: float = 2e-8
    launch: float | None = None

    def __call__(self, batch: Batch) -> Split:
        experts = self._one_by_one(batch.rows) if self.launch is None else self._together(batch.rows)
        blocks = max(1, math.ceil(batch.prefill_cells * self.cell / self.max_step))
        return Split(experts, blocks, int(min(self.expert / self.row, 1 << 30)) if self.row else 1 << 30)

    def _one_by_one(self, rows: int) -> int:
        mean = rows * self.top_k / self.n_experts
        each = self.expert + self.row * min(rows, mean + 3 * math.sqrt(mean))
        return min(max(int(self.max_step / each), 1), self.n_experts)

    def _together(self, rows: int) -> int:
        fit = bisect_right(range(1, self.n_experts + 1), self.max_step, key=lambda n: self.group_seconds(n, rows))
        groups = math.ceil(self.n_experts / max(fit, 1))
        return math.ceil(self.n_experts / groups)  # groups of one size, as far as can be

    def group_seconds(self, experts: int, rows: int) -> float:
        """Seconds of a launch of so many experts, in a pass of so many rows."""
        # Few rows of one expert make up for many of another, and all experts together have all rows.
        mean = rows * self.top_k * experts / self.n_experts
        most = min(rows * self.top_k, mean + 3 * math.sqrt(mean))
        return max(self.expert * experts, (self.launch or 0.0) + self.row * most)


def whole(batch: Batch) -> Split:
    """A point before each attention and before the experts of each layer only."""
    return Split(1 << 30, 1)
