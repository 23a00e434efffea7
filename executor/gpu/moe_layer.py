"""The experts of one MoE layer on a GPU in a handful of launches, without the host knowing who goes where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qllm.executor.gpu.expert_rows import combine, sort_rows
from qllm.executor.gpu.fused.gate import is_plain_gate, silu_and_mul
from qllm.executor.gpu.grouped_product import grouped_product


def whole_layer(
    module: Any,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    slots: torch.Tensor,
    point: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    """All experts of a layer: hidden `[T, H]`, top-k `[T, k]`, to `[T, H]`.

    Args:
        module: the experts, as transformers' experts interface makes them (`ExpertsModule`).
        hidden: of each row.
        top_k_index: experts of each row.
        top_k_weights: of these.
        slots: int64 `[T]`, negative for padding rows, which no expert sees.
        point: called before the experts, with where each one's rows end (int32 `[E]`, on the device).
    """
    rows = sort_rows(top_k_index, module.num_experts, slots)
    point(rows.offsets)
    outputs = run_experts(module, hidden.index_select(0, rows.token), 0, rows.offsets)
    return combine(outputs, rows, top_k_weights, hidden.dtype)


def run_experts(
    module: Any, rows: torch.Tensor, first: int, offsets: torch.Tensor, tile: int | None = None
) -> torch.Tensor:
    """Unweighted outputs `[S, H]` of `rows` `[S, H]`, sorted by expert from expert `first` on; `offsets` end each.

    `tile`: rows of a tile in our own product, that of the whole layer where this is a part of one.
    """
    name = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _project(module, name, rows, first, offsets, tile)
    if is_plain_gate(module):
        hidden = silu_and_mul(hidden, offsets)
    else:
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    out = _project(module, "down_proj", hidden, first, offsets, tile)
    return module.post_expert_norm(out) if module.has_post_expert_norm else out


def _project(
    module: Any, name: str, rows: torch.Tensor, first: int, offsets: torch.Tensor, tile: int | None
) -> torch.Tensor:
    """`rows` through the weight (and bias) `name` of their experts."""
    some = slice(first, first + len(offsets))
    weight = getattr(module, name)[some]
    bias = getattr(module, f"{name}_bias")[some] if module.has_bias else None
    return grouped_product(rows, weight if module.is_transposed else weight.transpose(1, 2), offsets, bias, tile)
