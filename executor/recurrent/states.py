"""What recurrent layers keep of a sequence: tensors of fixed size, in the layers of a cache of transformers.

A sequence has a cache of its own, of one row; the attention layers in it stay empty, since KV is paged. What all
sequences that decode keep in a layer is stacked for one call, and spread over them again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from transformers import DynamicCache, PreTrainedConfig
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


def state_bytes(state: DynamicCache | None) -> int:
    """Bytes of a sequence's state."""
    if state is None:
        return 0
    layers = (layer for layer in state.layers if type(layer) is LinearAttentionLayer)
    return sum(kept[key].nbytes for layer in layers for kept, key in tensors(layer))


def to_host(state: DynamicCache | None) -> None:
    """Move a sequence's state to host memory, where it is not there."""
    for layer in state.layers if state is not None else ():
        if type(layer) is LinearAttentionLayer:
            layer.offload()


def to_device(state: DynamicCache | None) -> None:
    """Bring it back."""
    for layer in state.layers if state is not None else ():
        if type(layer) is LinearAttentionLayer:
            layer.prefetch()
