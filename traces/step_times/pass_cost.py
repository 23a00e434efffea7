"""What one pass takes in whole ticks of 2^-30 s (0.93 ns), whose sums are exact in float64 up to 97 days."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import overload

import numpy as np

TICKS_PER_S = 1 << 30
TICK = 1.0 / TICKS_PER_S


@overload
def ticks(seconds: np.ndarray) -> np.ndarray: ...
@overload
def ticks(seconds: float) -> float: ...
def ticks(seconds: float | np.ndarray) -> float | np.ndarray:
    """`seconds` (float or array) rounded to the nearest multiple of TICK."""
    if isinstance(seconds, np.ndarray):
        rounded: np.ndarray = np.rint(seconds * TICKS_PER_S) * TICK
        return rounded
    return round(seconds * TICKS_PER_S) * TICK


@dataclass(slots=True)
class PassCost:
    """What a pass takes without its experts, in seconds (whole ticks), and the steps of a layer.

    Attributes:
        prologue_s: Before the first layer: the host's time, and KV that is moved. Also `PassCostModel.wake_s` where the
            device stood idle before the pass, and what a decode pass takes longer right after prompts.
        pre_s: Norm and QKV projection of a layer.
        query_block_s: One query block: a part of the rows whose attention is computed together.
        query_blocks: Query blocks in a layer.
        post_s: Output projection, norm and router of a layer.
        experts_base_s: What the experts of a layer share, in front of the first group.
        group_launch_s: What each further group of experts adds if it has tokens.
        head_s: After the last layer.
        experts_per_group: Consecutive experts that are computed together.
        n_groups: Groups of experts in a layer.
    """

    prologue_s: float
    pre_s: float
    query_block_s: float
    query_blocks: int
    post_s: float
    experts_base_s: float
    group_launch_s: float
    head_s: float
    experts_per_group: int
    n_groups: int

    @property
    def steps_per_layer(self) -> int:
        """Steps of a layer: pre, query blocks, post, groups."""
        return 2 + self.query_blocks + self.n_groups

    def step_s(self, stage: str) -> float:
        """Seconds of a step of `stage`, any but "experts"."""
        return _STAGE_SECONDS[stage](self)


_STAGE_SECONDS: dict[str, Callable[[PassCost], float]] = {
    "prologue": attrgetter("prologue_s"),
    "pre": attrgetter("pre_s"),
    "attention": attrgetter("query_block_s"),
    "post": attrgetter("post_s"),
    "head": attrgetter("head_s"),
}
