"""What one forward pass works on: packed rows of several sequences, and how its attention is cut.

Rows are packed without padding: first the *decode* rows (entries of one token), longest context first, then the
*prefill* chunks. Everything here is a function of the batch alone, never of who waits, so a pass that is suspended is
cut exactly like one that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from qllm.executor.errors import PassError
from qllm.executor.model.kv_cache import PagedKVCache, slots_of
from qllm.executor.model.split import Splitter

PAD_RATIO = 1.25  # decode sequences share one padded gather while the longest is at most this much longer ...
PAD_SLACK = 32  # ... or at most so many tokens longer than the shortest
GATHER_TOKENS = (
    4096  # most tokens in a padded gather on a CPU: far larger ones were 3 to 5 times slower, seen from 16,384
)
BLOCK_ROWS = 256  # query rows in one attention call; its mask hides at most so many keys that are computed for nothing


@dataclass(eq=False)
class SequenceState:
    """One sequence as the executor sees it.

    `tokens`: prompt and generated token ids. `computed`: leading tokens whose KV is stored. `blocks`: block table,
    owned by the engine, which must hold `ceil((computed + n) / block_size)` blocks before a pass over n tokens begins.
    """

    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


@dataclass(frozen=True)
class Entry:
    """`n` tokens of `seq` from position `start` on, in rows `row` to `row + n` of the packed input."""

    seq: SequenceState
    n: int
    start: int
    row: int

    @property
    def samples(self) -> bool:
        """Whether the pass reaches the sequence's last token, so that its last row gives the next one."""
        return self.start + self.n == len(self.seq.tokens)


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
    """Rows `first` to `last` of one prefill chunk, attending over positions `low` to `high` of its sequence.

    `slots` (int64): where the chunk's keys lie in the cache, the same tensor for all its blocks, position `low` at
    `base`; None where all that it sees are rows of this very pass, `low` then is row `base`.
    """

    first: int
    last: int
    position: int  # of the first row
    low: int
    high: int
    base: int
    slots: torch.Tensor | None
    window: int | None

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
    """Decode buckets, and groups of query blocks (number, blocks) with a preemption point before each group but 0.

    The decode rows run with the first group.
    """

    decode: tuple[DecodeBucket, ...]
    groups: tuple[tuple[int, tuple[QueryBlock, ...]], ...]


