"""Attention of a pass's packed rows on a GPU: decode rows in one launch, prompts in tiles or in large blocks.

Which way a part of a prompt takes follows from the part, the layer and the device alone, so that suspending a pass or
sharing it changes no bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from qllm.executor.gpu.decode_attention import decode_attention
from qllm.executor.gpu.kv_write import write_kv
from qllm.executor.gpu.large_blocks import attend_block, suits
from qllm.executor.gpu.pass_inputs import DeviceInputs, PromptPart
from qllm.executor.gpu.tile_attention import tile_attention

LARGE_ROWS = 513  #: of a chunk: from here on its parts are blocks of PyTorch's attention, where that can do them


class Layer(NamedTuple):
    """The attention of one layer: its cache and what it does to the products of queries and keys."""

    keys: torch.Tensor  #: `[slots, kv_heads, Dk]`
    values: torch.Tensor  #: `[slots, kv_heads, Dv]`
    block_size: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


class Chunks:
    """Keys and values of the chunks that large blocks attend to: the pass's own rows, or gathered once a layer."""

    holds_activations = True

    def __init__(self, inputs: DeviceInputs, layer: Layer, key: torch.Tensor, value: torch.Tensor):
        self._inputs, self._layer = inputs, layer
        self._own = (key, value)
        self._chunk = -1
        self._gathered = self._own

    def up_to(self, part: PromptPart) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[L, kv_heads, D]` of all positions up to the last row of `part`."""
        stop = part.position + part.last - part.first
        if part.position == part.first - part.chunk_row:  # its chunk begins the sequence
            own = slice(part.chunk_row, part.last)
            return self._own[0][own], self._own[1][own]
        if part.chunk_row != self._chunk:
            slots = self._slots(part.table, part.position - part.first + part.chunk_last)
            self._gathered = (self._layer.keys.index_select(0, slots), self._layer.values.index_select(0, slots))
            self._chunk = part.chunk_row
        return self._gathered[0][:stop], self._gathered[1][:stop]

    def _slots(self, table: int, n: int) -> torch.Tensor:
        size = self._layer.block_size
        blocks = self._inputs.blocks[table : table - (-n // size)]
        each = torch.arange(size, device=blocks.device)
        slots: torch.Tensor = (blocks[:, None] * size + each).flatten()[:n]
        return slots


def attend(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    layer: Layer,
    inputs: DeviceInputs,
    parts: Sequence[PromptPart],
    point: Callable[[int], None],
) -> None:
    """Write K and V of the rows to the cache, and attend: q `[rows, heads, Dk]` into out `[rows, heads, Dv]`.

    `point` is called before each group of parts but the first.
    """
    write_kv(layer.keys, layer.values, inputs.slots, key, value)
    decode = inputs.room.decode
    if decode:
        decode_attention(
            *(q[:decode], layer.keys, layer.values, inputs.decode_work(), out[:decode]),
            block_size=layer.block_size,
            scale=layer.scale,
            window=layer.window,
            softcap=layer.softcap,
            sinks=layer.sinks,
            scratch=inputs.scratch.take(q.shape[1], value.shape[-1], q.device),
        )
    chunks = Chunks(inputs, layer, key, value)
    for number, of_group in groupby(parts, lambda part: part.group):
        if number:
            point(number)
        for large, some in groupby(of_group, lambda part: is_large(part, layer, q, key, value)):
            if large:
                for part in some:
                    rows = slice(part.first, part.last)
                    attend_block(q[rows], *chunks.up_to(part), out[rows], layer.scale)
            else:
                in_tiles(q, out, layer, inputs, list(some))


def is_large(part: PromptPart, layer: Layer, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `part` is attended as one block of PyTorch's attention."""
    plain = layer.softcap is None and layer.sinks is None
    in_window = layer.window is None or layer.window >= part.position + part.last - part.first
    return plain and in_window and part.chunk_last - part.chunk_row >= LARGE_ROWS and suits(q, key, value)


def in_tiles(
    q: torch.Tensor, out: torch.Tensor, layer: Layer, inputs: DeviceInputs, parts: Sequence[PromptPart]
) -> None:
    """Attend the rows of `parts`, which follow each other, in one launch."""
    work = inputs.tile_work(parts[0].tiles[0], parts[-1].tiles[1])
    tile_attention(
        *(q, layer.keys, layer.values, work, out),
        block_size=layer.block_size,
        scale=layer.scale,
        window=layer.window,
        softcap=layer.softcap,
        sinks=layer.sinks,
    )
