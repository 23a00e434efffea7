"""Latent attention on a CPU: what a token takes and how long passes last, with latents kept and with all heads kept.

    python benchmarks/latents.py [--context 2048] [--repeats 5] [--out docs/results/latents.json]

A random model with the attention of GLM-4.7-Flash (the default sizes of transformers' `glm4_moe_lite`: 20 heads,
latents of 512, rotary parts of 64), LAYERS layers and small experts, float32. Timed are a pass in which SEQUENCES
sequences of `context` tokens decode, and the last chunk of CHUNK tokens of a prompt of that length. Both ways run in
turn in one process; the table shows medians, and their ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch
from results_file import add_out, save, this_machine
from transformers import AutoModelForCausalLM
from transformers.models.glm4_moe_lite import Glm4MoeLiteConfig

from qllm.executor.model.info import model_facts
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, run_to_end

LAYERS, SEQUENCES, CHUNK, BLOCK = 2, 8, 512, 16
WAYS = ("latents", "all heads")


def make(way: str) -> Runner:
    """A runner of the model that keeps its tokens that way; the same weights for both."""
    torch.manual_seed(0)
    config = Glm4MoeLiteConfig(
        num_hidden_layers=LAYERS, hidden_size=512, intermediate_size=256, moe_intermediate_size=128, n_routed_experts=8,
        num_experts_per_tok=2, vocab_size=512, first_k_dense_replace=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    unknown = mock.patch("qllm.executor.latent.hook.find_form", return_value=None)
    if way == "latents":
        return Runner(prepare_model(model), 1, BLOCK)
    with unknown:
        return Runner(prepare_model(model), 1, BLOCK)


def seconds(runner: Runner, entries: list[tuple[Sequence, int]]) -> float:
    """How long a pass takes; its sequences then stand where they stood."""
    start = time.perf_counter()
    run_to_end(runner.begin(entries))
    took = time.perf_counter() - start
    for sequence, n in entries:
        sequence.computed -= n
    return took


def filled(runner: Runner, context: int) -> list[Sequence]:
    """Sequences of `context` tokens, all computed but the last chunk of the first."""
    blocks = -(-(context + 1) // BLOCK)
    made = [
        Sequence([(7 * i + n) % 500 + 3 for i in range(context + 1)], [*range(n * blocks, (n + 1) * blocks)])
        for n in range(SEQUENCES)
    ]
    for sequence in made:
        for _ in range(0, context, CHUNK):
            run_to_end(runner.begin([(sequence, CHUNK)]))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2048, help=f"tokens, a multiple of {CHUNK}")
    parser.add_argument("--repeats", type=int, default=5)
    add_out(parser, "latents")
    args = parser.parse_args()
    if args.context < CHUNK or args.context % CHUNK or args.repeats < 1:
        parser.error(f"--context is a multiple of {CHUNK}, --repeats at least 1")
    found: dict[str, dict[str, list[float]]] = {}
    worlds, sizes = {}, {}
    blocks = SEQUENCES * -(-(args.context + 1) // BLOCK)
    with torch.inference_mode():
        for way in WAYS:
            model = make(way).model
            sizes[way] = model_facts(model)["kv_bytes_per_token"]
            runner = Runner(model, blocks, BLOCK)
            worlds[way] = runner, filled(runner, args.context)
            found[way] = {"decode": [], "chunk": []}
        for _ in range(args.repeats):
            for way, (runner, sequences) in worlds.items():
                found[way]["decode"].append(seconds(runner, [(sequence, 1) for sequence in sequences]))
                first = sequences[0]
                first.computed -= CHUNK
                found[way]["chunk"].append(seconds(runner, [(first, CHUNK)]))
                first.computed += CHUNK
    rows = [
        {
            "keeps": way,
            "kv_bytes_per_token": sizes[way],
            "decode_ms": 1000 * statistics.median(found[way]["decode"]),
            "chunk_ms": 1000 * statistics.median(found[way]["chunk"]),
        }
        for way in WAYS
    ]
    print(f"{'keeps':<10} {'KV a token':>12} {'decode':>10} {'chunk':>10}")
    for row in rows:
        kv, decode, chunk = row["kv_bytes_per_token"], row["decode_ms"], row["chunk_ms"]
        print(f"{row['keeps']:<10} {kv:>10} B {decode:>7.1f} ms {chunk:>7.1f} ms")
    names = ("kv_bytes_per_token", "decode_ms", "chunk_ms")
    ratios = {name: float(rows[0][name]) / float(rows[1][name]) for name in names}
    print("latents over all heads: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))
    if args.out:
        save(args.out, source=f"measured on {this_machine()}", tables={"latents": rows}, ratios=ratios)


if __name__ == "__main__":
    main()
