"""What sampling costs at the vocabulary of today's models, in the sampler alone and in the engine.

    python benchmarks/sampling.py [--rows 32] [--vocab 151936] [--repeats 7] [--threads 1] [--out FILE]

The sampler: milliseconds for one call over random logits, the fastest and the median of the repeats, by the thread's
own CPU time, so that neighbours on the machine count little. Penalties are over 1,000 tokens that the request has seen;
a grammar is a JSON schema inside of a string, where most tokens are allowed, over a vocabulary of made-up words. The
engine: a tiny MoE with that vocabulary decodes 8 BE requests while LS requests arrive one after another; greedy and
other runs in turn. Printed: BE tokens/s, the ratio to greedy run by run, and how long LS requests waited until their
first launch.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from results_file import add_out, save, this_machine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qllm.executor.engine.engine import Engine
from qllm.executor.model.loading import prepare_model
from qllm.executor.sampling.grammar import Grammar, Grammars
from qllm.executor.sampling.params import SamplingParams
from qllm.executor.sampling.row_state import prepared
from qllm.executor.sampling.sampling import sample
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top_k 20": {"temperature": 0.8, "top_k": 20},
    "top_k 20, top_p 0.95": {"temperature": 0.8, "top_k": 20, "top_p": 0.95},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "temperature alone": {"temperature": 0.8},
    "greedy, penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "greedy, logprobs 5": {"logprobs": 5},
}
STRING = Grammar.json_schema({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
ALONE: dict[str, dict[str, Any]] = {"greedy, grammar": {"grammar": STRING}}  # needs a tokenizer
SEEN = 1000  # tokens
BE_REQUESTS, BE_TOKENS = 8, 60
LS_REQUESTS, LS_EVERY_S = 12, 0.05


def milliseconds(call: Callable[[], object], repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        taken.append((time.thread_time() - start) * 1e3)
    return sorted(taken)


def words(vocab: int) -> Any:
    """A tokenizer of so many tokens: each byte, and made-up words."""
    rng, letters = random.Random(0), sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(["</s>", *letters])
    while len(tokens) < vocab:
        tokens["".join(rng.choices("abcdefghijklmnopqrstuvwxyzĠ0123456789", k=rng.randint(2, 9)))] = None
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def states_of(params: SamplingParams, rows: int, vocab: int, grammars: Grammars, begun: list[int]) -> list[Any]:
    """The state of each row, where its parameters need one."""
    found = []
    for seed in range(rows):
        seen = begun if params.grammar else random.Random(seed).choices(range(vocab), k=SEEN)
        state = prepared(params, [], grammars)[1]
        if state is not None:
            state.follow(seen)
        found.append(state)
    return found


def sampler_alone(rows: int, vocab: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds a call over `rows` rows, with logits as peaked as a trained model's, and as flat as random ones."""
    found = []
    tokenizer = words(vocab)
    grammars, begun = Grammars(tokenizer, vocab), tokenizer.encode('{"a":"')
    normal = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    for shape, logits in {"flat": normal * 3, "peaked": normal.abs().square() * normal.sign() * 2}.items():
        for name, settings in {**SETTINGS, **ALONE}.items():
            params = SamplingParams(**settings)
            states = states_of(params, rows, vocab, grammars, begun)
            taken = milliseconds(
                lambda x=logits, p=params, s=states: sample(x, [p] * rows, [3] * rows, range(rows), s),  # type: ignore[misc]
                repeats,
            )
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
