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
from qllm.executor.gpu.pass_inputs import DeviceInputs, HostInputs, PromptPart
from qllm.executor.model.kv_cache import PagedKVCache, slots_of


@dataclass(eq=False)
class Sequence:
    """One sequence as the executor sees it."""

    tokens: list[int]  #: prompt and generated token ids
    blocks: list[int] = field(default_factory=list)  #: the engine's; `ceil((computed + n) / block_size)` for n tokens
    computed: int = 0  #: leading tokens whose KV is stored
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
            slots.append(slots_of(e.seq.blocks, self.cache.block_size, e.start, stop))
        self.input_ids = self.to_device(np.concatenate(ids)).unsqueeze(0)
        self.position_ids = self.to_device(np.concatenate(positions)).unsqueeze(0)
        self.slots = self.to_device(np.concatenate(slots))
        self.sample_rows = self.to_device(np.array([e.row + e.n - 1 for e in self.sampled], dtype=np.int64))

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

    def fill(self, host: HostInputs) -> list[int]:
        """Write the rows and their block tables to `host`; where the tables of the entries begin."""
        size, decoding = self.cache.block_size, self.entries[: self.n_decode]
        tables = [host.add_blocks(e.seq.blocks[: -(-(e.start + e.n) // size)]) for e in self.entries]
        n = len(decoding)
        host.ids[:n] = [e.seq.tokens[e.start] for e in decoding]
        host.positions[:n] = [e.start for e in decoding]
        host.slots[:n] = [e.seq.blocks[e.start // size] * size + e.start % size for e in decoding]
        for e in self.entries[n:]:
            stop, rows = e.start + e.n, slice(e.row, e.row + e.n)
            host.ids[rows] = e.seq.tokens[e.start : stop]
            host.positions[rows] = np.arange(e.start, stop)
            host.slots[rows] = slots_of(e.seq.blocks, size, e.start, stop)
        sampled = [e.row + e.n - 1 for e in self.sampled]
        host.samples[: len(sampled)] = sampled
        host.first[:n], host.length[:n] = tables[:n], host.positions[:n] + 1
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
    if max_positions is not None and stop > max_positions:
        raise PassError(f"position {stop - 1} is beyond the model's last, {max_positions - 1}")
