"""Which experts of a model are kept in fewer bits, and what its weights then take."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from qllm.executor.cpu.linear import EXPERT_WEIGHTS
from qllm.executor.errors import LoadError, UnsupportedModelError
from qllm.executor.quantised.nf4 import Nf4Weights, nf4_bytes

EXPERTS = ("plain", "nf4")  #: as the model has them, or four bits a weight

log = logging.getLogger(__name__)


def checked_experts(experts: str) -> str:
    """`experts`, one of EXPERTS. Raises LoadError."""
    if experts not in EXPERTS:
        raise LoadError(f"experts is {experts!r:.80}; allowed: {', '.join(EXPERTS)}")
    return experts


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
    kept_bytes = sum(module.nbytes for module in model.modules() if isinstance(module, Nf4Weights))
    log.info("experts are nf4: %.3f of %.3f GB of weights", kept_bytes / 1e9, weights_bytes(model) / 1e9)


def has_nf4(model: torch.nn.Module) -> bool:
    """Whether experts of the model are kept in NF4."""
    return any(isinstance(module, Nf4Weights) for module in model.modules())


def weights_bytes(model: torch.nn.Module, experts: str = "plain") -> int:
    """Bytes of the model's weights; once its experts are kept as `experts` says, which they need not be yet."""
    kept = sum(module.nbytes for module in model.modules() if isinstance(module, Nf4Weights))
    total = kept + sum(p.numel() * p.element_size() for p in model.parameters())
    if experts == "nf4":
        for module, name in _plain(model):
            weight: torch.Tensor = getattr(module, name)
            count, outputs, inputs = weight.mT.shape if module.is_transposed else weight.shape
            total += nf4_bytes(count, outputs, inputs) - weight.numel() * weight.element_size()
    return total


def _plain(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """Modules of experts (transformers' interface sets `is_transposed`), with the names of their plain weights."""
    for module in model.modules():
        for name in EXPERT_WEIGHTS if hasattr(module, "is_transposed") else ():
            weight = getattr(module, name, None)
            if isinstance(weight, torch.nn.Parameter) and weight.dim() == 3:
                yield module, name
