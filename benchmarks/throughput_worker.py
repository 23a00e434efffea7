"""One engine of `throughput.py`, in a process of its own: loads the model, then answers each line with one run.

    python benchmarks/throughput_worker.py ENGINE MODEL THREADS [MAX_STEP]

A question is {"variant": ..., "prompts": [[token, ...], ...], "new_tokens": n}, the answer {"seconds": ..., "tokens":
[[...], ...]}. Imports lie inside the functions: each engine has its own environment, and none loads another's.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial

Prompts = list[list[int]]
Run = Callable[[str, Prompts, int], Prompts]
ANSWER = "ANSWER "


def ours(model: str, threads: int, max_step: float, points: bool = True) -> Run:
    """As served, or, without `points`, the same engine whose passes run through without a preemption point. One engine
    a process: each has a team of OpenMP threads, and with more threads than cores all of them wait by sleeping."""
    from qllm.executor.engine.engine import Engine  # isort: skip  # before torch: it sets how OpenMP's threads wait
    import torch

    from qllm.executor.model.loading import load_model
    from qllm.executor.model.passes import RunningPass
    from qllm.executor.model.split import whole
    from qllm.scheduler import Limits

    torch.set_num_threads(threads)
    loaded = load_model(model, dtype="float32")
    limits = Limits(kv_blocks=512)
    if points:
        engine = Engine(loaded, limits=limits, max_step=max_step)
    else:
        engine = Engine(loaded, limits=limits, splitter=whole)
        RunningPass.reach = lambda *_: None  # type: ignore[method-assign]

    def run(variant: str, prompts: Prompts, new_tokens: int) -> Prompts:
        settings = {"temperature": 0.8, "top_k": 20, "top_p": 0.95} if variant == "sampled" else {}
        streams = [engine.submit(p, max_new_tokens=new_tokens, stop=(), **settings) for p in prompts]  # type: ignore[arg-type]
        return [stream.result().tokens for stream in streams]

    return run


def transformers(model: str, threads: int, max_step: float) -> Run:
    """Variants: the experts implementation."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded.set_attn_implementation("sdpa")
    config = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=8192)

    def run(variant: str, prompts: Prompts, new_tokens: int) -> Prompts:
        loaded.set_experts_implementation(variant)
        greedy = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        answers = loaded.generate_batch(
            prompts, generation_config=greedy, continuous_batching_config=config, progress_bar=False, warmup=False
        )
        by_number = sorted(answers.items(), key=lambda item: int(item[0].rpartition("_")[2]))
        return [answer.generated_tokens for _, answer in by_number]

    return run


def vllm(model: str, threads: int, max_step: float) -> Run:
    """Its engine core stays a process of its own, as by default: only there does it use more than one core."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        max_model_len=8192,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # repeats of the same prompts would be answered from the cache
        gpu_memory_utilization=0.3,  # of the host's memory, checked at the start; KV has VLLM_CPU_KVCACHE_SPACE
    )

    def run(variant: str, prompts: Prompts, new_tokens: int) -> Prompts:
        greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        answers = llm.generate([{"prompt_token_ids": p} for p in prompts], greedy, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    return run


ENGINES: dict[str, Callable[[str, int, float], Run]] = {
    "ours": ours,
    "ours-off": partial(ours, points=False),
    "transformers": transformers,
    "vllm": vllm,
}


def main() -> None:
    name, model, threads, max_step = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        run = ENGINES[name](model, int(threads), float(max_step))
    for line in sys.stdin:
        question = json.loads(line)
        start = time.perf_counter()
        tokens = run(question["variant"], question["prompts"], question["new_tokens"])
        seconds = time.perf_counter() - start
        print(ANSWER + json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
