"""Reading weights as a checkpoint holds them, in FP8 and MXFP4."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from qllm.executor.errors import LoadError
from qllm.executor.quantised.blocks import MX_BLOCK, BlockWeights, block_bytes
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


FP8 = Form("F8_E4M3", "", "_scale_inv", ("F32", "BF16", "F16", "F8_E8M0"))
FORMS = {
    "fp8": FP8,
    "mxfp8": FP8._replace(scale_dtypes=("U8", "F8_E8M0")),
    "mxfp4": Form("U8", "_blocks", "_scales", ("U8", "F8_E8M0")),
}
POWERS = {"U8", "F8_E8M0"}  # types of scales that are powers of two


@dataclass(frozen=True)
class PackedWeight:
    """A weight of the model that is read packed: of a layer's experts, or (as if of one expert) of a linear layer."""

    form: str
    shape: tuple[int, int, int]  #: experts, outputs, inputs
    block: tuple[int, int]
    powers: bool  #: whether its scales are powers of two
    tensors: list[list[str]]  #: for each expert, or for all: names of what files stack along outputs

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
    return block_bytes(method, shape, block_of(method, settings) or size, 4 if method == "fp8" else 1)


def block_of(method: str, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Outputs and inputs that share a scale; None: all. Raises LoadError."""
    if method == "mxfp4":
        return 1, MX_BLOCK
    block = settings.get("weight_block_size", (1, MX_BLOCK) if method == "mxfp8" else (128, 128))
    if block is None:
        return None
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise LoadError(f"weight_block_size is {block!r:.80}; allowed: two numbers above 0, or null")
    return block[0], block[1]


def owner_of(model: PreTrainedModel, target: str) -> tuple[torch.nn.Module, str]:
    """The module that a weight of the model belongs to, and its name there."""
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
            module, leaf = owner_of(model, target)
            setattr(
                module, f"_qllm_{leaf}", weight.read(lambda name: files[headers[name].file].get_tensor(name), device)
            )


def expand_packed(model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype) -> None:
    """Make plain weights of these that `read_packed` read."""
    for name in names:
        module, leaf = owner_of(model, name)
        kept: BlockWeights = getattr(module, f"_qllm_{leaf}")
        plain = torch.stack([kept.expanded(which, dtype) for which in range(len(kept))])
        delattr(module, f"_qllm_{leaf}")
        plain = plain if hasattr(module, "is_transposed") else plain.squeeze(0)
        setattr(module, leaf, torch.nn.Parameter(plain, requires_grad=False))
