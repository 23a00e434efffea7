"""The hook of attention that is not packed: transformers' own module, called for one sequence at a time."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from qllm.executor.model.attention_plan import row_groups
from qllm.executor.model.kv_cache import slots_of
from qllm.executor.model.packed_batch import Batch, Entry
from qllm.executor.model.passes import RunningPass, current_pass
from qllm.executor.recurrent.mixers import cache_keyword
from qllm.executor.unpacked.caches import SequenceCache, unpacked_layers

OWN = ("sdpa", "eager")  # attention of transformers that takes any mask
MASKS = frozenset({"causal", "full_attention", "sliding_attention"})  # what models call those of attention


def hook_unpacked(model: PreTrainedModel) -> int:
    """Have attention that keeps more than K and V called for one sequence at a time; how many modules that is.

    Outside of a pass they do what they did. Hooked twice, they are hooked once.
    """
    found = list(unpacked(model))
    layers = DynamicCache(config=model.config).layers
    for module, cache in found:
        if isinstance(module.forward, _Unpacked):
            continue
        number: Any = module.layer_idx
        module.forward = _Unpacked(module, cache, layers[number])
        if hasattr(module, "config"):
            config: Any = copy.copy(module.config)
            own = config._attn_implementation  # noqa: SLF001  # there is no other name for it
            config._attn_implementation_internal = own if own in OWN else OWN[-1]  # noqa: SLF001
            module.config = config
    return len(found)


def unpacked(model: PreTrainedModel) -> Iterator[tuple[torch.nn.Module, str]]:
    """The modules that ask their cache for more than K and V, and what each calls it."""
    layers = unpacked_layers(model.config)
    if not layers:
        return
    borrow = {i for i, of in enumerate(DynamicCache(config=model.config).layers) if isinstance(of, DummyLayer)}
    inside: set[torch.nn.Module] = set()
    for module in model.modules():
        if getattr(module, "layer_idx", None) not in borrow.union(layers) or module in inside:
            continue
        if isinstance(module.forward, _Unpacked):
            inside.update(module.modules())
            yield module, module.forward.cache
            continue
        cache = cache_keyword(module)
        if cache is not None and not isinstance(module, GradientCheckpointingLayer):
            inside.update(module.modules())
            yield module, cache


class PerPart(tuple[Any, ...]):
    """What a module returns beside hidden states, of each part of a pass: the next one gets its own back."""

    holds_activations = True


class _Unpacked:
    """In place of a module's `forward`."""

    def __init__(self, module: torch.nn.Module, cache: str, layer: Any):
        self.cache = cache
        self._forward = module.forward
        self._window: int | None = getattr(layer, "sliding_window", None)
        self._has_kv = not isinstance(layer, DummyLayer)
        self._signature = inspect.signature(module.forward)
        self._attends = "attention_mask" in self._signature.parameters  # others only convolve

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states `[1, T, hidden]` of the packed rows to as many."""
        running = current_pass()
        if running is None:
            return self._forward(*args, **kwargs)
        given = self._arguments(args, kwargs)
        if self._attends:
            if self._has_kv:
                running.begin_layer(self._window)
            else:
                running.begin_mixer()
            running.reach("attention", 0)
        layer, reached = running.attention_layer, 0
        answers = []
        for index, (number, entry) in enumerate(parts(running)):
            if number != reached and self._attends:
                running.reach("attention", number)
                reached = number
            own = self._of(given, running, index, entry)
            slots = all_slots(running.batch, entry.seq)[: entry.start + entry.n]
            own[self.cache] = SequenceCache(running.batch.cache, layer, entry, slots)
            answers.append(self._forward(**own))
        return joined(answers)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        found = self._signature.bind(*args, **kwargs).arguments
        rest = next((n for n, p in self._signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
        return {**found, **found.pop(rest, {})} if rest else found

    def _of(self, given: dict[str, Any], running: RunningPass, index: int, entry: Entry) -> dict[str, Any]:
        """The arguments of one part of the pass."""
        rows = running.batch.rows
        own = {name: part_of(value, index, entry, rows) for name, value in given.items()}
        if self._attends:
            asked = given.get("attention_mask")
            if isinstance(asked, dict):
                mask = causal_mask(entry, self._window, given["hidden_states"])
                own["attention_mask"] = {name: mask if name in MASKS else None for name in asked}
            elif not isinstance(asked, torch.Tensor) or asked.dim() != 2:  # of two dimensions: which rows are padding
                own["attention_mask"] = causal_mask(entry, self._window, given["hidden_states"])
        return own


def parts(running: RunningPass) -> Iterator[tuple[int, Entry]]:
    """The sequences of a pass, chunks of prompts in the groups that the pass is split into: (group, its rows)."""
    batch = running.batch
    yield from ((0, e) for e in batch.entries[: batch.n_decode])
    for number, e, start, stop in row_groups(batch, running.split.query_blocks, None):
        yield number, replace(e, n=stop - start, start=e.start + start, row=e.row + start)


def part_of(value: Any, index: int, entry: Entry, rows: int) -> Any:
    """Of an argument what belongs to one part: rows follow the batch dimension, which is the first of size 1."""
    if isinstance(value, PerPart):
        return value[index]
    if isinstance(value, torch.Tensor):
        dim = 1 + next((i for i, size in enumerate(value.shape) if size == 1), value.dim())
        return value.narrow(dim, entry.row, entry.n) if dim < value.dim() and value.shape[dim] == rows else value
    if isinstance(value, tuple | list):
        return type(value)(part_of(v, index, entry, rows) for v in value)
    if isinstance(value, MutableMapping) and not isinstance(value, dict):  # what layers share, of all sequences so far
        return value.setdefault("parts", {}).setdefault(index, type(value)())
    return value


def joined(answers: list[Any]) -> Any:
    """Hidden states of all rows, and what comes beside them but attention weights, which nobody asks for."""
    if not isinstance(answers[0], tuple):
        return _rows(answers)
    rest = [PerPart(found) if any(f is not None for f in found) else None for found in zip(*answers, strict=True)]
    return (_rows([a[0] for a in answers]), None, *rest[2:])


def _rows(hidden: list[torch.Tensor]) -> torch.Tensor:
    return hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)


def causal_mask(entry: Entry, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """Float `[1, 1, n, keys]` to add to scores: 0 where a row may look, else the least number of `like`'s type."""
    keys = torch.arange(entry.start + entry.n, device=like.device)
    position = torch.arange(entry.start, entry.start + entry.n, device=like.device).unsqueeze(1)
    hidden = keys > position
    if window is not None:
        hidden |= keys <= position - window
    mask = like.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(like.dtype).min)
    return mask[None, None]


_SLOTS: WeakKeyDictionary[Batch, dict[int, torch.Tensor]] = WeakKeyDictionary()


def all_slots(batch: Batch, seq: Any) -> torch.Tensor:
    """Slots of all tokens of a sequence up to its last in the pass, int64; made once a pass."""
    found = _SLOTS.setdefault(batch, {})
    if id(seq) not in found:
        entry = next(e for e in batch.entries if e.seq is seq)
        found[id(seq)] = batch.to_device(slots_of(seq.blocks, batch.cache.block_size, 0, entry.start + entry.n))
    return found[id(seq)]
