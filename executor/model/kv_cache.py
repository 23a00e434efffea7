"""Paged KV cache: one K and one V tensor per attention layer, addressed by *slots*.

Block `b` holds slots `b * block_size` to `(b + 1) * block_size - 1`; the scheduler's budget numbers and allocates
blocks. A layer gets the widths of its first write: MLA has different widths of K and V, some models have different head
counts per layer. An engine makes all of them when it starts (`Runner.make_cache`).

Layers with a sliding window may keep the window alone (`Rings`), in blocks of a pool of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from qllm.executor.gpu.host_copies import HostCopies, HostRows

Kept = HostRows | tuple[torch.Tensor, ...]  #: of each store; tensors `[n, heads, width]`


@dataclass(frozen=True)
class HostKV:
    """KV of the first `tokens` positions of one sequence in host memory."""

    tokens: int
    kept: Kept  #: of layers that keep all tokens
    in_window: Kept = ()  #: of layers that keep a window: what the next token sees of it

    @property
    def nbytes(self) -> int:
        """Bytes of KV."""
        kept = (self.kept, self.in_window)
        return sum(k.nbytes if isinstance(k, HostRows) else sum(t.nbytes for t in k) for k in kept)


@dataclass(frozen=True)
class Rings:
    """How layers with a sliding window keep KV: of each sequence in a *ring* of blocks, in a pool of their own.

    Position p lies in block `ring[p // block_size % size]`. A ring grows block by block up to `size`. From then on a
    token overwrites the one `size` blocks before it, which no later token sees: a full ring holds at least the window.
    """

    n_blocks: int  #: of all sequences
    size: int  #: blocks of a full ring
    window: int  #: the largest of these layers, in tokens, the token itself included

    def need(self, blocks: int) -> int:
        """Blocks of the ring of a sequence that takes `blocks` where all tokens are kept."""
        return min(blocks, self.size)

    def table(self, ring: list[int], first: int, last: int) -> list[int]:
        """Blocks `first` to `last` of a sequence as a block table: they repeat where its ring comes round."""
        if last <= self.size:
            return ring[first:last]
        start, n = first % self.size, last - first
        return (ring[: self.size] * (2 + n // self.size))[start : start + n]


def slots_of(blocks: Sequence[int], block_size: int, start: int, stop: int) -> np.ndarray:
    """Slots of positions `start <= p < stop` of a sequence with block table `blocks`, int64 `[stop - start]`."""
    first, last = start // block_size, -(-stop // block_size)
    table = np.asarray(blocks[first:last], dtype=np.int64)
    slots = (table[:, None] * block_size + np.arange(block_size)).reshape(-1)
    return slots[start - first * block_size : stop - first * block_size]


class PagedKVCache:
    """K and V of every layer in `n_blocks * block_size` slots, and one more that is always zero.

    It pads short sequences in a gather: a masked slot must not hold another sequence's NaN, since 0 * NaN is NaN.
    """

    def __init__(self, n_blocks: int, block_size: int, device: torch.device | str = "cpu", rings: Rings | None = None):
        if n_blocks < 1 or block_size < 1:
            raise ValueError(f"kv cache: n_blocks {n_blocks} and block_size {block_size} must be at least 1")
        if rings is not None and rings.size * block_size < rings.window:
            raise ValueError(f"kv cache: rings of {rings.size} blocks must hold the window, {rings.window} tokens")
        self.n_blocks = n_blocks
        self.block_size = block_size
        self.device = torch.device(device)
        self.zero_slot = n_blocks * block_size
        self.rings = rings  #: None: all layers keep all tokens
        self.keys: list[torch.Tensor] = []  #: a tensor for each layer so far, `[slots + 1, kv_heads, width]`
        self.values: list[torch.Tensor] = []  #: the same
        self.ringed: set[int] = set()  #: the layers so far that keep a window
        self.indexes: dict[int, torch.Tensor] = {}  #: keys of an index, `[slots + 1, 1, width]`, of some layers
        self._copies: HostCopies | None = None

    @property
    def ring_tokens(self) -> int:
        """Tokens that a full ring holds."""
        return 0 if self.rings is None else self.rings.size * self.block_size

    def in_rings(self, window: int | None) -> bool:
        """Whether a layer with that sliding window (tokens) keeps no more than a ring of each sequence."""
        return self.rings is not None and window is not None and window <= self.rings.window

    def slots(self, blocks: Sequence[int], ring: list[int], start: int, stop: int, window: int | None) -> np.ndarray:
        """Slots of positions `start` to `stop` of a sequence in a layer with that window, int64 `[stop - start]`."""
        if self.rings is None or not self.in_rings(window):
            return slots_of(blocks, self.block_size, start, stop)
        first, last = start // self.block_size, -(-stop // self.block_size)
        before = first * self.block_size
        return slots_of(self.rings.table(ring, first, last), self.block_size, start - before, stop - before)

    def masked_slot(self, window: int | None) -> int:
        """The slot of a layer with that window that is always zero."""
        if self.rings is None or not self.in_rings(window):
            return self.zero_slot
        return self.rings.n_blocks * self.block_size

    def layer(
        self, index: int, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of layer `index`, `[slots + 1, kv_heads, width]`; made at first use, like `key` and `value`."""
        if index == len(self.keys):
            slots = self.masked_slot(window) + 1
            # Both before either is kept: where memory ends between them, the layer is not there and can be made later.
            made = [torch.zeros((slots, *t.shape[1:]), dtype=t.dtype, device=t.device) for t in (key, value)]
            self.keys.append(made[0])
            self.values.append(made[1])
            if self.in_rings(window):
                self.ringed.add(index)
        return self.keys[index], self.values[index]

    def write(
        self, index: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
    ) -> None:
        """Store `key`, `value` (`[T, kv_heads, width]`) of layer `index` in `slots` (int64 `[T]`)."""
        for store, new in zip(self.layer(index, key, value, window=window), (key, value), strict=True):
            store.flatten(1).index_copy_(0, slots, new.flatten(1))

    def read(self, index: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of layer `index` in `slots` (int64 `[n]`), each `[n, kv_heads, width]`."""
        return gather(self.keys[index], slots), gather(self.values[index], slots)

    def write_index(self, index: int, slots: torch.Tensor, key: torch.Tensor) -> None:
        """Store keys of the index of layer `index`, `[T, 1, width]`, in `slots` (int64 `[T]`)."""
        if index not in self.indexes:
            self.indexes[index] = torch.zeros((self.zero_slot + 1, *key.shape[1:]), dtype=key.dtype, device=key.device)
        self.indexes[index].flatten(1).index_copy_(0, slots, key.flatten(1))

    def read_index(self, index: int, slots: torch.Tensor) -> torch.Tensor:
        """Keys of the index of layer `index` in `slots` (int64 `[n]`), `[n, 1, width]`."""
        return gather(self.indexes[index], slots)

    @property
    def stores(self) -> tuple[torch.Tensor, ...]:
        """All that is kept of tokens, each `[slots + 1, heads, width]`."""
        return (*self._stores(in_rings=False), *self._stores(in_rings=True))

    def _stores(self, *, in_rings: bool) -> tuple[torch.Tensor, ...]:
        own = [i for i in range(len(self.keys)) if (i in self.ringed) is in_rings]
        found = [store[i] for store in (self.keys, self.values) for i in own]
        found += [] if in_rings else self.indexes.values()
        return tuple(store for store in found if store.shape[-1])  # some attention has no V of its own, or no K

    def token_bytes(self, *, in_rings: bool = False) -> int:
        """Bytes of a token in the layers that keep all of them, or in those that keep a window; 0 before a pass."""
        return sum(t[0].nbytes for t in self._stores(in_rings=in_rings))

    def ring_of(self, tokens: int, number: int = 0) -> list[int]:
        """Blocks of a ring for `tokens` tokens of a sequence made by hand, the `number`-th: no two are in one place."""
        if self.rings is None:
            return []
        first = number * self.rings.size
        return [*range(first, first + self.rings.need(-(-tokens // self.block_size)))]

    def offload(self, blocks: Sequence[int], tokens: int, ring: list[int] | None = None) -> HostKV:
        """Copy the first `tokens` positions of the sequence in `blocks` to host memory; of its `ring` what is in reach.

        On CUDA to pinned memory, while passes and the host go on; `blocks` and `ring` may be given to others at once.
        """
        if self._copies is None and self.device.type == "cuda":
            self._copies = HostCopies.on(self.device)
        return HostKV(
            tokens, *(self._offload(stores, slots) for stores, slots in self._moved(blocks, tokens, ring or []))
        )

    def restore(self, host: HostKV, blocks: Sequence[int], ring: list[int] | None = None) -> None:
        """Bring an offloaded sequence back into `blocks` and `ring` (others than before, in general).

        On CUDA the next pass waits for the copy, the host does not; `host` may be dropped at once.
        """
        moved = self._moved(blocks, host.tokens, ring or [])
        for (stores, slots), kept in zip(moved, (host.kept, host.in_window), strict=False):
            if isinstance(kept, tuple):
                for store, rows in zip(stores, kept, strict=True):
                    store.flatten(1).index_copy_(0, slots, rows.to(self.device).flatten(1))
            elif self._copies is not None:
                self._copies.restore(kept, stores, slots)

    def _offload(self, stores: tuple[torch.Tensor, ...], slots: torch.Tensor) -> Kept:
        if self._copies is not None and len(slots):
            return self._copies.offload(stores, slots)
        return tuple(gather(store, slots).to("cpu") for store in stores)

    def _moved(
        self, blocks: Sequence[int], tokens: int, ring: list[int]
    ) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
        """The stores and slots of a sequence of `tokens` tokens: first where all are kept, then in rings."""
        yield self._stores(in_rings=False), self._to_device(self.slots(blocks, ring, 0, tokens, None))
        if self.rings is not None:
            first = max(0, tokens - self.rings.window + 1)  # that the next token sees
            found = self.slots(blocks, ring, first, tokens, self.rings.window)
            yield self._stores(in_rings=True), self._to_device(found)

    def _to_device(self, found: np.ndarray) -> torch.Tensor:
        slots = torch.from_numpy(found)
        return (slots.pin_memory() if self.device.type == "cuda" else slots).to(self.device, non_blocking=True)


def gather(store: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`store[slots]` for `store` `[slots, kv_heads, width]`, as whole rows."""
    # Over three dimensions, or by index_select, the copy takes several times as long on a CPU.
    return F.embedding(slots, store.flatten(1)).view(len(slots), *store.shape[1:])
