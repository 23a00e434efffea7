"""A small random-weight MoE, made on the spot: for demonstrations and measurements without a checkpoint."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

DEMO = "random Qwen3-MoE, 8 layers, hidden 256, 16 experts, top 4"


def small_config(*, vocabulary: int, hidden: int, width: int, experts: int) -> Qwen3MoeConfig:
    """A Qwen3-MoE of 8 layers with experts `width` wide, the 4 best of which each token goes to."""
    return Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        moe_intermediate_size=width,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        num_experts=experts,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=16384,
        initializer_range=0.05,  # with the usual 0.02 at this size, every prompt is continued with the same few tokens
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )


def demo_model(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """The model that `DEMO` describes: 29 M parameters, vocabulary 4,000, up to 16,384 positions."""
    config = small_config(vocabulary=4000, hidden=256, width=256, experts=16)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(torch.device(device)).eval()
