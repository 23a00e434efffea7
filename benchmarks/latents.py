"""Latent attention: what a token takes and how long passes last, with latents kept and with keys and values kept.

    python benchmarks/latents.py [--device cpu] [--repeats 5] [--out docs/results/latents.json]

A random model with the attention of GLM-4.7-Flash (the default sizes of transformers' `glm4_moe_lite`: 20 heads,
latents of 512, rotary parts of 64) and small experts: on a CPU 2 layers in float32, on a GPU 8 in bfloat16. Timed are
a pass in which all sequences decode, and the last CHUNK tokens of a prompt of the same context. On a GPU passes are
replayed as CUDA graphs where they are when they are served. Medians after two passes to warm up; both ways in one
process, one after the other, over the same weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any
from unittest import mock

import torch
from results_file import add_out, save, this_machine
from transformers import AutoModelForCausalLM
from transformers.models.glm4_moe_lite import Glm4MoeLiteConfig

from qllm.executor.calibration.environment import device_name
from qllm.executor.graphs.runner import GraphRunner
from qllm.executor.model.info import model_facts
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import run_to_end

CHUNK, FILL, BLOCK = 512, 2048, 16
WAYS = ("latents", "all heads")
#: by device: (layers, hidden, dtype), and (context, sequences) of each row
SIZES: dict[str, tuple[tuple[int, int, torch.dtype], tuple[tuple[int, int], ...]]] = {
    "cpu": ((2, 512, torch.float32), ((2048, 8),)),
    "cuda": ((8, 2048, torch.bfloat16), ((2048, 32), (16384, 16))),
}


def model_of(way: str, device: torch.device) -> Any:
    """The model, prepared to keep its tokens that way; the same weights for both."""
    torch.manual_seed(0)
    layers, hidden, dtype = SIZES[device.type][0]
    config = Glm4MoeLiteConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=1024, moe_intermediate_size=256,
        n_routed_experts=16, num_experts_per_tok=4, vocab_size=4096, first_k_dense_replace=0,
    )  # fmt: skip
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if way == "latents":
        return prepare_model(model)
    with mock.patch("qllm.executor.latent.hook.find_form", return_value=None):
        return prepare_model(model)


def milliseconds(runner: GraphRunner, entries: list[tuple[Sequence, int]], repeats: int) -> float:
    """How long a pass takes, the median; its sequences then stand where they stood."""
    took = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run_to_end(runner.begin(entries)).sum().item()  # waits for the device
        took.append(1000 * (time.perf_counter() - start))
        for sequence, n in entries:
            sequence.computed -= n
    return statistics.median(took[2:])


def row_of(way: str, model: Any, context: int, sequences: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    blocks = -(-(context + 1) // BLOCK)
    runner = GraphRunner(model, sequences * blocks, BLOCK, graphs="use", max_seqs=sequences)
    runner.make_cache()
    tokens = [[(7 * i + n) % 4000 + 3 for i in range(context + 1)] for n in range(sequences)]
    made = [Sequence(own, [*range(n * blocks, (n + 1) * blocks)]) for n, own in enumerate(tokens)]
    for sequence in made:
        while sequence.computed < context:
            run_to_end(runner.begin([(sequence, min(FILL, context - sequence.computed))]))
    decode = milliseconds(runner, [(sequence, 1) for sequence in made], repeats)
    made[0].computed = context - CHUNK
    chunk = milliseconds(runner, [(made[0], CHUNK)], repeats)
    kept = model_facts(model)["kv_bytes_per_token"]
    facts = {"keeps": way, "kv_bytes_per_token": kept, "context": context, "sequences": sequences}
    return {**facts, "decode_ms": decode, "chunk_ms": chunk, "kv_mb": sequences * (context + 1) * kept / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=[*SIZES], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    add_out(parser, "latents")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    device, rows = torch.device(args.device), []
    print(f"{'keeps':<10} {'KV a token':>12} {'context':>8} {'sequences':>10} {'decode':>11} {f'last {CHUNK}':>11}")
    with torch.inference_mode():
        for way in WAYS:
            model = model_of(way, device)
            for context, sequences in SIZES[device.type][1]:
                row = row_of(way, model, context, sequences, args.repeats)
                rows.append(row)
                kept, times = f"{row['kv_bytes_per_token']} B", (row["decode_ms"], row["chunk_ms"])
                told = " ".join(f"{ms:8.2f} ms" for ms in times)
                print(f"{way:<10} {kept:>12} {context:>8} {sequences:>10} {told}", flush=True)
            del model
    if args.out:
        where = device_name(device) if device.type == "cuda" else this_machine()
        save(args.out, source=f"measured on {where}, torch {torch.__version__}", tables={"latents": rows})


if __name__ == "__main__":
    main()
