"""The experts hook: one loop over the experts that were hit, in groups, with a preemption point before each group.

On a GPU a group is one launch, and a layer that is not cut leaves the host ignorant of who goes where
(`qllm.executor.gpu.moe_layer`).

Follows the attributes of transformers' experts interface (`transformers.integrations.moe`). Each token's k outputs are
summed in the order of its top-k indices, so the result depends neither on the grouping nor on who shares the batch's
experts. A launch may merge rows of suspended passes that wait at the same expert; each gets its outputs in its queues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

from qllm.executor.model.expert_queues import ExpertQueues, Queues
from qllm.executor.model.passes import RunningPass, current_pass

TILE_ROWS = 64


class ExpertsModule(Protocol):
    """The experts of one layer, as transformers' experts interface makes them; their weights lie beside these."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]

    def _apply_gate(self, gate_up_out: torch.Tensor) -> torch.Tensor: ...


class ExpertWeights(Protocol):
    """Weights `[N, K]` of a layer's experts in a form of their own, in place of a plain parameter."""

    def products(self, x: torch.Tensor, which: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """`x` `[S, K]` with weights `which`, `sizes` rows each in turn, to `[S, N]`."""


def experts_forward(
    module: ExpertsModule, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts of one MoE layer: hidden `[T, H]`, top-k `[T, k]`, to `[T, H]`. Outside of a pass without points."""
    running = current_pass()
    if running is not None and running.batch.inputs is not None and not needs_queues(module, running):
        return on_device(module, hidden, top_k_index, top_k_weights, running)
    queues = queues_of(module, hidden, top_k_index, top_k_weights, running)
    if running is None:
        for tile in tiles([e for e in range(module.num_experts) if queues.waiting[e]], queues.waiting):
            run_tile(module, tile, queues)
    else:
        queues.merge_rows = running.split.merge_rows
        running.queues = queues
        try:
            run_groups(module, queues, running)
        finally:
            running.queues = None  # nobody merges rows of a pass that broke or was closed
    return queues.result().to(hidden.dtype)


def queues_of(
    module: ExpertsModule,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    running: RunningPass | None,
) -> Queues:
    """What waits at each expert of a layer that begins; a pass also keeps how many rows."""
    if running is not None and running.batch.inputs is not None:
        from qllm.executor.gpu.device_queues import DeviceQueues  # Triton, which is there with a GPU only

        on_gpu = DeviceQueues(hidden, top_k_index, top_k_weights, module.num_experts, running.batch.slots)
        running.routed.append(on_gpu.ends)
        return on_gpu
    queues = ExpertQueues(hidden, top_k_index, top_k_weights, module.num_experts)
    if running is not None:
        running.routed.append(queues.waiting.copy())
    return queues


def needs_queues(module: ExpertsModule, running: RunningPass) -> bool:
    """Whether the host must know the rows of each expert: cut layers, weights with own products, or somebody asks."""
    cut = running.split.experts_per_group < module.num_experts
    return cut or running.keeps_queues or weights_of(module, "down_proj") is not None


def on_device(
    module: ExpertsModule,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    running: RunningPass,
) -> torch.Tensor:
    """All experts of the layer in a GPU's kernels, with one point before them."""
    from qllm.executor.gpu.moe_layer import whole_layer  # Triton, which is there with a GPU only

    def point(ends: torch.Tensor) -> None:
        running.routed.append(ends)
        running.reach("experts", 0)

    return whole_layer(module, hidden, top_k_index, top_k_weights, running.batch.slots, point)


def run_groups(module: ExpertsModule, queues: Queues, running: RunningPass) -> None:
    """Run what waits in `queues`, in groups of experts, with a preemption point before each that has any."""
    size = running.split.experts_per_group
    for number, first in enumerate(range(0, len(queues.waiting), size)):
        experts = range(first, min(first + size, len(queues.waiting)))
        if any(queues.waiting[e] for e in experts):
            running.reach("experts", number)
            # while it stood there, another pass may have merged some of its rows
            group = [e for e in experts if queues.waiting[e]]
            others = running.shared_queues()
            for tile in [group] if queues.tile else tiles(group, queues.waiting):
                run_tile(module, tile, queues, others)


def tiles(experts: Sequence[int], counts: Sequence[int]) -> Iterator[list[int]]:
    """`experts` in runs of at least TILE_ROWS rows: small ones share their activation, large ones stay in the cache."""
    tile: list[int] = []
    rows = 0
    for e in experts:
        tile.append(e)
        rows += counts[e]
        if rows >= TILE_ROWS:
            yield tile
            tile, rows = [], 0
    if tile:
        yield tile


def run_tile(module: ExpertsModule, tile: Sequence[int], queues: Queues, others: Sequence[Queues] = ()) -> None:
    """Run what waits in `queues` at each expert of `tile`, and in the same launch what may be merged from `others`."""
    grouped = queues.tile and weights_of(module, "down_proj") is None  # plain weights alone can be multiplied at once
    run = partial(run_group, tile=queues.tile) if grouped else run_experts
    merged = [q for q in others if any(map(q.can_merge, tile))]
    own = [queues.waiting[e] for e in tile]
    whole = slice(queues.span(tile[0]).start, queues.span(tile[-1]).stop)
    if not merged and _length(whole) == sum(own):  # one after another; in few steps, since a GPU waits for them
        queues.put(whole, run(module, tile, own, queues.rows(whole)))
        for e in tile:
            queues.waiting[e] = 0
        return
    shares = [[queues, *(q for q in merged if q.can_merge(e))] for e in tile]
    parts = [(q, q.span(e)) for e, of in zip(tile, shares, strict=True) for q in of]
    sizes = [sum(map(_length, [q.span(e) for q in of])) for e, of in zip(tile, shares, strict=True)]
    out = run(module, tile, sizes, torch.cat([q.rows(span) for q, span in parts]))
    for (q, span), part in zip(parts, out.split([_length(span) for _, span in parts]), strict=True):
        q.put(span, part)
    for e, of in zip(tile, shares, strict=True):
        for q in of:
            q.waiting[e] = 0


def _length(span: slice) -> int:
    length: int = span.stop - span.start
    return length


def run_experts(
    module: ExpertsModule, experts: Sequence[int], sizes: Sequence[int], rows: torch.Tensor
) -> torch.Tensor:
    """Unweighted outputs `[S, H]` of `rows` `[S, H]`: `sizes[i]` rows for `experts[i]`, one after another."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = project(module, name, experts, sizes, rows)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    out = project(module, "down_proj", experts, sizes, hidden)
    return module.post_expert_norm(out) if module.has_post_expert_norm else out


def run_group(
    module: ExpertsModule, experts: Sequence[int], sizes: Sequence[int], rows: torch.Tensor, tile: int
) -> torch.Tensor:
    """`run_experts` in a launch for each product, on a GPU; `tile` is that of the whole layer."""
    from qllm.executor.gpu.device_queues import ends_on  # Triton, which is there with a GPU only
    from qllm.executor.gpu.moe_layer import run_experts

    counts = dict(zip(experts, sizes, strict=True))
    ends = ends_on(rows.device, [counts.get(e, 0) for e in range(experts[0], experts[-1] + 1)])
    return run_experts(module, rows, experts[0], ends, tile)


def weights_of(module: ExpertsModule, name: str) -> ExpertWeights | None:
    """The weights `name` of a layer's experts where they do their own products: packed, or quantised."""
    own: ExpertWeights | None = getattr(module, f"_qllm_{name}", None)
    return own


def project(
    module: ExpertsModule, name: str, experts: Sequence[int], sizes: Sequence[int], rows: torch.Tensor
) -> torch.Tensor:
    """`rows` through the weight (and bias) `name` of each expert in turn."""
    own = weights_of(module, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    if own is not None:
        out = own.products(rows, experts, sizes)
        repeats = torch.tensor(sizes, device=out.device)
        return out if bias is None else out.add_(bias[experts].repeat_interleave(repeats, 0, output_size=len(out)))
    weight = getattr(module, name)
    outputs = [
        F.linear(part, weight[e].t() if module.is_transposed else weight[e], None if bias is None else bias[e])
        for e, part in zip(experts, rows.split(sizes), strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
