"""A small random-weight MoE, made on the spot: for demonstrations and measurements without a checkpoint."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

DEMO = "random Qwen3-MoE, 8 layers, hidden 256, 16 experts, top 4"


def demo_model(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """The model that `DEMO` describes: 29 M parameters, vocabulary 4,000, up to 16,384 positions."""
    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=4000,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=16384,
        initializer_range=0.05,  # with the usual 0.02 at this size, every prompt is continued with the same few tokens
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(torch.device(device)).eval()
