"""What recurrent layers keep of a sequence: tensors of fixed size, in the layers of a cache of transformers.

A sequence has a cache of its own, of one row; the attention layers in it stay empty, since KV is paged. What all
sequences that decode keep in a layer is stacked for one call, and spread over them again.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

#: exact classes of cache layers that are served; subclasses keep more than these do
KNOWN = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, DummyLayer)


def recurrent_layers(config: PreTrainedConfig) -> frozenset[int]:
    """Numbers of the decoder layers that keep a state."""
    layers = DynamicCache(config=config).layers
    return frozenset(i for i, layer in enumerate(layers) if type(layer) is LinearAttentionLayer)


def tensors(layer: LinearAttentionLayer) -> Iterator[tuple[dict[int, torch.Tensor], int]]:
    """Where the tensors of a layer's state stand: (dictionary, key) of each."""
    for kept in vars(layer).values():
        if isinstance(kept, dict):
            yield from ((kept, key) for key, value in kept.items() if isinstance(value, torch.Tensor))


def stacked(layers: Sequence[LinearAttentionLayer]) -> LinearAttentionLayer:
    """One layer with the states of all these, a row each, in copies."""
    made = copy.copy(layers[0])
    for name, kept in vars(layers[0]).items():
        if isinstance(kept, dict):
            rows = [vars(layer)[name] for layer in layers]
            found = {
                key: torch.cat([of[key] for of in rows]) if torch.is_tensor(value) else value
                for key, value in kept.items()
            }
            setattr(made, name, found)
    return made


def spread(made: LinearAttentionLayer, layers: Sequence[LinearAttentionLayer]) -> None:
    """Write the rows of `made` back to the layers that it was stacked from."""
    of_each = [[kept[key] for kept, key in tensors(layer)] for layer in layers]
    for number, (kept, key) in enumerate(tensors(made)):
        torch._foreach_copy_([own[number] for own in of_each], list(kept[key].split(1)))


def keeps_state(config: PreTrainedConfig) -> bool:
    """Whether sequences have a state beside their KV."""
    return any(isinstance(layer, LinearAttentionLayer) for layer in DynamicCache(config=config).layers)


def new_state(model: PreTrainedModel) -> DynamicCache:
    """An empty state of one sequence: a cache of the class that comes with the model, or else a plain one."""
    own = _cache_of(type(model).__module__)
    return DynamicCache(config=model.config) if own is None else own()


@lru_cache
def _cache_of(module: str) -> type[DynamicCache] | None:
    """The class of caches that a module of transformers defines; looked for once, since every request needs one."""
    beside = (found for found in vars(sys.modules[module]).values() if isinstance(found, type))
    return next((found for found in beside if issubclass(found, DynamicCache) and found.__module__ == module), None)


def kept_in(state: DynamicCache | None) -> Iterator[tuple[Any, int]]:
    """Where the tensors of a sequence's state stand: (dictionary or list, key) of each."""
    if state is None:
        return
    for layer in state.layers:
        if isinstance(layer, LinearAttentionLayer):
            yield from tensors(layer)
    for kept in vars(state).values():  # of a cache of the model's own class
        if isinstance(kept, list):
            yield from ((kept, i) for i, value in enumerate(kept) if isinstance(value, torch.Tensor))


def state_bytes(state: DynamicCache | None) -> int:
    """Bytes of a sequence's state."""
    return sum(kept[key].nbytes for kept, key in kept_in(state))


def move_state(state: DynamicCache | None, device: torch.device | str) -> None:
    """Move a sequence's state to that device: to host memory when it is evicted, and back."""
    for kept, key in kept_in(state):
        kept[key] = kept[key].to(device)
