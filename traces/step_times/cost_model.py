"""The steps of a pass: how long each takes by a timing trace, and between which of them the pass can stop.

Simulator and virtual clock both take their times from here, so they cannot drift apart.

No step can be interrupted: a prologue, the layers, the head. A layer is
``pre | query block 1 | ... | query block P, post | group 1 | ... | group G``. A pass can stop at a preemption point
(``|``): before the attention, between query blocks, before the experts, between groups of experts. P and G keep every
block and group below `max_step`; they depend on nothing else, so not on whether anyone waits.

Times are whole ticks (pass_cost.py): added one by one or all at once, the sum is the same to the last bit.

Merging (`mergeable`, `merged`): the running pass takes along tokens of suspended passes that wait at its experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from qllm.traces.step_times.pass_cost import TICK, TICKS_PER_S, PassCost, ticks
from qllm.traces.step_times.timings import Timings

__all__ = ["TICK", "TICKS_PER_S", "PassCost", "PassCostModel", "ticks"]


class PassCostModel:
    """Step times of passes for one model on one GPU.

    Args:
        timings: The timing trace.
        max_step: Seconds that a query block or a group of experts should not exceed.
        expert_mode: "fused": the experts of a layer share `experts_base_s`, and groups are launches of the fused
            kernel. "separate": a launch per expert. Default: what the trace describes; separate never serves as fused.
        popularity: Share of the tokens that go to each expert, float[layers, experts]; it decides the size of groups.
            Default: uniform.

    Attributes:
        layers: Layers of the model.
        n_experts: Experts in each.
        popularity: Share of the tokens that go to each expert, float[layers or 1, experts].
        merge_rows: Most tokens of a suspended pass merged at an expert: the largest measured m with f(m) <= 2 f(1).
            Merging saves one reading of the expert's weights, f(1); up to so many, a launch gets at most about one
            such reading longer. More would make the running pass wait for the work of others.
        suspend_s: Seconds to suspend a pass.
        resume_s: Seconds to resume it.
        wake_s: Seconds that a pass takes longer after the device stood idle.

    Raises:
        ValueError: `max_step` or `expert_mode` is impossible.
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
        self._experts_base_s = ticks(timings.experts_base_s)
        self._block_launch_s = ticks(timings.launch_s if timings.query_block_s is None else timings.query_block_s)
        self._host_s: float = ticks(timings.host_s)
        self.suspend_s: float = ticks(timings.suspend_s)
        self.resume_s: float = ticks(timings.resume_s)
        self.wake_s: float = ticks(timings.wake_s)
        self.popularity = np.full((1, timings.experts), 1.0 / timings.experts) if popularity is None else popularity
        self._peak_share = min(
            1.0, float(self.popularity.max()) * timings.top_k
        )  # of a pass's tokens, at the most popular expert
        self._by_tokens: dict[int, tuple[float, float, float, int, int]] = {}  # dense parts, and groups of experts
        self._heads: dict[int, float] = {}
        self._attention_floor: float | None = None  # of a prompt of one token
        self._attention: dict[int, Callable[[float], float]] = {}  # of so many that decode, by their mean context
        self._decodes: dict[tuple[int, bool], Callable[[int], float]] = {}

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
        """Seconds of all experts and of further groups' launches, without the shared `experts_base_s`.

        `routing`: tokens of each expert, int[MoE layers, experts]. A trace takes all layers to be alike: where some
        have no experts, those that have count for all.
        """
        counts = np.asarray(routing)
        seconds = float(np.add.reduce(self.experts(counts), axis=None))
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
        """Times of one pass. The attention of all chunks is one launch: the cost of the smallest is counted once.

        Args:
            prefill: Chunks of prompts: (anything, new tokens, tokens cached before).
            n_decode: Sequences that decode.
            decode_context: Tokens that these hold, all together.
            rows: Sequences that get a new token.
            moved_tokens: Tokens whose KV is moved to or from host memory first.
            after_prefill: Whether the pass before had prompts, which counts where this one has none.
        """
        t = self.timings
        tokens, attention = n_decode, 0.0
        if n_decode:
            attention = self._decode_attention(n_decode)(decode_context / n_decode)
        if prefill:
            attention_prefill = t.attention_prefill
            if self._attention_floor is None:
                self._attention_floor = attention_prefill(1, 0)
            floor = self._attention_floor
            attention += floor
            for _, new, cached in prefill:
                tokens += new
                above = attention_prefill(new, cached) - floor
                if above > 0:
                    attention += above
        known = self._by_tokens.get(tokens)
        if known is None:
            known = self._by_tokens[tokens] = (
                ticks(t.dense_pre(tokens)),
                ticks(t.dense_post(tokens)),
                *self._expert_groups(tokens),
            )
        pre_s, post_s, group_launch_s, experts_per_group, n_groups = known
        head_s = self._heads.get(rows)
        if head_s is None:
            head_s = self._heads[rows] = ticks(t.head(rows))
        query_block_s, query_blocks = self._query_blocks(attention)
        prologue_s = self._host_s
        if moved_tokens or (after_prefill and not prefill):
            prologue = t.host_s + moved_tokens * t.kv_bytes_per_token / t.host_bandwidth
            prologue_s = ticks(prologue + (0.0 if prefill or not after_prefill else t.after_prefill(n_decode)))
        return PassCost(
            prologue_s,
            pre_s,
            query_block_s,
            query_blocks,
            post_s,
            self._experts_base_s,
            group_launch_s,
            head_s,
            experts_per_group,
            n_groups,
        )

    def decode_total(self, n_decode: int, decode_context: int, after_prefill: bool = False) -> float:
        """`total` of a pass that only decodes, without its experts: the fast path of the simulator."""
        return self.decode_seconds(n_decode, decode_context, after_prefill)(decode_context)

    def decode_seconds(self, n_decode: int, context: int, after_prefill: bool = False) -> Callable[[int], float]:
        """`decode_total` of `n_decode` sequences by the tokens that they hold, such as `context`."""
        found = self._decodes.get((n_decode, after_prefill))
        if found is not None:
            return found
        cost = self.cost((), n_decode, context, n_decode, after_prefill=after_prefill)
        fixed = self.total(cost, 0.0) - self.layers * cost.query_block_s * cost.query_blocks
        attention_of, layers, most = self._decode_attention(n_decode), self.layers, self.max_step

        def seconds(context: int) -> float:
            attention = attention_of(context / n_decode)
            if attention <= most:
                return fixed + layers * (round(attention * TICKS_PER_S) * TICK)
            query_block_s, query_blocks = self._query_blocks(attention)
            return fixed + layers * query_block_s * query_blocks

        self._decodes[n_decode, after_prefill] = seconds
        return seconds

    def _decode_attention(self, n_decode: int) -> Callable[[float], float]:
        found = self._attention.get(n_decode)
        if found is None:
            found = self._attention[n_decode] = self.timings.attention_decode.line(n_decode)
        return found

    def _query_blocks(self, attention: float) -> tuple[float, int]:
        """The query blocks of an attention of so many seconds: (seconds of each, how many)."""
        if attention <= self.max_step:
            return round(attention * TICKS_PER_S) * TICK, 1
        blocks = math.ceil(attention / self.max_step)
        return round((attention / blocks + self._block_launch_s) * TICKS_PER_S) * TICK, blocks

    def _expert_groups(self, tokens: int) -> tuple[float, int, int]:
        """(Seconds that a further group adds, experts in each group, groups) of a pass of so many tokens.

        A group stays below `max_step` if each expert has the tokens of the most popular one, three sigma up.
        """
        mean = tokens * self._peak_share
        most = min(tokens, math.ceil(mean + 3 * math.sqrt(mean)))
        t = self.timings
        group_launch_s = ticks(t.launches_per_expert * t.launch(tokens)) if self.mode == "fused" else 0.0
        room = self.max_step - self._experts_base_s - group_launch_s
        each = max(float(self._table[most] if most < len(self._table) else self.experts(np.array(most))), TICK)
        experts = int(min(max(room / each, 1), self.n_experts))
        return group_launch_s, experts, -(-self.n_experts // experts)

    def group_seconds(self, cost: PassCost, counts: np.ndarray) -> np.ndarray:
        """Seconds of each group, float64[..., groups], for `counts`; empty ones take 0, the first `experts_base_s`."""
        out = self.by_group(cost, self.experts(counts))
        out[..., 0] += cost.experts_base_s
        out[..., 1:] += cost.group_launch_s * (self.by_group(cost, counts)[..., 1:] > 0)
        return out

    def by_group(self, cost: PassCost, each: np.ndarray) -> np.ndarray:
        """Sum what `each` expert has, [..., experts], over the experts of each group, [..., groups]."""
        if cost.experts_per_group == 1:
            return each
        return np.add.reduceat(each, np.arange(0, self.n_experts, cost.experts_per_group), axis=-1)

    def mergeable(self, own: np.ndarray, waiting: np.ndarray) -> np.ndarray:
        """Where the running pass merges, bool[...]: it has `own` tokens, and 1 to `merge_rows` are `waiting`."""
        return (own > 0) & (waiting > 0) & (waiting <= self.merge_rows)

    def merged(self, own: np.ndarray, suspended: Iterable[np.ndarray]) -> np.ndarray:
        """Tokens of each expert, int[...]: `own`, and those merged that wait in each `suspended` pass."""
        out = own.copy()
        for waiting in suspended:
            out += np.where(self.mergeable(own, waiting), waiting, 0)
        return out

    def total(self, cost: PassCost, experts_s: float) -> float:
        """Seconds of the whole pass, whose experts take `experts_s` (see `experts_of_pass`)."""
        layer = cost.pre_s + cost.query_block_s * cost.query_blocks + cost.post_s + cost.experts_base_s
        return cost.prologue_s + self.layers * layer + experts_s + cost.head_s

    def times(self, cost: PassCost, counts: np.ndarray) -> np.ndarray:
        """Seconds of each step, float64[2 + layers * steps_per_layer], for tokens per expert, int[layers, experts]."""
        steps = np.empty((self.layers, cost.steps_per_layer))
        steps[:, 0] = cost.pre_s
        steps[:, 1 : 1 + cost.query_blocks] = cost.query_block_s
        steps[:, 1 + cost.query_blocks] = cost.post_s
        steps[:, 2 + cost.query_blocks :] = self.group_seconds(cost, counts)
        return np.concatenate(([cost.prologue_s], steps.ravel(), [cost.head_s]))

    def points(self, cost: PassCost, granularity: str) -> np.ndarray:
        """The steps (indices into `times`) after which a pass may stop, int64, increasing.

        `granularity`: "expert": all preemption points; "layer": the one before each attention; "iteration": none.
        """
        if granularity == "iteration":
            return np.empty(0, dtype=np.int64)
        n = cost.steps_per_layer
        inside = [0]
        if granularity == "expert":
            post = 1 + cost.query_blocks
            inside += [*range(1, cost.query_blocks), post, *range(post + 1, n - 1)]
        points: np.ndarray = (1 + n * np.arange(self.layers))[:, None] + np.array(inside)
        return points.ravel()

    def next_point(self, cost: PassCost, granularity: str, step: int) -> int | None:
        """The first of `points` from `step` on, for "expert" or "layer"; None where there is none."""
        n = cost.steps_per_layer
        layer, inside = divmod(max(step - 1, 0), n)
        if granularity == "expert" and inside == cost.query_blocks:  # what follows the last block belongs to it
            inside += 1
        elif inside == n - 1 or (granularity == "layer" and inside):
            layer, inside = layer + 1, 0
        return 1 + n * layer + inside if layer < self.layers else None

    def position(self, cost: PassCost, done: int) -> tuple[int, str, int]:
        """(Layer, stage, index in the stage) of the next step: prologue, pre, attention, post, experts or head."""
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
