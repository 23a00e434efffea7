"""Attention of a pass's packed rows on a GPU: decode rows in one launch, prompts in tiles or in large blocks.

Which way a part of a prompt takes follows from the part, the layer and the device alone, so that suspending a pass or
sharing it changes no bits.

In a layer that keeps a window, the rows of a long chunk overwrite what others of them see. There what the chunk sees is
laid side by side: its context, read before anything is written, and its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch

from qllm.executor.gpu.decode_attention import decode_attention
from qllm.executor.gpu.kv_write import write_kv
from qllm.executor.gpu.large_blocks import attend_block, suits
from qllm.executor.gpu.pass_inputs import STEP_KEYS, DeviceInputs, PromptPart, Tables
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
    tables: Tables
    ring: int  #: tokens that it keeps of a sequence; 0: all

    @property
    def settings(self) -> dict[str, Any]:
        """What both kernels of ours take beside tensors."""
        return {name: getattr(self, name) for name in ("block_size", "scale", "window", "softcap", "sinks")}


class Chunks:
    """Keys and values of a chunk side by side: the pass's own rows, or gathered (latents: expanded) once a layer.

    Make it before the rows of the pass are written: then what they overwrite is read.
    """

    holds_activations = True

    def __init__(
        self,
        inputs: DeviceInputs,
        layer: Layer,
        key: torch.Tensor,
        value: torch.Tensor,
        latents: Latents | None,
        parts: Sequence[PromptPart],
    ):
        self._inputs, self._layer, self._latents = inputs, layer, latents
        self._first = 0 if latents is None else latents.first  # the pass's row that K and V begin with
        self._own = (key, value)
        self._chunk = -1
        self._gathered = self._own
        self._contexts = tuple(
            (part.chunk_row, *self._read(part.ring_table, *context_of(part, layer)))
            for part in {part.chunk_row: part for part in parts if writes_over(part, layer)}.values()
        )

    def up_to(self, part: PromptPart) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[L, kv_heads, D]` of all positions up to the last row of `part`."""
        stop = part.position + part.last - part.first
        if part.position == part.first - part.chunk_row:  # its chunk begins the sequence
            own = slice(part.chunk_row - self._first, part.last - self._first)
            return self._own[0][own], self._own[1][own]
        if writes_over(part, self._layer):
            keys, values, _ = self.in_reach(part)
            return keys[:stop], values[:stop]
        if part.chunk_row != self._chunk:
            table = part.ring_table if self._layer.ring else part.table
            keys, values = self._read(table, 0, part.position - part.first + part.chunk_last)
            self._gathered = (keys, values) if self._latents is None else self._latents.expanded(keys)
            self._chunk = part.chunk_row
        return self._gathered[0][:stop], self._gathered[1][:stop]

    def in_reach(self, part: PromptPart) -> tuple[torch.Tensor, torch.Tensor, int]:
        """K and V `[L, kv_heads, D]` of what the chunk of `part` sees, and the position that they begin with.

        They begin a little before, where a step of the kernels does: what lies there is anything.
        """
        size = self._layer.block_size
        low, start = context_of(part, self._layer)
        begin = low // STEP_KEYS * STEP_KEYS // size * size
        if part.chunk_row != self._chunk:
            own = slice(part.chunk_row, part.chunk_last)
            found = next(found for row, *found in self._contexts if row == part.chunk_row)
            made = []
            for context, new in zip(found, self._own, strict=True):
                both = new.new_empty((part.chunk_last - part.chunk_row + start - begin, *new.shape[1:]))
                both[low - begin : start - begin] = context
                both[start - begin :] = new[own]
                made.append(both)
            self._chunk, self._gathered = part.chunk_row, (made[0], made[1])
        return *self._gathered, begin

    def _read(self, table: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of positions `start` to `stop` of the sequence whose block table begins at `table`."""
        size, positions = self._layer.block_size, torch.arange(start, stop, device=self._inputs.blocks.device)
        slots = self._inputs.blocks[table + positions // size] * size + positions % size
        keys = self._layer.keys.index_select(0, slots)
        return keys, keys if self._latents is not None else self._layer.values.index_select(0, slots)


def writes_over(part: PromptPart, layer: Layer) -> bool:
    """Whether the rows of its chunk overwrite in a ring what one of them sees."""
    rows = part.chunk_last - part.chunk_row
    return layer.ring > 0 and layer.window is not None and rows + layer.window - 1 > layer.ring


def context_of(part: PromptPart, layer: Layer) -> tuple[int, int]:
    """The positions before a chunk that its first row sees, and the chunk's own first."""
    start = part.position - (part.first - part.chunk_row)
    return (0 if layer.window is None else max(0, start - layer.window + 1)), start


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
    chunks = Chunks(inputs, layer, key, value, latents, parts)
    if latents is None:
        write_kv(layer.keys, layer.values, layer.tables.slots, key, value)
        attend_decoding(q[:decode], out[:decode], layer, inputs)
    else:
        attend_to_latents(q[:decode], out[:decode], layer, inputs, latents)
    for number, of_group in groupby(parts, lambda part: part.group):
        if number:
            point(number)
        for way, some in groupby(of_group, lambda part: way_of(part, layer, q, key, value)):
            if way == "large":
                for part in some:
                    rows = slice(part.first, part.last)
                    attend_block(q[rows], *chunks.up_to(part), out[rows], layer.scale)
            elif way == "paged" and latents is None:
                in_tiles(q, out, layer, inputs, list(some))
            else:
                for part in some:
                    found = (*chunks.up_to(part), 0) if way == "paged" else chunks.in_reach(part)
                    in_tiles_of(part, q, out, layer, inputs, *found)


def attend_decoding(q: torch.Tensor, out: torch.Tensor, layer: Layer, inputs: DeviceInputs) -> None:
    """Attend the rows that decode."""
    if len(q):
        decode_attention(
            *(q, layer.keys, layer.values, inputs.decode_work(layer.tables), out),
            **layer.settings,
            scratch=inputs.scratch.take(q.shape[1], layer.values.shape[-1], q.device),
        )


def attend_to_latents(q: torch.Tensor, out: torch.Tensor, layer: Layer, inputs: DeviceInputs, latents: Latents) -> None:
    """Write all latents of a pass to the cache, and attend the rows that decode to those of their sequences."""
    width, (new, _) = latents.form.latent_width, latents.kept
    stored = layer.keys[..., :width]
    write_kv(stored, layer.keys[..., width:], layer.tables.slots, new[..., :width], new[..., width:])
    if len(q):
        sums = q.new_empty((len(q), q.shape[1], width))
        attend_decoding(latents.form.queries(q), sums, layer._replace(values=stored), inputs)
        out.copy_(latents.form.results(sums))


def way_of(
    part: PromptPart, layer: Layer, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> Literal["large", "paged", "side by side"]:
    """How `part` is attended: as one block, in tiles over the cache, or in tiles over what its chunk sees."""
    if is_large(part, layer, q, key, value):
        return "large"
    return "side by side" if writes_over(part, layer) else "paged"


def is_large(part: PromptPart, layer: Layer, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `part` is attended as one block of PyTorch's attention."""
    plain = layer.softcap is None and layer.sinks is None
    in_window = layer.window is None or layer.window >= part.position + part.last - part.first
    return plain and in_window and part.chunk_last - part.chunk_row >= LARGE_ROWS and suits(q, key, value)


def in_tiles(
    q: torch.Tensor, out: torch.Tensor, layer: Layer, inputs: DeviceInputs, parts: Sequence[PromptPart]
) -> None:
    """Attend the rows of `parts`, which follow each other, in one launch."""
    work = inputs.tile_work(layer.tables, parts[0].tiles[0], parts[-1].tiles[1])
    tile_attention(q, layer.keys, layer.values, work, out, **layer.settings)


def in_tiles_of(
    part: PromptPart,
    q: torch.Tensor,
    out: torch.Tensor,
    layer: Layer,
    inputs: DeviceInputs,
    keys: torch.Tensor,
    values: torch.Tensor,
    begin: int,
) -> None:
    """Attend the rows of one part to keys and values side by side, from position `begin` on, the first of a block."""
    work = inputs.tile_work(layer.tables, *part.tiles)
    blocks = torch.arange(-(-len(keys) // layer.block_size), device=q.device)
    side_by_side = replace(work, blocks=blocks, first=torch.full_like(work.first, -begin // layer.block_size))
    tile_attention(q, keys, values, side_by_side, out, **layer.settings)
