"""How the attention of a pass is computed: buckets of decode rows, and blocks of prefill rows in groups.

Where kernels of a GPU attend (`qllm.executor.gpu.packed_attention`), parts of prefill chunks and their tiles instead.

A plan is a function of the batch and its split alone: a suspended pass is planned exactly like one that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import torch

from qllm.executor.gpu.pass_inputs import (
    SPLIT,
    TILE_ROWS,
    DeviceInputs,
    HostInputs,
    PromptPart,
    Room,
    fill_parts,
)
from qllm.executor.model.packed_batch import Batch, Entry

PAD_RATIO = 1.25  # decode sequences share one padded gather while the longest is at most this much longer ...
PAD_SLACK = 32  # ... or at most so many tokens longer than the shortest
#: Most tokens in a padded gather on a CPU: far larger ones were 3 to 5 times slower, seen from 16,384.
GATHER_TOKENS = 4096
BLOCK_ROWS = 256  # query rows in one attention call; its mask hides at most so many keys that are computed for nothing


@dataclass(frozen=True)
class DecodeBucket:
    """Decode rows `first` to `last`, attending over `slots` (int64 `[rows * width]`), of which `mask` allows some."""

    first: int
    last: int
    width: int
    slots: torch.Tensor
    mask: torch.Tensor | None  # bool [rows, 1, 1, width], None where every row is full


@dataclass(frozen=True)
class QueryBlock:
    """Rows `first` to `last` of one prefill chunk, attending over positions `low` to `high` of its sequence."""

    first: int
    last: int
    position: int  # of the first row
    low: int
    high: int
    base: int  #: where position `low` is in `slots`; without them the row that it is
    slots: torch.Tensor | None  #: int64, of the chunk's keys, shared by its blocks; None: all are rows of this pass
    window: int | None
    own: slice | None = None  #: rows of this pass that follow what lies in `slots`: where they may be overwritten

    @property
    def seen(self) -> slice:
        """Positions `low` to `high`, counted as `base` is."""
        return slice(self.base, self.base + self.high - self.low)

    @property
    def square(self) -> bool:
        """Whether the rows are the keys, no window cuts in, and there is more than one: plain causal attention."""
        rows = self.last - self.first
        return rows == self.high - self.low > 1 and (self.window is None or rows <= self.window)

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """bool `[rows, high - low]`, True where a row may look; None for one row, which sees all of them."""
        rows = self.last - self.first
        if rows == 1:
            return None
        ahead = torch.arange(self.low - self.position, self.high - self.position, device=device)
        behind = torch.arange(rows, device=device).unsqueeze(1)
        mask = ahead <= behind
        if self.window is not None:
            mask &= ahead > behind - self.window
        return mask


@dataclass(frozen=True)
class AttentionPlan:
    """Decode rows, which run with the first group, and query blocks as (group, blocks); a point before each but 0."""

    decode: tuple[DecodeBucket, ...]
    block_groups: tuple[tuple[int, tuple[QueryBlock, ...]], ...]

    def contexts(self) -> list[torch.Tensor]:
        """Slots of the chunks whose context is read before their rows are written."""
        found = (block.slots for _, blocks in self.block_groups for block in blocks if block.own is not None)
        return list({id(slots): slots for slots in found if slots is not None}.values())


def plan_attention(batch: Batch, query_blocks: int, window: int | None) -> AttentionPlan:
    """The attention of a layer with that window (tokens, itself included), in at most `query_blocks` prefill groups."""
    return AttentionPlan(tuple(_decode_buckets(batch, window)), tuple(_block_groups(batch, query_blocks, window)))


def _decode_buckets(batch: Batch, window: int | None) -> Iterable[DecodeBucket]:
    cache, entries = batch.cache, batch.entries[: batch.n_decode]
    lengths = [e.start + 1 if window is None else min(e.start + 1, window) for e in entries]
    first = 0
    while first < len(entries):
        width = lengths[first]  # the longest: decode rows are sorted by context
        last = first + 1
        rows = len(entries) if cache.device.type != "cpu" else first + max(1, GATHER_TOKENS // width)
        while last < min(len(entries), rows) and width <= max(lengths[last] * PAD_RATIO, lengths[last] + PAD_SLACK):
            last += 1
        slots = np.full((last - first, width), cache.masked_slot(window))
        for i, (e, length) in enumerate(zip(entries[first:last], lengths[first:last], strict=True)):
            slots[i, :length] = batch.slots_of(e, e.start + 1 - length, e.start + 1, window)
        mask = None
        if lengths[last - 1] < width:
            seen = np.arange(width) < np.array(lengths[first:last])[:, None]
            mask = batch.to_device(seen).view(last - first, 1, 1, width)
        yield DecodeBucket(first, last, width, batch.to_device(slots.reshape(-1)), mask)
        first = last


def _block_groups(batch: Batch, query_blocks: int, window: int | None) -> Iterable[tuple[int, tuple[QueryBlock, ...]]]:
    groups: dict[int, list[QueryBlock]] = {}
    for e, of_entry in groupby(row_groups(batch, query_blocks, window), lambda found: found[1]):
        chunk = _chunk(batch, e, window)
        for number, _, start, stop in of_entry:
            blocks = groups.setdefault(number, [])
            blocks += [chunk(a, min(a + BLOCK_ROWS, stop)) for a in range(start, stop, BLOCK_ROWS)]
    yield from ((number, tuple(blocks)) for number, blocks in groups.items())


def row_groups(batch: Batch, query_blocks: int, window: int | None) -> Iterator[tuple[int, Entry, int, int]]:
    """Rows of prefill chunks in at most `query_blocks` groups of about as many cells (query rows x keys) each.

    Gives (group, entry, start, stop): rows `start` to `stop` of the entry's own. A group's number is that of a point;
    groups without rows are left out.
    """
    prefills = batch.entries[batch.n_decode :]
    if not prefills:
        return
    cells = np.concatenate([e.keys_seen(window) for e in prefills])
    before = cells.cumsum() - cells
    group = before * query_blocks // max(1, int(cells.sum()))
    first = 0
    for e in prefills:
        of_row = group[first : first + e.n]
        first += e.n
        for start, stop in pairwise([0, *(np.flatnonzero(np.diff(of_row)) + 1).tolist(), e.n]):
            yield int(of_row[start]), e, start, stop


def place_for_kernels(batch: Batch, query_blocks: int) -> None:
    """Bring the batch to the device for the kernels of a GPU: in one copy, without padding."""
    found = list(row_groups(batch, query_blocks, None))
    tiles = sum(-(-(stop - start) // TILE_ROWS) for _, _, start, stop in found)
    rings = batch.cache.rings is not None
    room = Room(batch.rows, batch.n_decode, tiles, len(batch.sampled), batch.table_blocks(), rings)
    host, inputs = HostInputs(room, batch.cache.device), DeviceInputs(room, batch.cache.device)
    batch.prompt_parts = fill(batch, host, query_blocks)
    inputs.load(host)
    batch.read_from(inputs)


def fill(batch: Batch, host: HostInputs, query_blocks: int) -> tuple[PromptPart, ...]:
    """Write rows, block tables, parts of decode rows and tiles of prompts to `host`; the parts of prompts."""
    tables = dict(zip(map(id, batch.entries), batch.fill(host), strict=True))
    fill_parts(host, SPLIT)
    parts: list[PromptPart] = []
    tile = 0
    for number, e, start, stop in row_groups(batch, query_blocks, None):
        rows = np.arange(start, stop, TILE_ROWS)
        at = slice(tile, tile + len(rows))
        host.tile_row[at], host.tile_rows[at] = e.row + rows, np.minimum(stop - rows, TILE_ROWS)
        table, ring = tables[id(e)]
        host.tile_position[at], host.tile_first[at] = e.start + rows, table
        if host.room.rings:
            host.ring_tile_first[at] = ring
        span = (e.row + start, e.row + stop, e.start + start)
        parts.append(PromptPart(number, *span, table, e.row, e.row + e.n, (at.start, at.stop), ring))
        tile += len(rows)
    return tuple(parts)


def _chunk(batch: Batch, e: Entry, window: int | None) -> Callable[[int, int], QueryBlock]:
    """Makes the query block of rows a to b of one chunk."""
    lowest = 0 if window is None else max(0, e.start - window + 1)
    slots, own, origin = None, None, e.start - e.row  # the position that base 0 stands for
    if lowest < e.start:
        own = slice(e.row, e.row + e.n) if batch.cache.in_rings(window) else None
        stop = e.start + e.n if own is None else e.start
        slots = batch.to_device(batch.slots_of(e, lowest, stop, window))
        origin = lowest

    def block(a: int, b: int) -> QueryBlock:
        position = e.start + a
        low = 0 if window is None else max(0, position - window + 1)
        return QueryBlock(e.row + a, e.row + b, position, low, e.start + b, low - origin, slots, window, own)

    return block
