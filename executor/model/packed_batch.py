"""What one forward pass works on: packed rows of several sequences, without padding.

First the *decode* rows (entries of one token), longest context first, then the *prefill* chunks. The packing is a
function of the entries alone: a suspended pass is packed exactly like one that is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from qllm.executor.errors import PassError
from qllm.executor.model.kv_cache import PagedKVCache, slots_of


@dataclass(eq=False)
class Sequence:
    """One sequence as the executor sees it."""

    tokens: list[int]  #: prompt and generated token ids
    blocks: list[int] = field(default_factory=list)  #: the engine's; `ceil((computed + n) / block_size)` for n tokens
    computed: int = 0  #: leading tokens whose KV is stored


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
    """The packed rows of one pass over the next n tokens of each sequence, on the cache's device. Raises PassError."""

    def __init__(
        self, entries: Iterable[tuple[Sequence, int]], cache: PagedKVCache, *, max_positions: int | None = None
    ):
        pairs = list(entries)
        for seq, n in pairs:
            check_entry(seq, n, cache, max_positions)
        if len({id(seq) for seq, _ in pairs}) != len(pairs) or not pairs:
            raise PassError("a pass needs at least one entry, and each sequence at most once")
        # Stable order: the same batch is packed the same way whatever happens around it.
        pairs.sort(key=lambda p: (p[1] > 1, -p[0].computed if p[1] == 1 else 0))
        self.cache = cache
        self.entries: list[Entry] = []  #: in the order of their rows
        row = 0
        for seq, n in pairs:
            self.entries.append(Entry(seq, n, seq.computed, row))
            row += n
        self.rows = row
        self.n_decode = sum(entry.n == 1 for entry in self.entries)  #: they come first
        self.prefill_cells = sum(int(e.keys_seen(None).sum()) for e in self.entries[self.n_decode :])
        self.sampled = [entry for entry in self.entries if entry.samples]  #: their last rows give a token
        ids, positions, slots = [], [], []
        for e in self.entries:
            stop = e.start + e.n
            ids.append(np.asarray(e.seq.tokens[e.start : stop], dtype=np.int64))
            positions.append(np.arange(e.start, stop))
            slots.append(slots_of(e.seq.blocks, cache.block_size, e.start, stop))
        self.input_ids = self.to_device(np.concatenate(ids)).unsqueeze(0)  #: int64 `[1, rows]`
        self.position_ids = self.to_device(np.concatenate(positions)).unsqueeze(0)  #: int64 `[1, rows]`
        self.slots = self.to_device(np.concatenate(slots))  #: int64 `[rows]`: where each row's KV goes
        self.sample_rows = self.to_device(np.array([e.row + e.n - 1 for e in self.sampled], dtype=np.int64))

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
    if any(not 0 <= b < cache.n_blocks for b in seq.blocks):
        raise PassError(f"KV blocks {seq.blocks} are not all within 0..{cache.n_blocks - 1}")
    if max_positions is not None and stop > max_positions:
        raise PassError(f"position {stop - 1} is beyond the model's last, {max_positions - 1}")
