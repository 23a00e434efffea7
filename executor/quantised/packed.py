"""Experts as a checkpoint holds them: which of its weights stay packed, and reading them.

transformers' quantisers keep weights packed on some GPUs only, and need kernels from a hub. So transformers loads all
but these experts (`qllm.executor.quantised.left_out`), expanding whatever else is quantised, and these are read here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from qllm.executor.cpu.linear import EXPERT_WEIGHTS
from qllm.executor.errors import LoadError
from qllm.executor.quantised.blocks import MX_BLOCK, BlockWeights, block_bytes, scales_shape
from qllm.executor.quantised.left_out import settings_of


class Header(NamedTuple):
    """What a file tells of a tensor, and which file that is."""

    dtype: str  #: as safetensors names it
    shape: list[int]
    file: Path


class Form(NamedTuple):
    """How files hold weights of a form: their type, what the names end with, and types of scales."""

    dtype: str
    weight: str
    scales: str
    scale_dtypes: tuple[str, ...]


_FP8 = Form("F8_E4M3", "", "_scale_inv", ("F32", "BF16", "F16", "F8_E8M0"))
FORMS = {
    "fp8": _FP8,
    "mxfp8": _FP8._replace(scale_dtypes=("U8", "F8_E8M0")),
    "mxfp4": Form("U8", "_blocks", "_scales", ("U8", "F8_E8M0")),
}
POWERS = {"U8", "F8_E8M0"}  # types of scales that are powers of two


@dataclass(frozen=True)
class PackedWeight:
    """A weight of a layer's experts that stays packed."""

    form: str
    shape: tuple[int, int, int]  #: experts, outputs, inputs
    block: tuple[int, int]
    powers: bool  #: whether its scales are powers of two
    tensors: list[
        list[str]
    ]  #: names of the weights in files that are stacked along outputs, for each expert or for all

    def names(self) -> list[str]:
        """Of the tensors in files that it is made of."""
        form = FORMS[self.form]
        names = [name for of_expert in self.tensors for name in of_expert]
        return names + [name.removesuffix(form.weight) + form.scales for name in names]

    def read(self, tensor: Callable[[str], torch.Tensor], device: torch.device) -> BlockWeights:
        """The weights of all experts, `tensor` by `tensor`."""
        form = FORMS[self.form]
        kept = BlockWeights(self.form, self.shape, self.block, len(self.tensors[0]), self.powers, device)
        for which, names in enumerate(self.tensors):
            for part, name in enumerate(names):
                scales = name.removesuffix(form.weight) + form.scales
                kept.put(which if len(self.tensors) > 1 else slice(None), part, tensor(name), tensor(scales))
        return kept


def packed_bytes(config: PreTrainedConfig, shape: tuple[int, int, int]) -> int:
    """Bytes that a weight of experts takes packed, before files were looked at. Raises LoadError where none can be."""
    settings = settings_of(config)
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method not in FORMS:
        found = f"its weights are quantised ({method})" if settings else "its weights are not quantised"
        raise LoadError(f"experts cannot stay packed: {found}; allowed: {', '.join(FORMS)}, or experts plain or nf4")
    size: tuple[int, int] = shape[1:]
    return block_bytes(method, shape, _block(method, settings) or size, 4 if method == "fp8" else 1)


