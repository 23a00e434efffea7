"""The hook of recurrent layers: transformers' own mixer, called with the state of the sequences that a pass holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from qllm.executor.model.packed_batch import Entry
from qllm.executor.model.passes import RunningPass, current_pass
from qllm.executor.recurrent.states import recurrent_layers, spread, stacked

CACHES = ("cache", "cache_params", "past_key_values")  #: what mixers call the keyword with their state
#: keywords that tell a mixer where sequences begin in packed rows; it gets one sequence at a time
PACKING = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "position_ids"})


def hook_mixers(model: PreTrainedModel) -> int:
    """Have the mixers of a model's recurrent layers keep the state of each sequence apart; how many there are.

    Outside of a pass they do what they did. Hooked twice, they are hooked once.
    """
    found = list(mixers(model))
    for module, cache in found:
        if not isinstance(module.forward, _Mixer):
            module.forward = _Mixer(module, cache)
    return len(found)


def mixers(model: PreTrainedModel) -> Iterator[tuple[torch.nn.Module, str]]:
    """The modules that keep the state of a layer, and what each calls its cache."""
    recurrent = recurrent_layers(model.config)
    for module in model.modules():
        if getattr(module, "layer_idx", None) not in recurrent:
            continue
        if any(getattr(part, "layer_idx", None) is not None for part in module.children()):
            continue  # the decoder layer around it
        if isinstance(module.forward, _Mixer):
            yield module, module.forward.cache
            continue
        cache = cache_keyword(module)
        if cache is not None:
            yield module, cache


def cache_keyword(module: torch.nn.Module) -> str | None:
    """What a module that takes hidden states calls its cache; None for one that does not take both."""
    names = inspect.signature(module.forward).parameters
    return next((name for name in CACHES if name in names), None) if "hidden_states" in names else None


def mix_one_by_one(model: PreTrainedModel) -> bool:
    """Have mixers go on with a prompt one token at a time, as in decoding; whether they did not yet.

    Some begin anew where they get several tokens, whatever their state.
    """
    hooks = [m.forward for m, _ in mixers(model) if isinstance(m.forward, _Mixer) and not m.forward.one_by_one]
    for hook in hooks:
        hook.one_by_one = True
    return bool(hooks)


class _Mixer:
    """In place of a mixer's `forward`."""

    def __init__(self, module: torch.nn.Module, cache: str):
        self.cache = cache
        self.one_by_one = False  #: whether tokens after the first chunk of a prompt go through it one at a time
        self._forward: Callable[..., Any] = module.forward
        self._layer = cast(int, module.layer_idx)
        names = inspect.signature(module.forward).parameters
        self._takes = None if any(p.kind is p.VAR_KEYWORD for p in names.values()) else frozenset(names)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hidden states `[1, T, hidden]` of the packed rows to as many."""
        running = current_pass()
        if running is None:
            return self._forward(hidden_states, *args, **kwargs)
        running.begin_mixer()
        running.reach("attention", 0)
        kwargs = {name: value for name, value in kwargs.items() if name not in PACKING}
        kwargs["attention_mask"] = None
        if self._takes is not None:
            kwargs = {name: value for name, value in kwargs.items() if name in self._takes}
        return self._run(running, hidden_states, kwargs)

    def _run(self, running: RunningPass, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        entries = running.batch.entries
        decoding = [
            e for e in entries[: running.batch.n_decode] if e.start and type(e.seq.recurrent) is DynamicCache
        ]  # what a cache of another class keeps cannot be stacked
        parts, tail = [], None
        if decoding:
            part, tail = self._decode(decoding, hidden, kwargs)
            parts.append((0, part))
        for e in entries[len(decoding) :]:
            step = 1 if self.one_by_one and e.start else e.n
            for row in range(e.row, e.row + e.n, step):
                part, tail = _parts(self._call(hidden[:, row : row + step], e.seq.recurrent, kwargs))
                parts.append((row, part))
        if len(parts) == 1 and parts[0][1].shape[1] == hidden.shape[1]:
            out = parts[0][1]
        else:
            make = hidden.new_zeros if running.batch.has_idle_rows else hidden.new_empty
            out = make((1, hidden.shape[1], parts[0][1].shape[-1]))
            for row, part in parts:
                out[:, row : row + part.shape[1]] = part
        return out if tail is None else (out, *tail)

    def _decode(self, entries: list[Entry], hidden: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """One call for all that decode, whose rows come first: their states stacked, then spread again."""
        layers = [e.seq.recurrent.layers[self._layer] for e in entries]
        if len(layers) == 1:
            return _parts(self._call(hidden[:, :1], entries[0].seq.recurrent, kwargs))
        cache = DynamicCache()
        cache.layers = list(entries[0].seq.recurrent.layers)
        cache.layers[self._layer] = made = stacked(layers)
        part, tail = _parts(self._call(hidden[0, : len(entries), None], cache, kwargs))
        spread(made, layers)
        return part.transpose(0, 1), tail

    def _call(self, hidden: torch.Tensor, cache: DynamicCache, kwargs: dict[str, Any]) -> Any:
        return self._forward(hidden_states=hidden, **kwargs | {self.cache: cache})


def _parts(answer: Any) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
    """Hidden states, and what some mixers return beside them."""
    return (answer[0], answer[1:]) if isinstance(answer, tuple) else (answer, None)
