"""Prints the tables of docs/models.md: model types of the installed transformers, and what released checkpoints hold.

    python tools/list_model_families.py

Each type is built tiny, with random weights, and put through the checks that a checkpoint meets at load. How released
checkpoints are quantised stands here, as their config.json says it; what becomes of that is asked of the loader.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import transformers
from transformers import AutoModelForMultimodalLM

from qllm.executor.errors import UnsupportedModelError
from qllm.executor.model.checks import auto_class, expand_weights
from qllm.executor.model.loading import prepare_model
from qllm.executor.testing import families, tiny_config, tiny_model

UNKNOWN = "not tried: no tiny configuration of it is known here"


class Released(NamedTuple):
    """A checkpoint, its model type, parameters in billions, quantisation method, and what else speaks against it."""

    name: str
    model_type: str
    billions: float
    method: str | None = None
    but: str = ""


RELEASED = [
    Released("Qwen/Qwen3-30B-A3B", "qwen3_moe", 30.5),
    Released("Qwen/Qwen3-30B-A3B-FP8", "qwen3_moe", 30.5, "fp8"),
    Released("Qwen/Qwen3-30B-A3B-GPTQ-Int4", "qwen3_moe", 30.5, "gptq"),
    Released("Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3_vl_moe", 31.1),
    Released("Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3_next", 81.3),
    Released("Qwen/Qwen1.5-MoE-A2.7B", "qwen2_moe", 14.3),
    Released("mistralai/Mixtral-8x7B-v0.1", "mixtral", 46.7),
    Released("TheBloke/Mixtral-8x7B-Instruct-v0.1-AWQ", "mixtral", 46.7, "awq"),
    Released("openai/gpt-oss-20b", "gpt_oss", 20.9, "mxfp4"),
    Released("openai/gpt-oss-120b", "gpt_oss", 116.8, "mxfp4"),
    Released("deepseek-ai/DeepSeek-V2-Lite", "deepseek_v2", 15.7),
    Released(
        "deepseek-ai/DeepSeek-V3", "deepseek_v3", 671, "fp8",
        "its blocks of 128 rows do not divide the 576 of kv_a_proj_with_mqa, which transformers misreads",
    ),
    Released("zai-org/GLM-4.5-Air", "glm4_moe", 106.9),
    Released("zai-org/GLM-4.5-Air-FP8", "glm4_moe", 106.9, "compressed-tensors"),
    Released("MiniMaxAI/MiniMax-M2", "minimax_m2", 228.7, "fp8"),
    Released("baidu/ERNIE-4.5-21B-A3B-PT", "ernie4_5_moe", 21.8),
    Released("tencent/Hunyuan-A13B-Instruct", "hunyuan_v1_moe", 80.4),
    Released("allenai/OLMoE-1B-7B-0924", "olmoe", 6.9),
    Released("microsoft/Phi-3.5-MoE-instruct", "phimoe", 41.9),
]  # fmt: skip


def verdict(model_type: str) -> str:
    """Empty where a model of that type is served, else the reason why not."""
    try:
        tiny_config(model_type)
    except Exception:  # a class of configurations may ask for anything
        return UNKNOWN
    try:
        prepare_model(tiny_model(model_type))
    except UnsupportedModelError as error:
        return str(error).removeprefix(f"{model_type}: ")
    except Exception:  # sizes that do not fit each other
        return UNKNOWN
    return ""


def outcome(checkpoint: Released, reason: str) -> str:
    """What the loader makes of a released checkpoint, of a type that is refused for `reason` (empty: served)."""
    reason = reason or checkpoint.but
    if reason:
        return f"refused: {reason}"
    if checkpoint.method is None:
        return "loads"
    config = tiny_config(checkpoint.model_type)
    config.quantization_config = {"quant_method": checkpoint.method}
    try:
        expand_weights(config)
    except UnsupportedModelError:
        return "refused: transformers cannot expand them"
    return "loads, expanded"


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    verdicts = {model_type: verdict(model_type) for model_type in families()}
    served = [name for name, reason in verdicts.items() if not reason]
    composite = [name for name in served if auto_class(tiny_config(name)) is AutoModelForMultimodalLM]
    print(f"transformers {transformers.__version__}: {len(served)} of {len(verdicts)} model types are served\n")
    print(", ".join(name for name in served if name not in composite) + "\n")
    print(", ".join(composite) + "\n")
    print("| refused | reason |\n|---|---|")
    for name, reason in verdicts.items():
        if reason:
            print(f"| {name} | {reason} |")
    print("\n| checkpoint | model type | weights | result |\n|---|---|---|---|")
    for row in RELEASED:
        size = f"{2 * row.billions:.0f} GB"
        held = f"{row.method}, {size} in bfloat16" if row.method else f"bfloat16, {size}"
        print(f"| {row.name} | {row.model_type} | {held} | {outcome(row, verdicts[row.model_type])} |")


if __name__ == "__main__":
    main()