class Batch:
    """The packed rows of one pass. Tensors live on the cache's device.

    input_ids, position_ids: int64 `[1, rows]`; slots: int64 `[rows]`, where each row's KV goes; sample_rows: int64
    `[len(sampled)]`, the last rows of the entries in `sampled`.
    Raises PassError where the entries and the cache do not fit.
    """

    def __init__(
        self,
        entries: Iterable[tuple[SequenceState, int]],
        cache: PagedKVCache,
        *,
        splitter: Splitter,
        max_positions: int | None = None,
    ):
        pairs = list(entries)
        for seq, n in pairs:
            check_entry(seq, n, cache, max_positions)
        if len({id(seq) for seq, _ in pairs}) != len(pairs) or not pairs:
            raise PassError("a pass needs at least one entry, and each sequence at most once")
        # Stable order: the same batch is packed the same way whatever happens around it.
        pairs.sort(key=lambda p: (p[1] > 1, -p[0].computed if p[1] == 1 else 0))
        self.cache = cache
        self.entries: list[Entry] = []
        row = 0
        for seq, n in pairs:
            self.entries.append(Entry(seq, n, seq.computed, row))
            row += n
        self.rows = row
        self.n_decode = sum(entry.n == 1 for entry in self.entries)
        self.prefill_cells = sum(int(seen(e, None).sum()) for e in self.entries[self.n_decode :])  # query rows x keys
        self.split = splitter(self)
        self.sampled = [entry for entry in self.entries if entry.samples]
        ids, positions, slots = [], [], []
        for e in self.entries:
            stop = e.start + e.n
            ids.append(np.asarray(e.seq.tokens[e.start : stop], dtype=np.int64))
            positions.append(np.arange(e.start, stop))
            slots.append(slots_of(e.seq.blocks, cache.block_size, e.start, stop))
        self.input_ids = self.to_device(np.concatenate(ids)).unsqueeze(0)
        self.position_ids = self.to_device(np.concatenate(positions)).unsqueeze(0)
        self.slots = self.to_device(np.concatenate(slots))
        self.sample_rows = self.to_device(np.array([e.row + e.n - 1 for e in self.sampled], dtype=np.int64))
        self._plans: dict[int | None, AttentionPlan] = {}

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.cache.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.cache.device, non_blocking=True)

    def plan(self, window: int | None) -> AttentionPlan:
        """The attention of a layer with that sliding window (tokens seen, itself included); made once per pass."""
        plan = self._plans.get(window)
        if plan is None:
            plan = self._plans[window] = AttentionPlan(tuple(self._decode(window)), tuple(self._groups(window)))
        return plan

    def _decode(self, window: int | None) -> Iterable[DecodeBucket]:
        lengths = [e.start + 1 if window is None else min(e.start + 1, window) for e in self.entries[: self.n_decode]]
        first = 0
        while first < self.n_decode:
            width = lengths[first]  # the longest: decode rows are sorted by context
            last = first + 1
            rows = self.n_decode if self.cache.device.type != "cpu" else first + max(1, GATHER_TOKENS // width)
            while last < min(self.n_decode, rows) and width <= max(
                lengths[last] * PAD_RATIO, lengths[last] + PAD_SLACK
            ):
                last += 1
            slots = np.full((last - first, width), self.cache.zero_slot)
            for i, (e, length) in enumerate(zip(self.entries[first:last], lengths[first:last], strict=True)):
                slots[i, :length] = slots_of(e.seq.blocks, self.cache.block_size, e.start + 1 - length, e.start + 1)
            mask = None
            if lengths[last - 1] < width:
                seen = np.arange(width) < np.array(lengths[first:last])[:, None]
                mask = self.to_device(seen).view(last - first, 1, 1, width)
            yield DecodeBucket(first, last, width, self.to_device(slots.reshape(-1)), mask)
            first = last

    def _groups(self, window: int | None) -> Iterable[tuple[int, tuple[QueryBlock, ...]]]:
        """Query blocks in `cut.pieces` groups, at most, of about as many cells each; (number of the group, blocks)."""
        prefills = self.entries[self.n_decode :]
        if not prefills:
            return
        cells = np.concatenate([seen(e, window) for e in prefills])
        before = cells.cumsum() - cells
        piece = before * self.split.query_blocks // max(1, int(cells.sum()))
        first = prefills[0].row
        groups: dict[int, list[QueryBlock]] = {}
        for e in prefills:
            of_row = piece[e.row - first : e.row - first + e.n]
            chunk = self._chunk(e, window)
            starts = [0, *(np.flatnonzero(np.diff(of_row)) + 1).tolist(), e.n]
            for start, stop in pairwise(starts):
                blocks = groups.setdefault(int(of_row[start]), [])
                blocks += [chunk(a, min(a + BLOCK_ROWS, stop)) for a in range(start, stop, BLOCK_ROWS)]
        yield from ((number, tuple(blocks)) for number, blocks in groups.items())

    def _chunk(self, e: Entry, window: int | None) -> Callable[[int, int], QueryBlock]:
        """Makes the query block of rows a to b of one chunk."""
        lowest = 0 if window is None else max(0, e.start - window + 1)
        slots, origin = None, e.start - e.row  # the position that base 0 stands for
        if lowest < e.start:
            slots = self.to_device(slots_of(e.seq.blocks, self.cache.block_size, lowest, e.start + e.n))
            origin = lowest

        def block(a: int, b: int) -> QueryBlock:
            position = e.start + a
            low = 0 if window is None else max(0, position - window + 1)
            return QueryBlock(e.row + a, e.row + b, position, low, e.start + b, low - origin, slots, window)

        return block


def seen(e: Entry, window: int | None) -> np.ndarray:
    """Keys that each row of the entry attends to, int64 `[n]`."""
    keys = np.arange(e.start + 1, e.start + e.n + 1)
    return keys if window is None else np.minimum(keys, window)


def check_entry(seq: SequenceState, n: int, cache: PagedKVCache, max_positions: int | None) -> None:
    """Raise PassError unless `n` more tokens of `seq` exist, with blocks of this cache, within the model's reach."""
    stop = seq.computed + n
    if n < 1 or stop > len(seq.tokens):
        raise PassError(f"pass over {n} tokens of a sequence with {seq.computed} of {len(seq.tokens)} tokens computed")
    if len(seq.blocks) * cache.block_size < stop:
        raise PassError(
            f"{stop} tokens need {-(-stop // cache.block_size)} KV blocks, the sequence has {len(seq.blocks)}"
        )
    if any(not 0 <= b < cache.n_blocks for b in seq.blocks):
        raise PassError(f"KV blocks {seq.blocks} are not all within 0..{cache.n_blocks - 1}")
    if max_positions is not None and stop > max_positions:
        raise PassError(f"position {stop - 1} is beyond the model's last, {max_positions - 1}")
