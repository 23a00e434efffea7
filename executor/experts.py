"""The experts hook: one loop over the experts that were hit, in groups, with a preemption point before each group.

Follows the attributes of transformers' experts interface (`transformers.integrations.moe`): gated or not, bias,
transposed weights, the module's own `_apply_gate`, a norm after each expert. Each token's k outputs are summed in the
order of its top-k indices, so the result depends neither on the grouping nor on who shares the batch's experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from executor.linear import linear
from executor.passes import current_pass


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
    rows = hidden.index_select(0, order // k)
    group_size = n_experts
    if running is not None:
        group_size = running.batch.cut.experts
        running.routing.append(counts)
    outputs: list[torch.Tensor] = []
    start = 0
    for number, first in enumerate(range(0, n_experts, group_size)):
        group = [e for e in range(first, min(first + group_size, n_experts)) if counts[e]]
        if not group:
            continue
        if running is not None:
            running.reach("experts", number)
        sizes = [counts[e] for e in group]
        stop = start + sum(sizes)
        outputs.append(run_experts(module, group, sizes, rows[start:stop]))
        start = stop
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    # Rows of experts that this rank does not hold (index >= num_experts) come last and count for nothing.
    by_token = out.new_zeros((order.shape[0], out.shape[1])) if start < order.shape[0] else torch.empty_like(out)
    by_token.index_copy_(0, order[:start], out)
    weighted = by_token.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden.dtype)


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
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    outputs = [
        linear(
            part,
            weight[e].t() if module.is_transposed else weight[e],
            None if bias is None else bias[e],
        )
        for e, part in zip(experts, rows.split(sizes), strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
