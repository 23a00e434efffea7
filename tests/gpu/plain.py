"""The kernels of a GPU by plain loops, for whole passes in tests: Triton's interpreter takes a second for a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qllm.executor.gpu import device_queues, moe_layer, packed_attention
from qllm.executor.gpu.expert_rows import SortedRows
from qllm.executor.gpu.launch import launch


class Plain:
    """Launched as a kernel is, so that a recorder sees it."""

    def __init__(self, function: Callable[..., None]):
        self._function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._function


def run(function: Callable[..., None], *arguments: Any, **constants: Any) -> None:
    launch(Plain(function), (1,), *arguments, **constants)


def write_kv(keys: Any, values: Any, slots: Any, key: Any, value: Any) -> None:
    def fill() -> None:
        real = slots >= 0
        keys[slots[real]] = key[real]
        values[slots[real]] = value[real]

    run(fill)


def attend_row(q: Any, slots: Any, keys: Any, values: Any, scale: Any, softcap: Any, sinks: Any) -> torch.Tensor:
    """One query row `[heads, Dk]` over the keys in `slots`."""
    group = q.shape[0] // keys.shape[1]
    k, v = (t[slots].repeat_interleave(group, dim=1).double() for t in (keys, values))
    logits = torch.einsum("hd,nhd->hn", q.double(), k) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None]], dim=1)
    weights = logits.softmax(-1)[:, : len(slots)]
    return torch.einsum("hn,nhd->hd", weights, v).to(q.dtype)


def slots_before(blocks: Any, first: int, stop: int, size: int, window: int | None) -> torch.Tensor:
    at = torch.arange(0 if window is None else max(0, stop - window), stop)
    return blocks[first + at // size] * size + at % size


def decode_attention(
    q: Any, keys: Any, values: Any, work: Any, out: Any, *, block_size: int, scale: float, window: Any = None,
    softcap: Any = None, sinks: Any = None, scratch: Any,
) -> None:  # fmt: skip
    def fill() -> None:
        out.zero_()
        for row, (first, length) in enumerate(zip(work.first.tolist(), work.length.tolist(), strict=True)):
            if length:
                slots = slots_before(work.blocks, first, length, block_size, window)
                out[row] = attend_row(q[row], slots, keys, values, scale, softcap, sinks)

    run(fill)


def tile_attention(
    q: Any, keys: Any, values: Any, work: Any, out: Any, *, block_size: int, scale: float, window: Any = None,
    softcap: Any = None, sinks: Any = None,
) -> None:  # fmt: skip
    def fill() -> None:
        for row, rows, position, first in torch.stack([work.row, work.rows, work.position, work.first], 1).tolist():
            for i in range(rows):
                slots = slots_before(work.blocks, first, position + i + 1, block_size, window)
                out[row + i] = attend_row(q[row + i], slots, keys, values, scale, softcap, sinks)

    run(fill)


def sort_rows(top_k_index: torch.Tensor, n_experts: int, slots: torch.Tensor | None = None) -> SortedRows:
    tokens, k = top_k_index.shape
    rows = SortedRows(
        torch.empty(tokens * k, dtype=torch.int64),
        torch.empty(tokens * k, dtype=torch.int64),
        torch.empty(n_experts, dtype=torch.int32),
    )

    def fill() -> None:
        ids = top_k_index if slots is None else top_k_index.masked_fill((slots < 0)[:, None], n_experts)
        ordered, order = ids.reshape(-1).sort(stable=True)
        rows.token.copy_(order // k)
        rows.place[order] = torch.arange(len(order))
        rows.offsets.copy_(torch.searchsorted(ordered, torch.arange(n_experts), right=True))

    run(fill)
    return rows


def combine(outputs: torch.Tensor, rows: SortedRows, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    tokens, k = weights.shape
    out = outputs.new_empty((tokens, outputs.shape[1]), dtype=dtype)

    def fill() -> None:
        real = (rows.place < rows.offsets[-1])[:, None]
        each = (outputs[rows.place] * weights.reshape(-1, 1)).where(real, 0.0)
        out.copy_(each.view(tokens, k, -1).sum(1))

    run(fill)
    return out


def grouped_product(rows: Any, weight: Any, offsets: Any, bias: Any = None, tile: Any = None) -> torch.Tensor:
    out = rows.new_empty((rows.shape[0], weight.shape[2]))

    def fill() -> None:
        out.fill_(float("nan"))  # rows past the last offset hold anything
        start = 0
        for expert, end in enumerate(offsets.tolist()):
            product = rows[start:end] @ weight[expert]
            out[start:end] = product if bias is None else product + bias[expert]
            start = end

    run(fill)
    return out


def silu_and_mul(gate_up: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels by plain loops, wherever a pass calls them."""
    for name in ("write_kv", "decode_attention", "tile_attention"):
        monkeypatch.setattr(packed_attention, name, globals()[name])
    for name in ("sort_rows", "combine", "grouped_product", "silu_and_mul"):
        monkeypatch.setattr(moe_layer, name, globals()[name])
    for name in ("sort_rows", "combine"):
        monkeypatch.setattr(device_queues, name, globals()[name])
