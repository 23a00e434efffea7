"""Released checkpoints for docs/models.md: their sizes, and how they are quantised.

Sizes stand here where those of transformers' default configuration are not the checkpoint's. They are imported from the
checkpoint's config.json, as others published it: the package aiconfigurator-core, or pages about the checkpoint.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Checkpoint(NamedTuple):
    """A checkpoint, others of the same sizes, its model type, and the sizes that differ from the default's."""

    name: str
    like: str  #: names of others that have the same sizes
    model_type: str
    sizes: dict[str, Any] | None = None  #: None: the defaults are the checkpoint's


class Quantised(NamedTuple):
    """A checkpoint, its model type, parameters in billions, and its quantisation method.

    Also, of FP8, outputs and inputs that share a scale (None: all), and the sizes that differ from the default's.
    """

    name: str
    model_type: str
    billions: float
    method: str | None = None
    block: list[int] | None = None
    sizes: dict[str, Any] | None = None


_QWEN3_30B = {
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
_GPT_OSS_20B = {"num_hidden_layers": 24, "num_local_experts": 32}
_GEMMA4_26B = {
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "moe_intermediate_size": 704,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 1024,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
}
_GEMMA4_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
}
_QWEN35_122B = {
    "hidden_size": 3072,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "linear_num_value_heads": 64,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
}
_NEMOTRON_NANO = {
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_key_value_heads": 2,
    "intermediate_size": 1856,
    "mamba_num_heads": 64,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
}
_NEMOTRON_SUPER = {
    "hybrid_override_pattern": (
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
    ),
    "num_key_value_heads": 2,
    "intermediate_size": 2688,
    "moe_intermediate_size": 2688,
    "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
}
_GRANITE_SMALL = {
    "vocab_size": 100352,
    "intermediate_size": 768,
    "shared_intermediate_size": 1536,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "num_local_experts": 72,
    "num_experts_per_tok": 10,
    "mamba_d_state": 128,
    "tie_word_embeddings": True,
    "layer_types": ["mamba"] * 36 + ["attention"] * 4,  # their order takes no memory
}
_LFM2_8B = {"num_hidden_layers": 24, "layer_types": ["conv"] * 18 + ["full_attention"] * 6}  # nor does it here
_KIMI_LINEAR = {"layer_types": ["linear_attention"] * 20 + ["full_attention"] * 7}  # nor here
_DEEPSEEK_V2_LITE = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 6,
}

#: The twenty that are asked for most on one GPU, most wanted first (our judgement).
TWENTY = [
    Checkpoint(
        "Qwen/Qwen3.6-35B-A3B", "Qwen3.5-35B-A3B", "qwen3_5_moe", {"vision_config": {"out_hidden_size": 2048}}
    ),
    Checkpoint("openai/gpt-oss-20b", "", "gpt_oss", _GPT_OSS_20B),
    Checkpoint(
        "google/gemma-4-26B-A4B", "", "gemma4",
        {"text_config": _GEMMA4_26B, "vision_config": _GEMMA4_VISION, "audio_config": None},
    ),
    Checkpoint(
        "Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen3-30B-A3B, Qwen3-Coder-30B-A3B-Instruct", "qwen3_moe", _QWEN3_30B
    ),
    Checkpoint("zai-org/GLM-4.7-Flash", "", "glm4_moe_lite"),
    Checkpoint("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "", "nemotron_h", _NEMOTRON_NANO),
    Checkpoint("Qwen/Qwen3-Coder-Next", "Qwen3-Next-80B-A3B-Instruct", "qwen3_next"),
    Checkpoint("openai/gpt-oss-120b", "", "gpt_oss"),
    Checkpoint(
        "Qwen/Qwen3-VL-30B-A3B-Instruct", "", "qwen3_vl_moe",
        {"text_config": _QWEN3_30B, "vision_config": {"out_hidden_size": 2048}, "tie_word_embeddings": False},
    ),
    Checkpoint("mistralai/Mistral-Small-4-119B-2603", "", "mistral4"),
    Checkpoint(
        "Qwen/Qwen3.5-122B-A10B", "", "qwen3_5_moe",
        {"text_config": _QWEN35_122B, "vision_config": {"out_hidden_size": 3072}},
    ),
    Checkpoint("zai-org/GLM-4.5-Air", "", "glm4_moe"),
    Checkpoint("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16", "", "nemotron_h", _NEMOTRON_SUPER),
    Checkpoint("ibm-granite/granite-4.0-h-small", "", "granitemoehybrid", _GRANITE_SMALL),
    Checkpoint("LiquidAI/LFM2-8B-A1B", "", "lfm2_moe", _LFM2_8B),
    Checkpoint("baidu/ERNIE-4.5-21B-A3B-PT", "", "ernie4_5_moe"),
    Checkpoint("moonshotai/Kimi-Linear-48B-A3B-Instruct", "", "kimi_linear", _KIMI_LINEAR),
    Checkpoint("mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral-8x7B-v0.1", "mixtral"),
    Checkpoint(
        "deepseek-ai/DeepSeek-V2-Lite-Chat", "DeepSeek-Coder-V2-Lite-Instruct", "deepseek_v2", _DEEPSEEK_V2_LITE
    ),
    Checkpoint("zai-org/GLM-5.3-Flash", "", "glm5_next"),
]  # fmt: skip

#: How others hold their weights, as their config.json says it.
OTHERS = [
    Quantised("Qwen/Qwen3-30B-A3B-FP8", "qwen3_moe", 30.5, "fp8", [128, 128], _QWEN3_30B),
    Quantised("Qwen/Qwen3-30B-A3B-GPTQ-Int4", "qwen3_moe", 30.5, "gptq"),
    Quantised("TheBloke/Mixtral-8x7B-Instruct-v0.1-AWQ", "mixtral", 46.7, "awq"),
    Quantised("openai/gpt-oss-20b", "gpt_oss", 20.9, "mxfp4", None, _GPT_OSS_20B),
    Quantised("openai/gpt-oss-120b", "gpt_oss", 116.8, "mxfp4"),
    Quantised("zai-org/GLM-4.5-Air-FP8", "glm4_moe", 106.9, "compressed-tensors"),
    Quantised("mistralai/Mistral-Small-4-119B-2603", "mistral4", 119, "fp8"),
    Quantised("MiniMaxAI/MiniMax-M2", "minimax_m2", 228.7, "fp8", [128, 128]),
    Quantised("deepseek-ai/DeepSeek-V3", "deepseek_v3", 671, "fp8", [128, 128]),
    Quantised("Qwen/Qwen1.5-MoE-A2.7B", "qwen2_moe", 14.3),
    Quantised("tencent/Hunyuan-A13B-Instruct", "hunyuan_v1_moe", 80.4),
    Quantised("allenai/OLMoE-1B-7B-0924", "olmoe", 6.9),
    Quantised("microsoft/Phi-3.5-MoE-instruct", "phimoe", 41.9),
]  # fmt: skip
