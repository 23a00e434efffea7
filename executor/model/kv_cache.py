"""Paged KV cache: one K and one V tensor per attention layer, addressed by *slots*.

Block `b` holds slots `b * block_size` to `(b + 1) * block_size - 1`; the scheduler's budget numbers and allocates
blocks. A layer gets the widths of its first write: MLA has different widths of K and V, some models have different head
counts per layer. An engine makes all of them when it starts (`Runner.make_cache`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from qllm.executor.gpu.host_copies import HostCopies, HostRows


@dataclass(frozen=True)
class HostKV:
    """KV of the first `tokens` positions of one sequence in host memory."""

    tokens: int
    kept: HostRows | tuple[torch.Tensor, ...]  #: of each store; tensors `[tokens, heads, width]`

    @property
    def nbytes(self) -> int:
        """Bytes of KV."""
        return self.kept.nbytes if isinstance(self.kept, HostRows) else sum(t.nbytes for t in self.kept)


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

    def __init__(self, n_blocks: int, block_size: int, device: torch.device | str = "cpu"):
        if n_blocks < 1 or block_size < 1:
            raise ValueError(f"kv cache: n_blocks {n_blocks} and block_size {block_size} must be at least 1")
        self.n_blocks = n_blocks
        self.block_size = block_size
        self.device = torch.device(device)
        self.zero_slot = n_blocks * block_size
        self.keys: list[torch.Tensor] = []  #: a tensor for each layer so far, `[slots + 1, kv_heads, width]`
        self.values: list[torch.Tensor] = []  #: the same
        self.indexes: dict[int, torch.Tensor] = {}  #: keys of an index, `[slots + 1, 1, width]`, of some layers
        self._copies: HostCopies | None = None

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of layer `index`, `[slots + 1, kv_heads, width]`; made at first use, like `key` and `value`."""
        if index == len(self.keys):
            # Both before either is kept: where memory ends between them, the layer is not there and can be made later.
            made = [
                torch.zeros((self.zero_slot + 1, *t.shape[1:]), dtype=t.dtype, device=t.device) for t in (key, value)
            ]
            self.keys.append(made[0])
            self.values.append(made[1])
        return self.keys[index], self.values[index]

    def write(self, index: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store `key`, `value` (`[T, kv_heads, width]`) of layer `index` in `slots` (int64 `[T]`)."""
        for store, new in zip(self.layer(index, key, value), (key, value), strict=True):
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
        found = (*self.keys, *self.values, *self.indexes.values())
        return tuple(store for store in found if store.shape[-1])  # some attention has no V of its own, or no K

    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers; 0 before the first pass."""
        return sum(t[0].nbytes for t in self.stores) * self.block_size

    def offload(self, blocks: Sequence[int], tokens: int) -> HostKV:
        """Copy the first `tokens` positions of the sequence in `blocks` to host memory.

        On CUDA to pinned memory, while passes and the host go on; `blocks` may be given to others at once.
        """
        slots, stores = self._slots(blocks, tokens), self.stores
        if self._copies is None and self.device.type == "cuda":
            self._copies = HostCopies.on(self.device)
        if self._copies is not None:
            return HostKV(tokens, self._copies.offload(stores, slots))
        return HostKV(tokens, tuple(gather(store, slots).to("cpu") for store in stores))

    def restore(self, host: HostKV, blocks: Sequence[int]) -> None:
        """Bring an offloaded sequence back into `blocks` (other blocks than before, in general).

        On CUDA the next pass waits for the copy, the host does not; `host` may be dropped at once.
        """
        slots, stores = self._slots(blocks, host.tokens), self.stores
        if isinstance(host.kept, tuple):
            for store, kept in zip(stores, host.kept, strict=True):
                store.flatten(1).index_copy_(0, slots, kept.to(self.device).flatten(1))
        elif self._copies is not None:
            self._copies.restore(host.kept, stores, slots)

    def _slots(self, blocks: Sequence[int], tokens: int) -> torch.Tensor:
        slots = torch.from_numpy(slots_of(blocks, self.block_size, 0, tokens))
        return (slots.pin_memory() if self.device.type == "cuda" else slots).to(self.device, non_blocking=True)


def gather(store: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`store[slots]` for `store` `[slots, kv_heads, width]`, as whole rows."""
    # Over three dimensions, or by index_select, the copy takes several times as long on a CPU.
    return F.embedding(slots, store.flatten(1)).view(len(slots), *store.shape[1:])
