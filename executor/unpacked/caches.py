"""What a layer's own attention sees as its cache: the tokens of one sequence, in the pages of the KV cache.

Sparse attention chooses keys by an index of its own, and some attention looks through a convolution first. Their code
asks a cache of transformers for it, so it gets one that answers from the pages, and from the sequence's state.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from qllm.executor.model.kv_cache import PagedKVCache
from qllm.executor.model.packed_batch import Entry

#: what cache layers call their method that keeps a key of each token for an index, and gives those of all tokens
INDEXES = ("update_indexer", "update_index")
HYBRID = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)


def is_unpacked(layer: Any) -> bool:
    """Whether attention with that cache layer of transformers is called for each sequence alone."""
    plain = type(layer) is DynamicIndexedLayer or (
        DynamicLayer in type(layer).__bases__ and any(hasattr(layer, name) for name in INDEXES)
    )
    return plain or type(layer) in HYBRID


def unpacked_layers(config: PreTrainedConfig) -> dict[int, Any]:
    """The cache layers of the decoder layers whose attention is called for each sequence alone, by their numbers."""
    return {i: layer for i, layer in enumerate(DynamicCache(config=config).layers) if is_unpacked(layer)}


class SequenceCache:
    """The cache of one layer's attention: all tokens of a sequence up to the last of its `entry`."""

    is_compileable = False

    def __init__(self, pages: PagedKVCache, layer: int, entry: Entry, slots: torch.Tensor):
        self._pages, self._layer, self._entry = pages, layer, entry
        self._slots, self._new = slots, slots[entry.start :]
        self.layers = _Each(self)  #: what is asked of a layer is asked of this
        self.keys: torch.Tensor | None = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep K and V of the entry, each `[1, kv_heads, n, width]`; those of all tokens."""
        new = (t[0].transpose(0, 1) for t in (keys, values))
        self._pages.write(self._layer, self._new, *new)
        k, v = (t.transpose(0, 1).unsqueeze(0) for t in self._pages.read(self._layer, self._slots))
        self.keys = k
        return k, v

    def update_indexer(self, keys: torch.Tensor, *_: Any) -> torch.Tensor:
        """Keep the keys of an index, `[1, n, width]` or `[1, 1, n, width]`; those of all tokens."""
        self._pages.write_index(self._layer, self._new, keys.flatten(0, -2).unsqueeze(1))
        found = self._pages.read_index(self._layer, self._slots)[:, 0]
        return found.view(*keys.shape[:-2], *found.shape)

    update_index = update_indexer

    def get_seq_length(self, *_: Any) -> int:
        """Tokens that are kept: those before the entry's, and these too once they are written."""
        return self._entry.start + (self._entry.n if self.keys is not None else 0)

    def get_query_offset(self, *_: Any) -> int:
        """Position of the entry's first token."""
        return self._entry.start

    def get_mask_sizes(self, n: int, *_: Any) -> tuple[int, int]:
        """Keys that `n` rows attend to, and the position of the first."""
        return self._entry.start + n, 0

    def __getattr__(self, name: str) -> Any:
        """What else a cache can do is done by the sequence's state."""
        return getattr(self._entry.seq.recurrent, name)


class _Each:
    """In place of the list of a cache's layers."""

    def __init__(self, cache: SequenceCache):
        self._cache = cache

    def __getitem__(self, index: int) -> SequenceCache:
        return self._cache
