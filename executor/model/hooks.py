"""Registers "qllm" with transformers' experts and attention interfaces; what else is fast on a device goes in, too.

Importing it is enough; `set_attn_implementation` and `set_experts_implementation` switch a model over.
"""

from __future__ import annotations

import logging
from collections.abc import Container

import torch
from transformers import AttentionInterface
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


AttentionInterface.register(NAME, attention_forward)
ExpertsInterface.register(NAME, experts_forward)
ExpertsInterface.register(PASS_THROUGH, pass_through)
