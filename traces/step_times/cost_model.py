"""The steps of a pass: where it can be cut, and how long each step takes by a timing trace.

The simulator and the engine's virtual clock both take their times from here, so they cannot drift apart.

A layer is the sequence ``pre | query block 1 | ... | query block P, post | group 1 | ... | group G``: preemption points
(``|``) lie before the attention, between query blocks of a long attention, before the experts and between groups of
experts. What lies between two points is a *step* and cannot be interrupted. P and G follow from the timings so that
no step exceeds `max_step`, and from nothing else: the cuts are the same whether or not anyone waits.

Times are multiples of 2^-30 s (0.93 ns). Sums of such numbers are exact in float64 up to 97 days, so a pass takes the
same time to the last bit whether its steps are added up one by one or all at once.

Merging (`mergeable`, `merged`): the pass that runs takes along tokens of suspended passes that wait at its experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from qllm.traces.step_times.timings import Timings

TICKS_PER_S = 1 << 30
TICK = 1.0 / TICKS_PER_S


def ticks(seconds: Any) -> Any:
    """`seconds` (float or array) rounded to the nearest multiple of TICK."""
    if isinstance(seconds, np.ndarray):
        return np.rint(seconds * TICKS_PER_S) * TICK
    return round(seconds * TICKS_PER_S) * TICK


@dataclass(slots=True)
class PassCost:
    """What a pass takes but for its experts, in seconds (whole ticks), and how each layer is split.

    Attributes:
        prologue_s: Before the first layer. It holds `PassCostModel.wake_s` too where the device stood idle before the
            pass, and `after_prefill` where a decode pass follows prompts.
        pre_s: Norm and QKV.
        query_block_s: Attention, each of `query_blocks` blocks.
        query_blocks: Blocks of query rows that a layer's attention is split into.
        post_s: Output projection, norm, router.
        experts_base_s: Shared cost of a layer's experts, in front of the first group.
        group_launch_s: Extra of each further group of experts that has tokens.
        head_s: After the last layer.
        experts_per_group: Consecutive experts in a group.
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
        """Steps that a layer has in `PassCostModel.times`: pre, query blocks, post, groups."""
        return 2 + self.query_blocks + self.n_groups

    def step_s(self, stage: str) -> float:
        """Seconds of a step of `stage`, which is not "experts"."""
        return _STAGE_SECONDS[stage](self)


_STAGE_SECONDS: dict[str, Callable[[PassCost], float]] = {
    "prologue": attrgetter("prologue_s"),
    "pre": attrgetter("pre_s"),
    "attention": attrgetter("query_block_s"),
    "post": attrgetter("post_s"),
    "head": attrgetter("head_s"),
}


