"""The experts hook: one loop over the experts that were hit, in groups, with a preemption point before each group.

Follows the attributes of transformers' experts interface (`transformers.integrations.moe`): gated or not, bias,
transposed weights, the module's own `_apply_gate`, a norm after each expert. Each token's k outputs are summed in the
order of its top-k indices, so the result depends neither on the grouping nor on who shares the batch's experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from executor.linear import linear
from executor.passes import current_pass

TILE_ROWS = 64


def experts_forward(
    module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Output of the MoE layer `module`, `[T, H]`, for `hidden` `[T, H]`, `top_k_index` and `top_k_weights` `[T, k]`.

    Outside of a pass it computes the same without preemption points.
    """
    running = current_pass()
    n_experts: int = module.num_experts  # type: ignore[assignment]
    k = top_k_index.shape[-1]
    order, counts = sort_by_expert(top_k_index, n_experts)
    token = order // k
    weight = top_k_weights.reshape(-1, 1).index_select(0, order)
    # One row for each of a token's k outputs, so that they are summed in the order of its indices. Experts that are not
    # held here (index >= num_experts, under expert parallelism) come last in `order` and count for nothing.
    dtype = torch.promote_types(hidden.dtype, top_k_weights.dtype)
    make = torch.empty if sum(counts) == order.shape[0] else torch.zeros
    outputs = make((order.shape[0], hidden.shape[1]), dtype=dtype, device=hidden.device)
    group_size = n_experts
    if running is not None:
        group_size = running.batch.cut.experts
        running.routing.append(counts)
    start = 0
    for number, first in enumerate(range(0, n_experts, group_size)):
        group = [e for e in range(first, min(first + group_size, n_experts)) if counts[e]]
        if running is not None and group:
            running.reach("experts", number)
        for tile in tiles(group, counts):
            sizes = [counts[e] for e in tile]
            part = slice(start, start + sum(sizes))
            out = run_experts(module, tile, sizes, hidden.index_select(0, token[part]))
            outputs.index_copy_(0, order[part], out * weight[part])
            start = part.stop
    return outputs.view(*top_k_index.shape, -1).sum(dim=1).to(hidden.dtype)


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


def sort_by_expert(top_k_index: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, list[int]]:
    """Order of the `T * k` assignments by expert (stable, int64) and the number of rows of each expert.

    The one value that the host must know of a layer; on CUDA it comes through a pinned buffer, one synchronisation.
    """
    flat = top_k_index.reshape(-1)
    if flat.device.type == "cpu":  # numpy: a tenth of the overhead per call for the few rows of a decode
        ids = flat.numpy()
        return torch.from_numpy(ids.argsort(kind="stable")), np.bincount(ids, minlength=n_experts)[:n_experts].tolist()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=n_experts)[:n_experts]
    host = torch.empty(n_experts, dtype=counts.dtype, pin_memory=True)
    host.copy_(counts, non_blocking=True)
    ready = torch.Event(flat.device)
    ready.record()
    ready.synchronize()
    return order, host.tolist()


def run_experts(
    module: torch.nn.Module, experts: Sequence[int], sizes: Sequence[int], rows: torch.Tensor
) -> torch.Tensor:
    """Unweighted outputs `[S, H]` of `rows` `[S, H]`: `sizes[i]` rows for `experts[i]`, one after another."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = project(module, name, experts, sizes, rows)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)  # type: ignore[operator]
    out = project(module, "down_proj", experts, sizes, hidden)
    return module.post_expert_norm(out) if module.has_post_expert_norm else out  # type: ignore[operator]


def project(
    module: torch.nn.Module, name: str, experts: Sequence[int], sizes: Sequence[int], rows: torch.Tensor
) -> torch.Tensor:
    """`rows` through the weight (and bias) `name` of each expert in turn."""
    packed = getattr(module, f"_qllm_{name}", None)
    weight = getattr(module, name) if packed is None else packed
    transposed = packed is None and module.is_transposed
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    outputs = [
        linear(
            part,
            weight[e].t() if transposed else weight[e],
            None if bias is None else bias[e],
        )
        for e, part in zip(experts, rows.split(sizes), strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
