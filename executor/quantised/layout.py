"""Which weights of a quantised checkpoint transformers is not to read: experts that stay packed, and what it misreads.

transformers' quantisers keep weights packed on some GPUs only, and need kernels from a hub. So transformers loads all
but these (`qllm.executor.quantised.left_out`), expanding what else is quantised; `qllm.executor.quantised.packed` reads
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
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
from qllm.executor.quantised.blocks import MX_BLOCK, scales_shape
from qllm.executor.quantised.left_out import settings_of
from qllm.executor.quantised.packed import FORMS, FP8, POWERS, Form, Header, PackedWeight, block_of, owner_of


def read_apart(
    skeleton: PreTrainedModel, config: PreTrainedConfig, method: str | None, experts: str, headers: Mapping[str, Header]
) -> dict[str, PackedWeight]:
    """Quantised weights that transformers is not to read, by their names in the model.

    Args:
        skeleton: the model, which needs no memory.
        config: its configuration.
        method: by which the checkpoint is quantised; None: by none.
        experts: whether they stay packed ("packed").
        headers: of the checkpoint's files.

    Raises:
        LoadError: weights are not there, or not what the configuration asks for.
    """
    settings = settings_of(config)
    if method not in FORMS:
        return {}
    apart = _misread_linears(skeleton, settings, headers) if method == "fp8" else {}
    if experts == "packed" or (method == "fp8" and _misreads_experts(settings, headers)):
        apart |= _packed_weights(skeleton, method, settings, headers)
    return apart


def _misreads_experts(settings: Mapping[str, Any] | None, headers: Mapping[str, Header]) -> bool:
    """Whether transformers would expand FP8 experts wrongly.

    It reads no scales of experts that lie in one tensor for a layer, as in Mistral Small 4, and knows blocks of equal
    size alone.
    """
    stacked = any(
        header.dtype == FP8.dtype and not name.endswith(".weight") and name + FP8.scales in headers
        for name, header in headers.items()
    )
    return stacked or any(".experts." in name for name in _unequal(settings or {}, headers))


def _unequal(settings: Mapping[str, Any], headers: Mapping[str, Header]) -> list[str]:
    """FP8 weights whose blocks at the end are smaller."""
    block = block_of("fp8", settings)
    return [
        name
        for name, (dtype, shape, _) in headers.items()
        if block is not None and dtype == FP8.dtype and len(shape) == 2 and name + FP8.scales in headers
        # transformers cuts rows and columns into as many equal blocks as there are scales
        if any(size > of and size % of for size, of in zip(shape, block, strict=True))
    ]


def _misread_linears(
    model: PreTrainedModel, settings: Mapping[str, Any], headers: Mapping[str, Header]
) -> dict[str, PackedWeight]:
    """FP8 weights of other layers that transformers would expand wrongly, by their names in the model."""
    found, block, name_of = {}, block_of("fp8", settings), _names(model)
    state = model.state_dict()
    for name in _unequal(settings, headers):
        target, pattern = name_of(name)
        if block is not None and pattern is None and target in state and state[target].dim() == 2:
            outputs, inputs = state[target].shape
            scales = _checked(name, FP8, [], (outputs, inputs), block, headers)
            found[target] = PackedWeight("fp8", (1, outputs, inputs), block, scales in POWERS, [[name]])
    return found


def _packed_weights(
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
    module, leaf = owner_of(model, target)
    if module.is_transposed != (method == "mxfp4"):
        raise LoadError(f"{target}: its inputs lie along rows, which {method} experts that stay packed cannot have")
    weight: torch.Tensor = getattr(module, leaf)
    count, outputs, inputs = weight.mT.shape if module.is_transposed else weight.shape
    whole = len(groups) == len(groups[0]) == 1 and len(headers[groups[0][0]].shape) > 2  # all experts in one tensor
    for group in groups:
        if not whole and len(group) != count:
            raise LoadError(f"{group[0]} and its like: {len(group)} in its files, {count} experts by its config.json")
    lead, size = [count] if whole else [], (outputs // len(groups), inputs)
    block = block_of(method, settings) or size
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
    name_of = _names(model)
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
        target, pattern = name_of(name.removesuffix(form.weight))
        if target in targets:
            found.setdefault(target, {}).setdefault(pattern, []).append(name)
    converters = _converters(model)
    return {target: _ordered(target, by_pattern, converters) for target, by_pattern in found.items()}


def _converters(model: PreTrainedModel) -> list[WeightConverter]:
    return [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightConverter)]


def _names(model: PreTrainedModel) -> Callable[[str], tuple[str, str | None]]:
    """What a weight in a file is called in the model, and the pattern by which it is put together with others."""
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    converters, state = _converters(model), model.state_dict()

    def name_of(name: str) -> tuple[str, str | None]:
        found, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return (name, None) if found not in state and name in state else (found, pattern)

    return name_of


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
