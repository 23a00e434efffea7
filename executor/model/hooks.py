"""Registers "qllm" with transformers' experts and attention interfaces; what else is fast on a device goes in, too.

Importing it is enough; `set_attn_implementation` and `set_experts_implementation` switch a model over.
"""

from __future__ import annotations

import logging
from collections.abc import Container

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from qllm.executor.cpu.hugepages import collapse_anonymous
from qllm.executor.cpu.linear import pack_model
from qllm.executor.model.attention import attention_forward
from qllm.executor.model.experts import experts_forward
from qllm.executor.model.runner import has_kernels

log = logging.getLogger(__name__)

NAME = "qllm"
PASS_THROUGH = "qllm_pass_through"


def pass_through(
    module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts that return their input: with them rounding cannot send a token to another expert."""
    return hidden.clone()


def speed_up(model: torch.nn.Module, called: Container[torch.nn.Module]) -> None:
    """Pack the weights of a float32 model on a CPU; on a GPU make norms and rotary positions one launch each.

    `called`: the modules that a pass calls.
    """
    if pack_model(model, called):
        collapse_anonymous()
    if has_kernels(next(model.parameters()).device):
        from qllm.executor.gpu.fused.norms import fuse_norms  # Triton, which is there with a GPU only
        from qllm.executor.gpu.fused.rotary import fuse_rotary

        norms, rotary = fuse_norms(model), fuse_rotary(model)
        log.info("%d norms and %d rotary functions are one launch each", norms, rotary)


def drop_senses(model: PreTrainedModel, called: Container[torch.nn.Module]) -> None:
    """Take out of a composite model what sees and hears: modules beside its decoder that no pass calls."""
    within = {*model.get_decoder().modules()}
    gone: list[tuple[str, int]] = []

    def search(module: torch.nn.Module, prefix: str) -> None:
        for name, child in [*module.named_children()]:
            if child in within:
                continue
            if any(part in within or part in called for part in child.modules()):
                search(child, f"{prefix}{name}.")
            elif size := sum(weight.nbytes for weight in child.parameters()):
                setattr(module, name, None)
                gone.append((prefix + name, size))

    search(model, "")
    if gone:
        told = ", ".join(f"{name} ({size / 1e9:.2f} GB)" for name, size in gone)
        log.warning("%s: text only; left out: %s", model.config.model_type, told)


AttentionInterface.register(NAME, attention_forward)
ExpertsInterface.register(NAME, experts_forward)
ExpertsInterface.register(PASS_THROUGH, pass_through)
