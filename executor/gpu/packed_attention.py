"""Attention of a pass's packed rows on a GPU: decode rows in one launch, prompts in tiles or in large blocks.

Which way a part of a prompt takes follows from the part, the layer and the device alone, so that suspending a pass or
sharing it changes no bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch

from qllm.executor.gpu.decode_attention import decode_attention
from qllm.executor.gpu.kv_write import write_kv
from qllm.executor.gpu.large_blocks import attend_block, suits
from qllm.executor.gpu.pass_inputs import DeviceInputs, PromptPart
from qllm.executor.gpu.tile_attention import tile_attention
from qllm.executor.latent.latents import Latents

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
    """Keys and values of a chunk side by side: the pass's own rows, or gathered (latents: expanded) once a layer."""

    holds_activations = True

    def __init__(
        self, inputs: DeviceInputs, layer: Layer, key: torch.Tensor, value: torch.Tensor, latents: Latents | None
    ):
        self._inputs, self._layer, self._latents = inputs, layer, latents
        self._first = 0 if latents is None else latents.first  # the pass's row that K and V begin with
        self._own = (key, value)
        self._chunk = -1
        self._gathered = self._own

    def up_to(self, part: PromptPart) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[L, kv_heads, D]` of all positions up to the last row of `part`."""
        stop = part.position + part.last - part.first
        if part.position == part.first - part.chunk_row:  # its chunk begins the sequence
            own = slice(part.chunk_row - self._first, part.last - self._first)
            return self._own[0][own], self._own[1][own]
        if part.chunk_row != self._chunk:
            slots = self._slots(part.table, part.position - part.first + part.chunk_last)
            keys = self._layer.keys.index_select(0, slots)
            if self._latents is None:
                self._gathered = (keys, self._layer.values.index_select(0, slots))
            else:
                self._gathered = self._latents.expanded(keys)
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
    latents: Latents | None = None,
) -> None:
    """Write K and V of the rows to the cache, and attend: q `[rows, heads, Dk]` into out `[rows, heads, Dv]`.

    `point` is called before each group of parts but the first. With `latents` these are what is written, rows that
    decode attend to them, and K and V are those of the rows of prompts.
    """
    decode = inputs.room.decode
    if latents is None:
        write_kv(layer.keys, layer.values, inputs.slots, key, value)
        attend_decoding(q[:decode], out[:decode], layer, inputs)
    else:
        attend_to_latents(q[:decode], out[:decode], layer, inputs, latents)
    chunks = Chunks(inputs, layer, key, value, latents)
    for number, of_group in groupby(parts, lambda part: part.group):
        if number:
            point(number)
        for large, some in groupby(of_group, lambda part: is_large(part, layer, q, key, value)):
            if large:
                for part in some:
                    rows = slice(part.first, part.last)
                    attend_block(q[rows], *chunks.up_to(part), out[rows], layer.scale)
            elif latents is None:
                in_tiles(q, out, layer, inputs, list(some))
            else:
                for part in some:
                    in_tiles_of(part, q, out, layer, inputs, chunks)


def attend_decoding(q: torch.Tensor, out: torch.Tensor, layer: Layer, inputs: DeviceInputs) -> None:
    """Attend the rows that decode."""
    if len(q):
        decode_attention(
            *(q, layer.keys, layer.values, inputs.decode_work(), out),
            block_size=layer.block_size,
            scale=layer.scale,
            window=layer.window,
            softcap=layer.softcap,
            sinks=layer.sinks,
            scratch=inputs.scratch.take(q.shape[1], layer.values.shape[-1], q.device),
        )


def attend_to_latents(q: torch.Tensor, out: torch.Tensor, layer: Layer, inputs: DeviceInputs, latents: Latents) -> None:
    """Write all latents of a pass to the cache, and attend the rows that decode to those of their sequences."""
    width, (new, _) = latents.form.latent_width, latents.kept
    stored = layer.keys[..., :width]
    write_kv(stored, layer.keys[..., width:], inputs.slots, new[..., :width], new[..., width:])
    if len(q):
        sums = q.new_empty((len(q), q.shape[1], width))
        attend_decoding(latents.form.queries(q), sums, layer._replace(values=stored), inputs)
        out.copy_(latents.form.results(sums))


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


def in_tiles_of(
    part: PromptPart, q: torch.Tensor, out: torch.Tensor, layer: Layer, inputs: DeviceInputs, chunks: Chunks
) -> None:
    """Attend the rows of one part to keys and values that lie side by side, not in blocks of the cache."""
    keys, values = chunks.up_to(part)
    work = inputs.tile_work(*part.tiles)
    blocks = torch.arange(-(-len(keys) // layer.block_size), device=q.device)
    side_by_side = replace(work, blocks=blocks, first=torch.zeros_like(work.first))
    tile_attention(
        *(q, keys, values, side_by_side, out),
        block_size=layer.block_size,
        scale=layer.scale,
        window=layer.window,
        softcap=layer.softcap,
        sinks=layer.sinks,
    )
