"""Experts that stay packed (`experts="packed"`) against the same checkpoint expanded: errors, memory, speed.

    python benchmarks/packed_experts.py [--layers 2] [--rounds 3] [--threads 2] [--out FILE]

Two checkpoints with random weights are written as released ones are: a Mixtral whose linear layers are FP8 in blocks of
128 x 128, and a gpt-oss whose experts are MXFP4. Each is loaded twice, in bfloat16.

- Errors: logits of a prompt with packed experts, against those with expanded ones.
- Memory: bytes of the experts' weights, against those of bfloat16.
- Speed: as in benchmarks/nf4.py; both ways take turns, ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from nf4 import logits, speeds
from results_file import add_out, save, this_machine
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PreTrainedConfig, PreTrainedModel

from qllm.executor.model.info import dtype_name
from qllm.executor.model.loading import load_model
from qllm.executor.quantised.testing import quantise_checkpoint
from qllm.executor.quantised.weights import QuantisedWeights

MOST_ERROR = 1e-3
MOST_MEMORY = {"fp8": 0.51, "mxfp4": 0.27}
BLOCKS = {"fp8": (128, 128), "mxfp4": None}


def configs(layers: int) -> dict[str, PreTrainedConfig]:
    """Of each method, the model that it quantises; all have 8 experts, the 2 best of which each token goes to."""
    sizes: dict[str, Any] = {
        "vocab_size": 4000,
        "hidden_size": 1024,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "dtype": torch.bfloat16,
    }
    return {
        "fp8": MixtralConfig(intermediate_size=3584, max_position_embeddings=4096, **sizes),
        "mxfp4": GptOssConfig(intermediate_size=3584, layer_types=["full_attention"] * layers, **sizes),
    }


def both(config: PreTrainedConfig, method: str, folder: Path) -> dict[str, PreTrainedModel]:
    """A checkpoint of `config`, expanded and with packed experts."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "plain")
    quantise_checkpoint(folder / "plain", folder / method, method, BLOCKS[method])
    models = {}
    for experts in ("plain", "packed"):
        start = time.perf_counter()
        models[experts] = load_model(folder / method, experts=experts)
        print(f"{method}: {dtype_name(models[experts])}, loaded in {time.perf_counter() - start:.1f} s")
    return models


def measured(method: str, models: dict[str, PreTrainedModel], rounds: int) -> dict[str, Any]:
    """What the module's first lines name."""
    kept = [module for module in models["packed"].modules() if isinstance(module, QuantisedWeights)]
    count = sum(len(weights) * weights.expanded(0, torch.bfloat16).numel() for weights in kept)
    expected = logits(models["plain"])
    row: dict[str, Any] = {
        "experts": method,
        "millions_of_weights": count / 1e6,
        "memory_to_bfloat16": sum(weights.nbytes for weights in kept) / (2 * count),
        "logits_error": float((logits(models["packed"]) - expected).norm() / expected.norm()),
    }
    found = [{name: speeds(model) for name, model in models.items()} for _ in range(rounds + 1)][1:]  # one warms up
    for part in ("prefill", "decode"):
        row[f"{part}_tokens_per_s"] = statistics.median(each["packed"][part] for each in found)
        row[f"{part}_to_expanded"] = statistics.median(each["packed"][part] / each["plain"][part] for each in found)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_out(parser, "packed_experts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for method, config in configs(args.layers).items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(method, both(config, method, Path(folder)), args.rounds))
        row = rows[-1]
        print(
            f"{method}: {row['millions_of_weights']:.0f} M weights of experts, {row['memory_to_bfloat16']:.3f} of "
            f"bfloat16's bytes (at most {MOST_MEMORY[method]}); logits: relative error {row['logits_error']:.2g} "
            f"against the expanded weights (at most {MOST_ERROR:g})"
        )
        for part in ("prefill", "decode"):
            per_s, ratio = row[f"{part}_tokens_per_s"], row[f"{part}_to_expanded"]
            print(f"{method}: {part} {per_s:.1f} tokens/s, {ratio:.2f} of expanded weights")
    if args.out:
        source = f"measured on {this_machine()}; {args.layers} layers, hidden 1024, 8 experts 3584 wide, random weights"
        save(args.out, source=source, tables={"rows": rows})
    if any(row["logits_error"] > MOST_ERROR or row["memory_to_bfloat16"] > MOST_MEMORY[row["experts"]] for row in rows):
        raise SystemExit("beyond its bound")


if __name__ == "__main__":
    main()
