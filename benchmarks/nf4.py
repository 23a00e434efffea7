"""Experts in NF4 (`experts="nf4"`) on a Mixtral-shaped model with random weights: errors, memory, speed.

    python benchmarks/nf4.py [--layers 3] [--hidden 1024] [--inner 3584] [--rounds 3] [--threads 2] [--out FILE]

- Errors: logits of a prompt against those of a plain model that holds the same weights, expanded again, in float32.
- Memory: bytes of the experts' weights, against those of bfloat16.
- Speed: tokens/s of a prefill of 256 tokens, and of decode steps of 8 sequences, through passes that are not cut. All
  kinds of weights take turns, so that neighbours on the machine hit all of them; ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from results_file import add_out, save, this_machine
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from qllm.executor.cpu.linear import EXPERT_WEIGHTS
from qllm.executor.model.info import dtype_name
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.quantised.nf4 import Nf4Weights
from qllm.executor.testing import run_batch

PROMPT, SEQUENCES, STEPS = 256, 8, 8
BLOCK = 16  # tokens in a KV block
MOST_ERROR, MOST_MEMORY = 1e-3, 0.30
KINDS = {
    "nf4, computed in float32": (torch.float32, "nf4"),
    "nf4, computed in bfloat16": (torch.bfloat16, "nf4"),
    "bfloat16": (torch.bfloat16, "plain"),
    "float32": (torch.float32, "plain"),
}


def made(args: argparse.Namespace, dtype: torch.dtype) -> PreTrainedModel:
    """A random Mixtral with 8 experts, the 2 best of which each token goes to; the same numbers each time."""
    config = MixtralConfig(
        vocab_size=4000,
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 256,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def expert_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """The plain weights of a model's experts, [E, N, K] each."""
    modules = [module for module in model.modules() if hasattr(module, "is_transposed")]
    found = [getattr(module, name, None) for module in modules for name in EXPERT_WEIGHTS]
    return [weight.data for weight in found if weight is not None]


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 4000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits(model: PreTrainedModel) -> torch.Tensor:
    """After a prompt, [vocabulary]."""
    runner = Runner(model, kv_blocks=PROMPT // BLOCK, block_size=BLOCK)
    with torch.inference_mode():
        prompt = Sequence(tokens(PROMPT), [*range(PROMPT // BLOCK)])
        return run_to_end(runner.begin([(prompt, PROMPT)]))[0]


def error_of(args: argparse.Namespace, nf4: PreTrainedModel) -> float:
    """Of the logits, relative to those of a plain model with the same weights expanded again."""
    plain = made(args, torch.float32)
    kept = [module for module in nf4.modules() if isinstance(module, Nf4Weights)]
    for mine, its in zip(expert_weights(plain), kept, strict=True):
        for number, weight in enumerate(mine):
            weight.copy_(its.expanded(number, torch.float32))
    expected = logits(prepare_model(plain))
    return float((logits(nf4) - expected).norm() / expected.norm())


def speeds(model: PreTrainedModel) -> dict[str, float]:
    """Tokens a second of a prefill, and of decode steps."""
    start = time.perf_counter()
    logits(model)
    prefilled = time.perf_counter()
    runner = Runner(model, kv_blocks=SEQUENCES, block_size=BLOCK)
    with torch.inference_mode():
        states = [Sequence(tokens(2, seed), [seed]) for seed in range(SEQUENCES)]
        run_batch(runner, states, 1)
        begun = time.perf_counter()
        for _ in range(STEPS):
            run_to_end(runner.begin([(state, 1) for state in states]))
            for state in states:
                state.tokens.append(5)
        done = time.perf_counter()
    return {"prefill": PROMPT / (prefilled - start), "decode": SEQUENCES * STEPS / (done - begun)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 256")
    parser.add_argument("--inner", type=int, default=3584)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_out(parser, "nf4")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models, taken = {}, {}
    for name, (dtype, experts) in KINDS.items():
        model = made(args, dtype)
        count = sum(weight.numel() for weight in expert_weights(model))
        start = time.perf_counter()
        models[name] = prepare_model(model, experts=experts)
        taken[name] = time.perf_counter() - start
        print(f"{name}: {dtype_name(models[name])}, prepared in {taken[name]:.1f} s")
    nf4 = models["nf4, computed in float32"]
    error = error_of(args, nf4)
    memory = sum(module.nbytes for module in nf4.modules() if isinstance(module, Nf4Weights)) / (2 * count)
    print(f"{count / 1e6:.0f} M weights of experts: {memory:.3f} of bfloat16's bytes (at most {MOST_MEMORY})")
    print(f"logits: relative error {error:.2g} against the expanded weights (at most {MOST_ERROR:g})")
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds + 1):
        found = {name: speeds(model) for name, model in models.items()}
        rounds += [found] if number else []  # the first one warms up
    rows: list[dict[str, Any]] = []
    for name, (_, experts) in KINDS.items():
        row: dict[str, Any] = {"experts": name}
        row["expert_bytes"] = memory * 2 * count if experts == "nf4" else count * (4 if name == "float32" else 2)
        for part in ("prefill", "decode"):
            row[f"{part}_tokens_per_s"] = statistics.median(found[name][part] for found in rounds)
            for other in ("bfloat16", "float32"):
                ratios = [found[name][part] / found[other][part] for found in rounds]
                row[f"{part}_to_{other}"] = statistics.median(ratios)
        rows.append(row)
        told = "  ".join(
            f"{part} {row[f'{part}_tokens_per_s']:.1f} tokens/s, {row[f'{part}_to_bfloat16']:.2f} of bfloat16, "
            f"{row[f'{part}_to_float32']:.2f} of float32;"
            for part in ("prefill", "decode")
        )
        print(f"{name:26} {told}")
    if args.out:
        checks = [{"logits_error": error, "most_error": MOST_ERROR, "memory": memory, "most_memory": MOST_MEMORY}]
        shape = f"Mixtral of {args.layers} layers, hidden {args.hidden}, 8 experts {args.inner} wide, random weights"
        source = f"measured on {this_machine()}; {shape}"
        save(args.out, source=source, tables={"rows": rows, "checks": checks})
    if error > MOST_ERROR or memory > MOST_MEMORY:
        raise SystemExit("beyond its bound")


if __name__ == "__main__":
    main()
