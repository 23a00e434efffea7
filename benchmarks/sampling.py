"""What sampling costs at the vocabulary of today's models, in the sampler alone and in the engine.

    python benchmarks/sampling.py [--rows 32] [--vocab 151936] [--repeats 7] [--threads 1] [--out FILE]

The sampler: milliseconds for one call over random logits, the fastest and the median of the repeats, by the thread's
own CPU time, so that neighbours on the machine count little. The engine: a tiny MoE with that vocabulary decodes 8 BE
requests while LS requests arrive one after another; greedy and sampled runs in turn. Printed: BE tokens/s, the ratio of
sampled to greedy run by run, and how long LS requests waited until their first launch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from results_file import add_out, save, this_machine

from qllm.executor.engine.engine import Engine
from qllm.executor.model.loading import prepare_model
from qllm.executor.sampling.params import SamplingParams
from qllm.executor.sampling.sampling import sample
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top_k 20": {"temperature": 0.8, "top_k": 20},
    "top_k 20, top_p 0.95": {"temperature": 0.8, "top_k": 20, "top_p": 0.95},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "temperature alone": {"temperature": 0.8},
}
BE_REQUESTS, BE_TOKENS = 8, 60
LS_REQUESTS, LS_EVERY_S = 12, 0.05


def milliseconds(call: Callable[[], object], repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        taken.append((time.thread_time() - start) * 1e3)
    return sorted(taken)


def sampler_alone(rows: int, vocab: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds a call over `rows` rows, with logits as peaked as a trained model's, and as flat as random ones."""
    found = []
    normal = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    for shape, logits in {"flat": normal * 3, "peaked": normal.abs().square() * normal.sign() * 2}.items():
        for name, settings in SETTINGS.items():
            params = [SamplingParams(**settings)] * rows
            taken = milliseconds(lambda x=logits, p=params: sample(x, p, [3] * rows, range(rows)), repeats)  # type: ignore[misc]
            found.append({"logits": shape, "sampling": name, "fastest_ms": taken[0], "median_ms": taken[repeats // 2]})
            print(f"{shape:8} {name:24} {taken[0]:8.2f} {taken[repeats // 2]:8.2f}")
    return found


def served(engine: Engine, settings: dict[str, Any]) -> tuple[float, list[float]]:
    """BE tokens per second, and each LS request's seconds from arrival to its first launch."""
    start = time.monotonic()
    be = [
        engine.submit([i + 1] * 8, max_new_tokens=BE_TOKENS, priority=1, seed=i, stop=(), **settings)
        for i in range(BE_REQUESTS)
    ]
    ls = []
    for i in range(LS_REQUESTS):
        time.sleep(LS_EVERY_S)
        ls.append(engine.submit([i + 1] * 8, max_new_tokens=1, priority=0, seed=i, stop=(), **settings))
    tokens = sum(len(stream.result().tokens) for stream in be)
    seconds = max(stream.result().times.finish for stream in be) - start
    waits = [r.times.first_launch - r.times.arrival for r in (stream.result() for stream in ls)]
    return tokens / seconds, waits


def in_the_engine(vocab: int, repeats: int) -> list[dict[str, Any]]:
    model = prepare_model(tiny_model("qwen3_moe", num_hidden_layers=2, vocab_size=vocab))
    limits = Limits(max_seqs=16, max_batched_tokens=256, kv_blocks=400)
    runs: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in SETTINGS}
    with Engine(model, policy="qllm", limits=limits) as engine:
        for repeat in range(-1, repeats):  # -1 warms up
            for name, settings in SETTINGS.items():
                found = served(engine, settings)
                if repeat >= 0:
                    runs[name].append(found)
    rows = []
    for name, found in runs.items():
        ratios = [mine / greedy for (mine, _), (greedy, _) in zip(found, runs["greedy"], strict=True)]
        waits = [wait * 1e3 for _, of_run in found for wait in of_run]
        row = {
            "sampling": name,
            "be_tokens_per_s": statistics.median(speed for speed, _ in found),
            "to_greedy": statistics.median(ratios),
            "to_greedy_lowest": min(ratios),
            "to_greedy_highest": max(ratios),
            "ls_wait_ms": statistics.mean(waits),
            "ls_wait_worst_ms": max(waits),
        }
        rows.append(row)
        print(f"{name:24}" + "".join(f" {value:9.2f}" for value in row.values() if isinstance(value, float)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    add_out(parser, "sampling")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"the sampler alone, {args.rows} rows of {args.vocab}, ms: fastest, median")
    alone = sampler_alone(args.rows, args.vocab, args.repeats)
    print("\nin the engine: BE tokens/s, ratio to greedy (median, lowest, highest), LS wait ms (mean, worst)")
    engine = in_the_engine(args.vocab, args.repeats)
    if args.out:
        save(args.out, source=f"measured on {this_machine()}", tables={"sampler": alone, "engine": engine})


if __name__ == "__main__":
    main()
