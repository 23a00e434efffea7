"""What one forward pass works on: packed rows of several sequences.

First the *decode* rows (entries of one token), longest context first, then the *prefill* chunks. The packing is a
function of the entries alone: a suspended pass is packed exactly like one that is not. Where kernels of a GPU read it,
the rows may be padded to a bucket's (`executor/graphs`); padding rows have no slot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from qllm.executor.errors import PassError
from qllm.executor.gpu.pass_inputs import STEP_KEYS, DeviceInputs, HostInputs, PromptPart
from qllm.executor.model.kv_cache import PagedKVCache, Rings


@dataclass(eq=False)
class Sequence:
    """One sequence as the executor sees it."""

    tokens: list[int]  #: prompt and generated token ids
    blocks: list[int] = field(default_factory=list)  #: the engine's; `ceil((computed + n) / block_size)` for n tokens
    computed: int = 0  #: leading tokens whose KV is stored
    ring: list[int] = field(default_factory=list)  #: blocks of layers that keep a window; see `Rings`
    recurrent: Any = None  #: state of recurrent layers after these tokens, a cache of transformers; None: has none


@dataclass(frozen=True)
class Entry:
    """`n` tokens of `seq` from position `start` on, in rows `row` to `row + n` of the packed input."""

    seq: Sequence
    n: int
    start: int
    row: int

    @property
    def samples(self) -> bool:
        """Whether the pass reaches the sequence's last token, so that its last row gives the next one."""
        return self.start + self.n == len(self.seq.tokens)

    def keys_seen(self, window: int | None) -> np.ndarray:
        """Keys that each row attends to, int64 `[n]`, with that sliding window (tokens, the token itself included)."""
        keys = np.arange(self.start + 1, self.start + self.n + 1)
        return keys if window is None else np.minimum(keys, window)