def _block(method: str, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Outputs and inputs that share a scale; None: all. Raises LoadError."""
    if method == "mxfp4":
        return 1, MX_BLOCK
    block = settings.get("weight_block_size", (1, MX_BLOCK) if method == "mxfp8" else (128, 128))
    if block is None:
        return None
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise LoadError(f"weight_block_size is {block!r:.80}; allowed: two numbers above 0, or null")
    return block[0], block[1]


def has_stacked(headers: Mapping[str, Header]) -> bool:
    """Whether FP8 experts of a layer lie in one tensor, as in Mistral Small 4: transformers reads no scales of such."""
    return any(
        header.dtype == _FP8.dtype and not name.endswith(".weight") and name + _FP8.scales in headers
        for name, header in headers.items()
    )


def packed_weights(
    model: PreTrainedModel, method: str, settings: Mapping[str, Any], headers: Mapping[str, Header]
) -> dict[str, PackedWeight]:
    """Which weights of experts stay packed, by their names in the model; the others are not quantised.

    Args:
        model: needs no memory.
        method: that quantised the checkpoint, one of FORMS.
        settings: what config.json says of it.
        headers: of the checkpoint's files.

    Raises:
        LoadError: they are not there, or are not what `method` and the model's sizes ask for.
    """
    if not headers:
        raise LoadError("experts that stay packed are read from safetensors files, and it has none")
    found = {}
    for target, groups in _groups(model, FORMS[method], headers).items():
        names = [name for group in groups for name in group]
        types = {name: headers[name].dtype for name in names}
        if FORMS[method].dtype not in types.values():
            continue
        if odd := [name for name in names if types[name] != FORMS[method].dtype]:
            raise LoadError(f"{min(odd)} is {types[min(odd)]}; allowed: {FORMS[method].dtype}, as others of its layer")
        found[target] = _packed_weight(model, target, groups, method, settings, headers)
    if not found:
        raise LoadError(f"experts cannot stay packed: none is {method} in its files; allowed: experts plain or nf4")
    return found


def _packed_weight(
    model: PreTrainedModel,
    target: str,
    groups: list[list[str]],
    method: str,
    settings: Mapping[str, Any],
    headers: Mapping[str, Header],
) -> PackedWeight:
    module, leaf = _owner(model, target)
    if module.is_transposed != (method == "mxfp4"):
        raise LoadError(f"{target}: its inputs lie along rows, which {method} experts that stay packed cannot have")
    weight: torch.Tensor = getattr(module, leaf)
    count, outputs, inputs = weight.mT.shape if module.is_transposed else weight.shape
    whole = len(groups) == len(groups[0]) == 1 and len(headers[groups[0][0]].shape) > 2  # all experts in one tensor
    for group in groups:
        if not whole and len(group) != count:
            raise LoadError(f"{group[0]} and its like: {len(group)} in its files, {count} experts by its config.json")
    lead, size = [count] if whole else [], (outputs // len(groups), inputs)
    block = _block(method, settings) or size
    scale_dtypes = {_checked(name, FORMS[method], lead, size, block, headers) for group in groups for name in group}
    tensors = [list(of_expert) for of_expert in zip(*groups, strict=True)]
    return PackedWeight(method, (count, outputs, inputs), block, scale_dtypes <= POWERS, tensors)


def _checked(
    name: str, form: Form, lead: list[int], size: tuple[int, int], block: tuple[int, int], headers: Mapping[str, Header]
) -> str:
    """The type of the scales of a weight, which is as it has to be. Raises LoadError."""
    outputs, inputs = size
    shape = [outputs, inputs]
    if form.weight:
        if inputs % MX_BLOCK:
            raise LoadError(f"{name}: blocks of {MX_BLOCK} do not divide {inputs} inputs")
        shape = [outputs, inputs // MX_BLOCK, MX_BLOCK // 2]
    if headers[name].shape != [*lead, *shape]:
        raise LoadError(f"{name} is {headers[name].shape} in its files and {[*lead, *shape]} by its config.json")
    scales = name.removesuffix(form.weight) + form.scales
    if scales not in headers:
        raise LoadError(f"its files lack {scales}, the scales of {name}")
    dtype, found, _ = headers[scales]
    if dtype not in form.scale_dtypes:
        raise LoadError(f"{scales} is {dtype}; allowed: {', '.join(form.scale_dtypes)}")
    expected = [*lead, *scales_shape(size, block)]
    if found != expected and not prod(found) == prod(expected) == 1:
        raise LoadError(f"{scales} is {found}; allowed: {expected}, one for each block of {list(block)}")
    return dtype


def _groups(model: PreTrainedModel, form: Form, headers: Mapping[str, Header]) -> dict[str, list[list[str]]]:
    """Of each weight of experts the weights in files that it is made of: lists that are stacked, by expert."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    state = model.state_dict()
    targets = {
        f"{path}.{leaf}"
        for path, module in model.named_modules()
        if hasattr(module, "is_transposed")
        for leaf in EXPERT_WEIGHTS
    }
    found: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(headers, key=_natural):
        if name.endswith(form.scales) or not name.endswith(form.weight):
            continue
        stem = name.removesuffix(form.weight)
        target, pattern = rename_source_key(stem, renamings, converters, model.base_model_prefix, state)
        target, pattern = (stem, None) if target not in state and stem in state else (target, pattern)
        if target in targets:
            found.setdefault(target, {}).setdefault(pattern, []).append(name)
    return {target: _ordered(target, by_pattern, converters) for target, by_pattern in found.items()}


def _ordered(
    target: str, by_pattern: dict[str | None, list[str]], converters: list[WeightConverter]
) -> list[list[str]]:
    """The groups in the order in which they are stacked. Raises LoadError where blocks would not stay whole."""
    made = next((each for each in converters if {*by_pattern} <= {*each.source_patterns}), None)
    if made is None:
        return list(by_pattern.values())
    for step in made.operations:
        if not isinstance(step, MergeModulelist) and not (isinstance(step, Concatenate) and step.dim == 1):
            raise LoadError(
                f"{target} cannot stay packed: {type(step).__name__} puts it together; allowed: experts plain"
            )
    return [by_pattern[pattern] for pattern in made.source_patterns if pattern in by_pattern]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts experts by number."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _owner(model: PreTrainedModel, target: str) -> tuple[torch.nn.Module, str]:
    path, _, leaf = target.rpartition(".")
    return model.get_submodule(path), leaf


def read_packed(
    model: PreTrainedModel, weights: Mapping[str, PackedWeight], headers: Mapping[str, Header], device: torch.device
) -> None:
    """Read the weights of experts that stay packed, into a model that was loaded without them."""
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for file in {header.file for header in headers.values()}
        }
        for target, weight in weights.items():
            module, leaf = _owner(model, target)
            setattr(
                module, f"_qllm_{leaf}", weight.read(lambda name: files[headers[name].file].get_tensor(name), device)
            )


def expand_packed(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make plain weights of those that `read_packed` read."""
    kept = [(name, module) for name, module in model.named_modules() if isinstance(module, BlockWeights)]
    for name, weights in kept:
        module, leaf = _owner(model, name)
        plain = torch.stack([weights.expanded(which, dtype) for which in range(len(weights))])
        delattr(module, leaf)
        setattr(module, leaf.removeprefix("_qllm_"), torch.nn.Parameter(plain, requires_grad=False))
