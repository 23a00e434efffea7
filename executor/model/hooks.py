"""Registers "qllm" with transformers' experts and attention interfaces.

Importing it is enough; `set_attn_implementation` and `set_experts_implementation` switch a model over.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface

from qllm.executor.model.attention import attention_forward
from qllm.executor.model.experts import experts_forward

NAME = "qllm"
PASS_THROUGH = "qllm_pass_through"


def pass_through(
    module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts that return their input: with them rounding cannot send a token to another expert."""
    return hidden.clone()


AttentionInterface.register(NAME, attention_forward)
ExpertsInterface.register(NAME, experts_forward)
ExpertsInterface.register(PASS_THROUGH, pass_through)
