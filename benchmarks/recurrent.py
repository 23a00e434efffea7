"""Tokens per second of this engine on a model with recurrent layers, and of transformers' own `generate`, one by one.

    python benchmarks/recurrent.py [--family qwen3_next] [--repeats 5] [--out docs/results/recurrent.json]

The prompts of `throughput.py`: 16 of 16-200 random tokens, 32 greedy tokens each, float32. The model is random, of
qwen3_next (linear attention in three of four layers) or lfm2_moe (convolutions in three of four): 8 layers, hidden 512,
32 experts (384 wide), top 4. `generate` answers one prompt after the other, with each of two implementations of the
experts. Every row is a process that stays loaded; they run in turn, one at a time, after one run each to warm up.
The goal is 1.5 times the tokens per second of the faster `generate`; also printed is whose tokens are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
from pathlib import Path
from typing import Any

import throughput_worker
from processes import Cores, Process, end_children_on_sigterm
from results_file import add_out, save, this_machine
from throughput import NEW_TOKENS, prompts, report, settle, summary
from throughput_worker import Prompts, Run

from qllm.executor.testing import CHECKPOINT_VOCAB

GOAL = 1.5
WORKER = "--worker"
#: row -> (engine, variant)
ROWS = {
    "qllm": ("ours", ""),
    "generate, eager": ("generate", "eager"),
    "generate, grouped_mm": ("generate", "grouped_mm"),
}
COMMON: dict[str, Any] = {
    "vocab_size": CHECKPOINT_VOCAB,
    "hidden_size": 512,
    "intermediate_size": 384,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "initializer_range": 0.05,  # with the usual 0.02 prompts of this size are continued with the same few tokens
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "head_dim": 64,
        "shared_expert_intermediate_size": 384,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2, "num_dense_layers": 0},
}


def make_model(family: str, folder: Path) -> Path:
    """Write the random checkpoint of a family, unless it is there."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        config = CONFIG_MAPPING[family](**COMMON, **FAMILIES[family])
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def generate(model: str, threads: int, max_step: float) -> Run:
    """Variants: the experts implementation."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def run(variant: str, asked: Prompts, new_tokens: int) -> Prompts:
        loaded.set_experts_implementation(variant)
        answers = []
        for prompt in asked:
            ids = torch.tensor([prompt])
            told = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            made = loaded.generate(ids, attention_mask=torch.ones_like(ids), **told)  # type: ignore[arg-type]
            answers.append(made[0, len(prompt) :].tolist())
        return answers

    return run


def measure(processes: dict[str, Process], repeats: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Runs of each row: seconds, tokens, cores that others used meanwhile."""
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    rng, question = random.Random(seed), {"prompts": prompts(seed), "new_tokens": NEW_TOKENS}
    for repeat in range(-1, repeats):  # -1 warms up
        for row in rng.sample(list(ROWS), len(ROWS)):  # nobody always follows the same neighbour
            engine, variant = ROWS[row]
            cores = Cores(processes[engine].pid)
            answer = processes[engine].ask({"variant": variant, **question})
            answer["own_cores"], answer["other_cores"] = cores.used()
            settle(processes[engine])
            if repeat >= 0:
                runs[row].append(answer)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_next")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, default=Path("out/recurrent"), help="folder of models and logs")
    add_out(parser, "recurrent")
    args = parser.parse_args()
    end_children_on_sigterm()
    model = str(make_model(args.family, args.logs / args.family))
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(
                Process(
                    [sys.executable, str(Path(__file__)), WORKER, name, model, str(args.threads), "0.01"],
                    args.logs / f"{name}.log",
                    {"OMP_NUM_THREADS": str(args.threads)},
                    pipes=True,
                )
            )
            for name in dict.fromkeys(engine for engine, _ in ROWS.values())
        }
        result = report(measure(processes, args.repeats, args.seed), args.threads)
    rows = summary(result)
    lowest = min(row["ratio"] for row in rows if row["engine"] != "qllm")
    print(f"\n{args.family}: {lowest:.2f} times the faster generate, goal {GOAL}; load {result['load_average']:.1f}")
    if args.out:
        for row in rows:
            row["same_tokens"] = result["same_tokens"][row["engine"]]
        note = f"{args.family}, random weights; other processes used {result['rows']['qllm']['other']:.1f} cores"
        save(args.out, source=f"measured on {this_machine()}", tables={"rows": rows}, note=note)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        del sys.argv[1]
        throughput_worker.ENGINES["generate"] = generate
        throughput_worker.main()
    else:
        main()