class Batch:
    """The packed rows of one pass over the next n tokens of each sequence, on the cache's device. Raises PassError.

    `place` brings them there; until then they are on the host alone. With `padding` there may be no sequence, and a
    bucket's padding is all that is computed.
    """

    input_ids: torch.Tensor  #: int64 `[1, rows]`
    position_ids: torch.Tensor  #: int64 `[1, rows]`
    slots: torch.Tensor  #: int64 `[rows]`: where each row's KV goes
    ring_slots: torch.Tensor  #: int64 `[n]`: where it goes in layers that keep a window ...
    ring_rows: torch.Tensor | None  #: int64 `[n]`: ... of these rows alone; None: of all
    sample_rows: torch.Tensor  #: int64 `[len(sampled)]`

    def __init__(
        self,
        entries: Iterable[tuple[Sequence, int]],
        cache: PagedKVCache,
        *,
        max_positions: int | None = None,
        padding: bool = False,
    ):
        pairs = list(entries)
        for seq, n in pairs:
            check_entry(seq, n, cache, max_positions)
        if len({id(seq) for seq, _ in pairs}) != len(pairs) or not (pairs or padding):
            raise PassError("a pass needs at least one entry, and each sequence at most once")
        # Stable order: the same batch is packed the same way whatever happens around it.
        pairs.sort(key=lambda p: (p[1] > 1, -p[0].computed if p[1] == 1 else 0))
        found: list[Entry] = []
        row = 0
        for seq, n in pairs:
            found.append(Entry(seq, n, seq.computed, row))
            row += n
        self.cache = cache
        self.entries = found  #: in the order of their rows
        self.rows = row
        self.n_decode = sum(entry.n == 1 for entry in self.entries)  #: they come first
        self.prefill_cells = sum(int(e.keys_seen(None).sum()) for e in self.entries[self.n_decode :])
        self.sampled = [entry for entry in self.entries if entry.samples]  #: their last rows give a token
        self.inputs: DeviceInputs | None = None  #: what kernels of a GPU read; None where there are none
        self.has_idle_rows = False  #: whether no attention writes some rows
        self.prompt_parts: tuple[PromptPart, ...] = ()  #: the prefill rows, as these kernels attend them

    def place(self) -> None:
        """Bring the rows to the cache's device, one tensor for each kind of number."""
        ids, positions, slots = [], [], []
        for e in self.entries:
            stop = e.start + e.n
            ids.append(np.asarray(e.seq.tokens[e.start : stop], dtype=np.int64))
            positions.append(np.arange(e.start, stop))
            slots.append(self.slots_of(e, e.start, stop))
        self.input_ids = self.to_device(np.concatenate(ids)).unsqueeze(0)
        self.position_ids = self.to_device(np.concatenate(positions)).unsqueeze(0)
        self.slots = self.to_device(np.concatenate(slots))
        self.sample_rows = self.to_device(np.array([e.row + e.n - 1 for e in self.sampled], dtype=np.int64))
        if self.cache.rings is not None:
            kept = np.concatenate([self.in_ring(self.cache.rings, e) for e in self.entries])
            rows = np.flatnonzero(kept >= 0)
            self.ring_slots = self.to_device(kept[rows])
            self.ring_rows = None if len(rows) == self.rows else self.to_device(rows)

    def slots_of(self, e: Entry, start: int, stop: int, window: int | None = None) -> np.ndarray:
        """Slots of positions `start` to `stop` of its sequence in a layer with that window, int64 `[stop - start]`."""
        return self.cache.slots(e.seq.blocks, e.seq.ring, start, stop, window)

    def in_ring(self, rings: Rings, e: Entry) -> np.ndarray:
        """Slots of an entry's rows where a window is kept, int64 `[n]`; -1 for rows that its last ones overwrite."""
        stop, slots = e.start + e.n, np.full(e.n, -1)
        kept = min(e.n, self.cache.ring_tokens)
        slots[e.n - kept :] = self.slots_of(e, stop - kept, stop, rings.window)
        return slots

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, window: int | None) -> None:
        """Store what a layer with that window keeps of the rows, `[T, kv_heads, width]` each."""
        if not self.cache.in_rings(window):
            self.cache.write(layer, self.slots, key, value)
        elif self.ring_rows is None:
            self.cache.write(layer, self.ring_slots, key, value, window=window)
        else:
            key, value = (t.index_select(0, self.ring_rows) for t in (key, value))
            self.cache.write(layer, self.ring_slots, key, value, window=window)

    @property
    def decode_rows(self) -> int:
        """Rows before those of prompts, padding included."""
        return self.n_decode if self.inputs is None else self.inputs.room.decode

    def read_from(self, inputs: DeviceInputs) -> None:
        """Take the rows from `inputs`, which kernels of a GPU read, too."""
        self.inputs = inputs
        self.input_ids, self.position_ids = inputs.ids.unsqueeze(0), inputs.positions.unsqueeze(0)
        self.slots, self.sample_rows = inputs.slots, inputs.samples

    def make_room(self, decode: int) -> None:
        """Let the prefill rows begin at row `decode`: padding rows lie between them and those that decode."""
        shift = decode - self.n_decode
        self.entries = [e if i < self.n_decode else replace(e, row=e.row + shift) for i, e in enumerate(self.entries)]
        self.sampled = [entry for entry in self.entries if entry.samples]

    def table_blocks(self) -> int:
        """Numbers in the block tables of the entries, those of rings included."""
        return sum(
            last + (0 if self.cache.rings is None else last - low) for low, last in map(self._reach, self.entries)
        )

    def _reach(self, e: Entry) -> tuple[int, int]:
        """Blocks of its sequence: the first that kernels look up in a layer that keeps a window, and the end."""
        window = 1 if self.cache.rings is None else self.cache.rings.window
        first = max(0, e.start - window + 1) // STEP_KEYS * STEP_KEYS  # kernels step by keys from there on
        return first // self.cache.block_size, -(-(e.start + e.n) // self.cache.block_size)

    def fill(self, host: HostInputs) -> list[tuple[int, int]]:
        """Write the rows and their block tables to `host`; where each entry's table begins, and that of its ring."""
        size, rings, decoding = self.cache.block_size, self.cache.rings, self.entries[: self.n_decode]
        tables = []
        for e in self.entries:
            low, last = self._reach(e)
            table = host.add_blocks(e.seq.blocks[:last])
            tables.append((table, 0 if rings is None else host.add_blocks(rings.table(e.seq.ring, low, last)) - low))
        n = len(decoding)
        host.ids[:n] = [e.seq.tokens[e.start] for e in decoding]
        host.positions[:n] = [e.start for e in decoding]
        host.slots[:n] = [e.seq.blocks[e.start // size] * size + e.start % size for e in decoding]
        for e in self.entries[n:]:
            stop, rows = e.start + e.n, slice(e.row, e.row + e.n)
            host.ids[rows] = e.seq.tokens[e.start : stop]
            host.positions[rows] = np.arange(e.start, stop)
            host.slots[rows] = self.slots_of(e, e.start, stop)
        sampled = [e.row + e.n - 1 for e in self.sampled]
        host.samples[: len(sampled)] = sampled
        host.first[:n], host.length[:n] = [table for table, _ in tables[:n]], host.positions[:n] + 1
        if rings is not None:
            host.ring_first[:n] = [ring for _, ring in tables[:n]]
            host.ring_slots[:n] = [e.seq.ring[e.start // size % rings.size] * size + e.start % size for e in decoding]
            for e in self.entries[n:]:
                host.ring_slots[e.row : e.row + e.n] = self.in_ring(rings, e)
        return tables

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """`array` on the cache's device; on an accelerator through a pinned buffer."""
        tensor = torch.from_numpy(array)
        if self.cache.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.cache.device, non_blocking=True)


def check_entry(seq: Sequence, n: int, cache: PagedKVCache, max_positions: int | None) -> None:
    """Raise PassError unless `n` more tokens of `seq` exist, with blocks of this cache, within the model's reach."""
    stop = seq.computed + n
    if n < 1 or stop > len(seq.tokens):
        raise PassError(f"pass over {n} tokens of a sequence with {seq.computed} of {len(seq.tokens)} tokens computed")
    if len(seq.blocks) * cache.block_size < stop:
        raise PassError(
            f"{stop} tokens need {-(-stop // cache.block_size)} KV blocks, the sequence has {len(seq.blocks)}"
        )
    if min(seq.blocks) < 0 or max(seq.blocks) >= cache.n_blocks:
        raise PassError(f"KV blocks {seq.blocks} are not all within 0..{cache.n_blocks - 1}")
    if cache.rings is not None:
        check_ring(seq, cache.rings, -(-stop // cache.block_size))
    if max_positions is not None and stop > max_positions:
        raise PassError(f"position {stop - 1} is beyond the model's last, {max_positions - 1}")


def check_ring(seq: Sequence, rings: Rings, blocks: int) -> None:
    """Raise PassError unless `seq` has a ring for a sequence of so many blocks, of different ones in the pool."""
    need = rings.need(blocks)
    if len(seq.ring) < need:
        raise PassError(f"layers that keep a window need {need} KV blocks, the sequence has {len(seq.ring)}")
    if min(seq.ring) < 0 or max(seq.ring) >= rings.n_blocks:
        raise PassError(f"KV blocks {seq.ring} are not all within 0..{rings.n_blocks - 1}, where windows are kept")
