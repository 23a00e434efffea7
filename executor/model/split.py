"""How a pass is split into steps.

A split is a function of the pass alone, never of the clock or of who waits: the same pass is always split in the same
way, and gives the same bits. `qllm.traces.step_times.cost_model.PassCostModel` splits passes in the same terms (its
`PassCost.experts_per_group` and `PassCost.query_blocks`), so the engine and the simulator can stop at the same points.
"""

from __future__ import annotations

import math
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

    Attributes:
        n_experts: of each MoE layer.
        top_k: experts that each token goes to.
        max_step: longest step, in seconds.
        expert: seconds of an expert, however few its rows.
        row: seconds of each of its rows.
        cell: seconds of attention for each query row and key.
    """

    n_experts: int
    top_k: int
    max_step: float = 0.01
    expert: float = 1e-4
    row: float = 1e-5
    cell: float = 2e-8

    def __call__(self, batch: Batch) -> Split:
        mean = batch.rows * self.top_k / self.n_experts
        each = self.expert + self.row * min(batch.rows, mean + 3 * math.sqrt(mean))
        experts = min(max(int(self.max_step / each), 1), self.n_experts)
        blocks = max(1, math.ceil(batch.prefill_cells * self.cell / self.max_step))
        return Split(experts, blocks, int(self.expert / self.row) if self.row else 1 << 30)


def whole(batch: Batch) -> Split:
    """A point before each attention and before the experts of each layer only."""
    return Split(1 << 30, 1)
