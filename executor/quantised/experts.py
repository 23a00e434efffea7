"""Which experts of a model are kept in fewer bits, and what its weights then take."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import cast

import torch
from transformers import PreTrainedConfig

from qllm.executor.cpu.linear import EXPERT_WEIGHTS
from qllm.executor.errors import LoadError, UnsupportedModelError
from qllm.executor.quantised.nf4 import Nf4Weights, nf4_bytes
from qllm.executor.quantised.packed import packed_bytes
from qllm.executor.quantised.weights import QuantisedWeights

#: Of the model's type; quantised to four bits while loading; or as a quantised checkpoint holds them.
EXPERTS = ("plain", "nf4", "packed")

log = logging.getLogger(__name__)


def checked_experts(experts: str) -> str:
    """`experts`, one of EXPERTS. Raises LoadError."""
    if experts not in EXPERTS:
        raise LoadError(f"experts is {experts!r:.80}; allowed: {', '.join(EXPERTS)}")
    return experts


def check_in_memory(experts: str) -> None:
    """Raise LoadError where a model whose weights are no checkpoint's cannot have its experts so."""
    if experts == "packed":
        raise LoadError("experts is 'packed', which needs a quantised checkpoint's weights; allowed here: plain, nf4")


def quantise_experts(model: torch.nn.Module, device: torch.device) -> None:
    """Move a model to `device`, the weights of its experts replaced by NF4 there, one by one. Biases stay plain.

    The plain parameters are taken out of their modules, so their memory is free once nobody else holds them.

    Raises:
        UnsupportedModelError: a weight is NaN or infinite, or packed for another kernel (a model is prepared once).
    """
    for module, name in [*_plain(model)]:
        weights: torch.Tensor = getattr(module, name).detach()
        try:
            kept = Nf4Weights((w.t() if module.is_transposed else w for w in weights), len(weights), device)
        except ValueError as error:
            raise UnsupportedModelError(f"{name} of experts cannot be nf4: {error}, or packed already") from error
        delattr(module, name)
        setattr(module, f"_qllm_{name}", kept)
    model.to(device)


def tell_experts(model: torch.nn.Module) -> None:
    """Log what a model's quantised experts take."""
    kept = sum(module.nbytes for module in model.modules() if isinstance(module, QuantisedWeights))
    told = kept / 1e9, weights_bytes(model) / 1e9
    log.info("experts are %s: %.3f of %.3f GB of weights", experts_form(model), *told)


def experts_form(model: torch.nn.Module) -> str:
    """The form that experts of the model are kept in, such as "nf4" or "fp8"; "plain" where none is."""
    return next((module.form for module in model.modules() if isinstance(module, QuantisedWeights)), "plain")


def weights_bytes(model: torch.nn.Module, experts: str = "plain") -> int:
    """Bytes of the model's weights; once its experts are kept as `experts` says, which they need not be yet.

    Raises LoadError for "packed" where its configuration tells of no quantisation whose experts can stay so.
    """
    kept = sum(module.nbytes for module in model.modules() if isinstance(module, QuantisedWeights))
    total = kept + sum(p.numel() * p.element_size() for p in model.parameters())
    if experts == "plain":
        return total
    for module, name in _plain(model):
        weight: torch.Tensor = getattr(module, name)
        count, outputs, inputs = weight.mT.shape if module.is_transposed else weight.shape
        config = cast(PreTrainedConfig, model.config)
        shape = count, outputs, inputs
        taken = nf4_bytes(*shape) if experts == "nf4" else packed_bytes(config, shape)
        total += taken - weight.numel() * weight.element_size()
    return total


def _plain(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """Modules of experts (transformers' interface sets `is_transposed`), with the names of their plain weights."""
    for module in model.modules():
        for name in EXPERT_WEIGHTS if hasattr(module, "is_transposed") else ():
            weight = getattr(module, name, None)
            if isinstance(weight, torch.nn.Parameter) and weight.dim() == 3:
                yield module, name
