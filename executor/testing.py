"""Models without a checkpoint: tiny ones of any MoE family, a random Qwen3-MoE to show, one to compare engines on.

Families are enumerated, not listed: a family is a model type whose experts go through the experts interface.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers.models
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from qllm.executor.errors import UnsupportedModelError
from qllm.executor.model.checks import auto_class, check_config
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, run_to_end

#: Values for whichever of these names a configuration class knows. Windows are short, so that tests look beyond them.
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "unpadded_vocab_size": 96,
    "hidden_size": 64,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "swa_head_dim": 16,
    "swa_v_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 96,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "enable_moe_block": True,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "sliding_window": 8,
    "index_topk": 6,
    "index_head_dim": 16,
    "index_n_heads": 32,  # with few, many scores are 0, and which of them are chosen is anybody's guess
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "indexer_n_heads": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_n_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "ssm_state_size": 16,
    "initializer_range": 0.2,  # the usual 0.02 at this size gives the same token over and over
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Names that switch a part of the model off while they are None.
OPTIONAL = frozenset({"q_lora_rank", "sliding_window", "hidden_size_per_layer_input", "vocab_size_per_layer_input"})
#: Where a family's own rules ask for more.
SPECIAL: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "nemotron_h": {"chunk_size": 16},
    "bailing_hybrid": {"layer_group_size": 2},
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2, 4],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "glm5_next_text": {"qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 2},
    "zaya": {"num_experts_per_tok": 1},
    "mistral4": {"qk_rope_head_dim": 16, "head_dim": 32},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 90},
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
        },
    },
}
DEMO = "random Qwen3-MoE, 8 layers, hidden 256, 16 experts, top 4"
CHECKPOINT_VOCAB = 8000
#: A tiny configuration that builds more is not tiny: some size has a name unknown here. What sees and hears in a
#: composite model may be large.
MAX_PARAMETERS = 200_000_000


def families() -> list[str]:
    """Model types whose language model, alone or in a composite one, has experts behind the experts interface."""
    root = Path(next(iter(transformers.models.__path__)))
    sources = (path.read_text(encoding="utf-8") for path in root.glob("*/modeling_*.py"))
    with_experts = (text for text in sources if "@use_experts_implementation" in text)
    classes = {name for text in with_experts for name in re.findall(r"^class (\w+)\(", text, re.MULTILINE)}
    types = {**MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return sorted(name for name, made in types.items() if made in classes and name in CONFIG_MAPPING)


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A configuration of `model_type` with a few thousand parameters a layer; `overrides` win."""
    return _tiny(CONFIG_MAPPING[model_type], overrides)


def _tiny(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    default = config_class()
    default.allow_global_per_layer_attribute_access = True
    values = {
        name: value
        for name, value in TINY.items()
        if hasattr(default, name) and not (name in OPTIONAL and getattr(default, name) is None)
    }
    if hasattr(default, "kv_lora_rank"):
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention has no groups
        if "head_dim" in values and default.head_dim == default.qk_rope_head_dim:
            values["head_dim"] = values["qk_rope_head_dim"]
    values.update(SPECIAL.get(default.model_type, {}))
    for name in config_class.sub_configs:
        if isinstance(getattr(default, name, None), PreTrainedConfig):
            values[name] = _tiny(type(getattr(default, name)), {}).to_dict()
    return config_class(**{**values, **overrides})


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model of a family, on the CPU. Raises UnsupportedModelError where none can be made."""
    config = tiny_config(model_type, **overrides)
    check_config(config)
    auto = auto_class(config)
    with torch.device("meta"):
        size = auto.from_config(config).num_parameters()
    if size > MAX_PARAMETERS:
        raise UnsupportedModelError(f"{model_type}: its tiny configuration has {size / 1e6:.0f} M parameters")
    torch.manual_seed(seed)
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
    return model


def small_config(*, vocabulary: int, hidden: int, width: int, experts: int) -> Qwen3MoeConfig:
    """A Qwen3-MoE of 8 layers with experts `width` wide, the 4 best of which each token goes to."""
    values: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": hidden // 8,
        "num_experts": experts,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "max_position_embeddings": 16384,
        "initializer_range": 0.05,  # with the usual 0.02 prompts of this size are continued with the same few tokens
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return Qwen3MoeConfig(**values)


def demo_model(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """The model that `DEMO` describes: 29 M parameters, vocabulary 4,000, up to 16,384 positions."""
    config = small_config(vocabulary=4000, hidden=256, width=256, experts=16)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).to(torch.device(device)).eval()
    return model


def make_checkpoint(folder: str | Path, seed: int = 0, *, tiny: bool = False) -> Path:
    """Write the checkpoint that engines are compared on (config, weights, tokenizer; 660 MB), unless it is there.

    A Qwen3-MoE of 165.6 M random float32 weights: 8 layers, hidden 512, 32 experts (384 wide), top 4. Its tokenizer
    splits at spaces into words t2 to t7999, so that a server that insists on one can load it. `tiny`: hidden 64, 8
    experts (32 wide), where speed does not matter.
    """
    folder = Path(folder)
    if not (folder / "tokenizer_config.json").exists():  # written last
        torch.manual_seed(seed)
        sizes = {"hidden": 64, "width": 32, "experts": 8} if tiny else {"hidden": 512, "width": 384, "experts": 32}
        config = small_config(vocabulary=CHECKPOINT_VOCAB, **sizes)
        Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
        words = {"<bos>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, CHECKPOINT_VOCAB)}
        splitter = Tokenizer(models.WordLevel(words, unk_token="t2"))
        splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=splitter, bos_token="<bos>", eos_token="<eos>", pad_token="<bos>"
        ).save_pretrained(folder)
    return folder


def run_batch(runner: Runner, sequences: Iterable[Sequence], new_tokens: int) -> list[list[int]]:
    """Greedy continuation of all sequences together, `new_tokens` each: prefill in one pass, then decode."""
    states = list(sequences)
    outputs: list[list[int]] = [[] for _ in states]
    for _ in range(new_tokens):
        running = runner.begin((s, len(s.tokens) - s.computed) for s in states)
        logits = run_to_end(running)
        for entry, token in zip(running.sampled, logits.argmax(-1).tolist(), strict=True):
            entry.seq.tokens.append(token)
            outputs[states.index(entry.seq)].append(token)
    return outputs