class PassCostModel:
    """Step times of passes for one model on one GPU.

    max_step: seconds that a step should not exceed where it can be cut.
    expert_mode: "fused" (a layer's experts share `experts_base_s`, groups are launches of the fused kernel) or
    "separate" (each expert is launched for itself); default: what the timing trace describes. A trace of separate
    launches cannot be used as fused. popularity: float[layers, experts], share of tokens routed to each expert, used
    for the size of groups; uniform by default. Raises ValueError.

    `merge_rows`: most tokens of a suspended pass that are merged at an expert, the largest m with f(m) <= 2 f(1) in
    the measured range. One token costs the reading of the expert's weights, which merging saves; up to so many, a
    launch gets about one such reading longer at most. More would make the running pass wait for others' compute.
    """

    def __init__(
        self,
        timings: Timings,
        *,
        max_step: float = math.inf,
        expert_mode: str | None = None,
        popularity: np.ndarray | None = None,
    ):
        mode = expert_mode or timings.expert_mode
        if mode not in ("fused", "separate"):
            raise ValueError(f"expert_mode is {mode!r}, must be fused or separate")
        if mode == "fused" and timings.expert_mode == "separate":
            raise ValueError(
                f"expert_mode is fused, but {timings.name} holds times of separate launches; only separate is possible"
            )
        if not max_step > 0:
            raise ValueError(f"max_step is {max_step} s, must be above 0")
        self.timings = timings
        self.mode = mode
        self.max_step = max_step
        self.layers = timings.layers
        self.n_experts = timings.experts
        launches = timings.launches_per_expert * timings.launch_s
        self._own_launch = launches if mode == "separate" and timings.expert_mode == "fused" else 0.0
        self._table = self._expert_table(timings.range("expert")[1])
        self.merge_rows = int(np.searchsorted(self._table, 2 * self._table[1], side="right")) - 1
        self._base = ticks(timings.experts_base_s)
        self._block = ticks(timings.launch_s if timings.query_block_s is None else timings.query_block_s)
        self.suspend_s: float = ticks(timings.suspend_s)
        self.resume_s: float = ticks(timings.resume_s)
        self.wake_s: float = ticks(timings.wake_s)
        peak = 1.0 / timings.experts if popularity is None else float(popularity.max())
        self._peak_share = min(1.0, peak * timings.top_k)  # of a pass's tokens, at the most popular expert
        self._cuts: dict[int, tuple[float, int, int]] = {}
        self._dense: dict[int, tuple[float, float]] = {}
        self._heads: dict[int, float] = {}
        self._decode_fixed: dict[tuple[int, bool], float] = {}

    def _expert_table(self, limit: int) -> np.ndarray:
        table = self.timings.expert_table(limit) + self._own_launch
        table[0] = 0.0
        return ticks(table)

    def experts(self, counts: np.ndarray) -> np.ndarray:
        """Seconds of each expert (whole ticks) for int[...] tokens each; an expert without tokens takes none."""
        try:
            return self._table.take(counts)
        except IndexError:  # beyond the measured range: the trace extrapolates, and says so
            self._table = self._expert_table(int(counts.max()))
            return self._table.take(counts)

    def experts_of_pass(self, cost: PassCost, routing: Any) -> float:
        """Seconds of all experts of a pass and of its further groups, for the tokens that each expert got in each MoE
        layer, int[MoE layers, experts]. A trace takes all layers to be alike: where some have no experts, each counts
        for its share."""
        counts = np.asarray(routing)
        seconds = float(self.experts(counts).sum())
        if cost.n_groups > 1 and cost.group_launch_s:
            seconds += cost.group_launch_s * int(np.count_nonzero(self.by_group(cost, counts)[..., 1:]))
        return seconds * (self.layers / len(counts))

    def cost(
        self,
        prefill: Sequence[tuple[Any, int, int]],
        n_decode: int,
        decode_context: int,
        rows: int,
        moved_tokens: int = 0,
        after_prefill: bool = False,
    ) -> PassCost:
        """Times of a pass over prefill chunks (anything, new tokens, tokens cached before) and `n_decode` decoding
        sequences that hold `decode_context` tokens in all, of which `rows` sequences get a new token.
        `moved_tokens`: tokens whose KV is moved to or from host memory first. `after_prefill`: the pass before it had
        prompts, which counts where this one has none.

        The chunks' attention runs as one launch whose work adds up: the cost of the smallest is counted once.
        """
        t = self.timings
        attention = t.attention_decode(n_decode, decode_context / n_decode) if n_decode else 0.0
        tokens = n_decode
        if prefill:
            floor = t.attention_prefill(1, 0)
            attention += floor
            for _, new, cached in prefill:
                tokens += new
                attention += max(t.attention_prefill(new, cached) - floor, 0.0)
        dense = self._dense.get(tokens)
        if dense is None:
            dense = self._dense[tokens] = (ticks(t.dense_pre(tokens)), ticks(t.dense_post(tokens)))
        head = self._heads.get(rows)
        if head is None:
            head = self._heads[rows] = ticks(t.head(rows))
        cuts = self._cuts.get(tokens)
        if cuts is None:
            cuts = self._cuts[tokens] = self._experts_cut(tokens)
        block, query_blocks = self._query_blocks(attention)
        prologue = t.host_s
        if moved_tokens:
            prologue += moved_tokens * t.kv_bytes_per_token / t.host_bandwidth
        if after_prefill and not prefill:
            prologue += t.after_prefill(n_decode)
        group_launch_s, group, groups = cuts
        return PassCost(
            ticks(prologue), dense[0], block, query_blocks, dense[1], self._base, group_launch_s, head, group, groups
        )

    def decode_total(self, n_decode: int, decode_context: int, after_prefill: bool = False) -> float:
        """`total` of a pass that only decodes, without its experts' times: the fast path of the simulator."""
        fixed = self._decode_fixed.get((n_decode, after_prefill))
        if fixed is None:
            cost = self.cost((), n_decode, decode_context, n_decode, after_prefill=after_prefill)
            attention = self.layers * cost.query_block_s * cost.query_blocks
            fixed = self._decode_fixed[n_decode, after_prefill] = self.total(cost, 0.0) - attention
        block, query_blocks = self._query_blocks(self.timings.attention_decode(n_decode, decode_context / n_decode))
        return fixed + self.layers * block * query_blocks

    def _query_blocks(self, attention: float) -> tuple[float, int]:
        """(seconds of each, number) of the blocks that an attention of so many seconds is cut into."""
        if attention <= self.max_step:
            return round(attention * TICKS_PER_S) * TICK, 1
        query_blocks = math.ceil(attention / self.max_step)
        return round((attention / query_blocks + self._block) * TICKS_PER_S) * TICK, query_blocks

    def _experts_cut(self, tokens: int) -> tuple[float, int, int]:
        """(seconds of a further group, experts in a group, groups): as many as keep a group below `max_step` with the
        most popular expert's tokens, three standard deviations up, at each."""
        mean = tokens * self._peak_share
        most = min(tokens, math.ceil(mean + 3 * math.sqrt(mean)))
        t = self.timings
        group_launch_s = ticks(t.launches_per_expert * t.launch(tokens)) if self.mode == "fused" else 0.0
        room = self.max_step - self._base - group_launch_s
        each = max(float(self.experts(np.array(most))), TICK)
        group = int(min(max(room / each, 1), self.n_experts))
        return group_launch_s, group, -(-self.n_experts // group)

    def group_seconds(self, cost: PassCost, counts: np.ndarray) -> np.ndarray:
        """Seconds of each group of experts, float64[..., groups], for tokens per expert int[..., experts]. A group
        without tokens is passed over; of the first, the shared `base` remains."""
        out = self.by_group(cost, self.experts(counts))
        out[..., 0] += cost.experts_base_s
        out[..., 1:] += cost.group_launch_s * (self.by_group(cost, counts)[..., 1:] > 0)
        return out

    def by_group(self, cost: PassCost, each: np.ndarray) -> np.ndarray:
        """Sums of what `each` expert has, [..., experts], over the groups, [..., groups]."""
        if cost.experts_per_group == 1:
            return each
        return np.add.reduceat(each, np.arange(0, self.n_experts, cost.experts_per_group), axis=-1)

    def mergeable(self, own: np.ndarray, waiting: np.ndarray) -> np.ndarray:
        """Where the running pass merges tokens of a suspended one, bool[...].

        Args:
            own: Tokens of the running pass at each expert, int[...]. Where it has none, it merges none.
            waiting: Tokens of the suspended pass at each expert, int[...]. More than `merge_rows` are not merged.
        """
        return (own > 0) & (waiting > 0) & (waiting <= self.merge_rows)

    def merged(self, own: np.ndarray, suspended: Iterable[np.ndarray]) -> np.ndarray:
        """Tokens that go through each expert when the running pass merges those of suspended passes, int[...].

        Args:
            own: Tokens of the running pass at each expert, int[...].
            suspended: For each suspended pass, its tokens that wait at each expert, int[...].
        """
        out = own.copy()
        for waiting in suspended:
            out += np.where(self.mergeable(own, waiting), waiting, 0)
        return out

    def total(self, cost: PassCost, experts_s: float) -> float:
        """Seconds of the whole pass; `experts_s`: its experts' times (`experts_of_pass`)."""
        layer = cost.pre_s + cost.query_block_s * cost.query_blocks + cost.post_s + cost.experts_base_s
        return cost.prologue_s + self.layers * layer + experts_s + cost.head_s

    def times(self, cost: PassCost, counts: np.ndarray) -> np.ndarray:
        """Seconds of each step of the pass in order, float64[2 + layers * steps_per_layer]: prologue, the layers, head.
        `counts`: tokens per expert, int[layers, experts]."""
        steps = np.empty((self.layers, cost.steps_per_layer))
        steps[:, 0] = cost.pre_s
        steps[:, 1 : 1 + cost.query_blocks] = cost.query_block_s
        steps[:, 1 + cost.query_blocks] = cost.post_s
        steps[:, 2 + cost.query_blocks :] = self.group_seconds(cost, counts)
        return np.concatenate(([cost.prologue_s], steps.ravel(), [cost.head_s]))

    def points(self, cost: PassCost, granularity: str) -> np.ndarray:
        """The steps (indices into `times`) after which a pass may stop: all the points of each layer ("expert"),
        only the one before its attention ("layer"), none ("iteration"). int64, increasing."""
        if granularity == "iteration":
            return np.empty(0, dtype=np.int64)
        n = cost.steps_per_layer
        inside = [0]
        if granularity == "expert":
            post = 1 + cost.query_blocks
            inside += [*range(1, cost.query_blocks), post, *range(post + 1, n - 1)]
        starts = 1 + n * np.arange(self.layers)
        return (starts[:, None] + np.array(inside)).ravel()

    def position(self, cost: PassCost, done: int) -> tuple[int, str, int]:
        """(layer, stage, index in the stage) of the step that comes after `done` steps; stages are prologue,
        pre, attention, post, experts, head."""
        if done == 0:
            return 0, "prologue", 0
        layer, k = divmod(done - 1, cost.steps_per_layer)
        if layer >= self.layers:
            return self.layers, "head", 0
        if k == 0:
            return layer, "pre", 0
        if k <= cost.query_blocks:
            return layer, "attention", k - 1
        if k == cost.query_blocks + 1:
            return layer, "post", 0
        return layer, "experts", k - cost.query_blocks - 2
