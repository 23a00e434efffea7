"""What clients see: times to the first token, alone and beside long prompts, blocking, and tokens per second."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from transformers import ContinuousBatchingConfig, GenerationConfig

from gpu_parts.world import FEWEST, World, middle
from qllm.executor.engine.engine import Engine
from qllm.executor.engine.requests import RequestTimes
from qllm.executor.engine.stream import Stream
from qllm.executor.model.hooks import NAME

LS_EVERY_S = 0.5  # mean seconds between two LS requests ...
LS_GAP_S = 0.1  # ... and the least, so that none waits for another
BE_LOAD = 0.6
LEAST_BE_S = 0.02  # a tiny model's BE requests would come faster than they can be sent
BE_IN_FLIGHT = 4  # LS requests beside each long pass, about
LEAST_RUNS = 20  # long passes, before it is given up that one meets an LS request
TRANSFORMERS_PAGE = 256  # tokens, its default


def times_of(stream: Stream) -> RequestTimes:
    times = stream.result().times
    if times.first_token != times.first_token:
        raise RuntimeError("a request ended without a token")
    return times


def ls(world: World, engine: Engine, number: int) -> Stream:
    """An LS request, of which the first token counts."""
    return engine.submit(world.tokens(world.sizes.prompt, ("ls", number)), max_new_tokens=1, priority=0, stop=())


def lone_ttft(world: World, engine: Engine) -> list[float]:
    """Milliseconds to the first token of LS requests one at a time on the idle engine; the first ones warm up."""
    found = []
    for number in range(-3, world.sizes.lone):
        times = times_of(ls(world, engine, number))
        if number >= 0:
            found.append(1e3 * (times.first_token - times.arrival))
        if world.left < 0 and len(found) >= FEWEST:
            break
        time.sleep(0.02)
    return found


def ttft(world: World) -> None:
    found = lone_ttft(world, world.engine())
    world.say("ls_ttft", middle(found), f"fastest {min(found):.2f}, slowest {max(found):.2f}, {len(found)} requests")


# ---- beside long prompts ---------------------------------------------------------------------------------------


def blocking(world: World) -> None:
    _blocking(world, world.engine(), world.sizes.long, "blocking_8192")


def blocking_long(world: World) -> None:
    """A pass over the longest prompt whole, which takes an engine of its own."""
    engine = world.engine(graphs="use", tokens=world.sizes.longest)
    _blocking(world, engine, world.sizes.longest, "blocking_32768")


def _blocking(world: World, engine: Engine, length: int, name: str) -> None:
    """LS requests at random moments of one BE pass after another: from arrival until their own pass begins."""
    rng, waits, runs, number = random.Random(name), list[float](), 0, 0
    lone_ttft(world, engine)
    world.fill()
    taken = _be_alone(world, engine, length, 1)
    while world.left > 0 or (not waits and runs < LEAST_RUNS):
        start = time.monotonic()
        be = engine.submit(world.tokens(length, (name, runs)), max_new_tokens=1, priority=1, stop=())
        beside = []
        while time.monotonic() - start < taken:
            time.sleep(rng.uniform(0, 2 * taken / BE_IN_FLIGHT))
            beside.append(times_of(ls(world, engine, number)))
            number += 1
        long = times_of(be)
        inside = [t for t in beside if long.first_launch <= t.arrival and t.first_launch < long.finish]
        waits += [1e3 * (t.first_launch - t.arrival) for t in inside]
        runs += 1
    told = f"p50 {np.percentile(waits or [np.nan], 50):.2f}, {len(waits)} LS requests in {runs} passes"
    if not waits:
        raise RuntimeError(f"no LS request met a BE pass ({told})")
    world.say(name, np.percentile(waits, 99), f"{told}, BE alone {1e3 * taken:.0f} ms")


def _be_alone(world: World, engine: Engine, length: int, new: int) -> float:
    """Seconds of a BE request on the idle engine, the faster of two."""
    found = []
    for number in range(2):
        stream = engine.submit(world.tokens(length, number), max_new_tokens=new, priority=1, stop=())
        times = times_of(stream)
        found.append(times.finish - times.arrival)
    return min(found)


def mixed_qllm(world: World) -> None:
    _mixed(world, "qllm")


def mixed_hybrid(world: World) -> None:
    _mixed(world, "hybrid")


def _mixed(world: World, policy: str) -> None:
    """Open loop: BE prompts as a Poisson process at BE_LOAD, LS requests LS_GAP_S and an exponential time apart."""
    engine = world.engine(policy)
    alone = middle(lone_ttft(world, engine))
    world.fill()
    taken = max(LEAST_BE_S, _be_alone(world, engine, world.sizes.long, world.sizes.be_new))
    rng = random.Random(policy)
    seconds = max(4 * taken, 2.0, world.left - 4 * taken)
    arrivals = [(at, 1) for at in _arrivals(seconds, lambda: rng.expovariate(BE_LOAD / taken))]
    arrivals += [(at, 0) for at in _arrivals(seconds, lambda: LS_GAP_S + rng.expovariate(1 / (LS_EVERY_S - LS_GAP_S)))]
    prompts = [world.tokens(world.sizes.long, ("be", i)) for i in range(4)]
    streams: dict[int, list[Stream]] = {0: [], 1: []}
    start = time.monotonic()
    for number, (at, priority) in enumerate(sorted(arrivals)):
        time.sleep(max(0.0, start + at - time.monotonic()))
        if priority == 0:
            streams[0].append(ls(world, engine, number))
        else:
            prompt, new = prompts[number % len(prompts)], world.sizes.be_new
            streams[1].append(engine.submit(prompt, max_new_tokens=new, priority=1, stop=()))
    urgent = [times_of(stream) for stream in streams[0]]
    long = _ended(world, streams[1])
    ttfts = [1e3 * (t.first_token - t.arrival) for t in urgent]
    waits = [1e3 * (t.first_launch - t.arrival) for t in urgent]
    slower = statistics.fmean(t.finish - t.arrival for t in long) / taken if long else float("nan")
    p50, p99 = np.percentile(ttfts or [np.nan], [50, 99])
    if not ttfts:
        raise RuntimeError("no LS request arrived")
    told = f"TTFT alone {alone:.2f}, p50 {p50:.2f}, p99 {p99:.2f} ms; {len(ttfts)} LS, "
    told += f"{len(long)} of {len(streams[1])} BE requests"
    world.say(f"ls_p99_{policy}", p99 / alone, told)
    world.say(f"blocking_p99_{policy}", np.percentile(waits, 99), f"BE turnaround {slower:.2f} times that alone")


def _ended(world: World, streams: list[Stream]) -> list[RequestTimes]:
    """The times of those that end while there is time; the others are cancelled."""
    for stream in streams:
        if world.left < 0:
            for left in streams:
                left.cancel()
            break
        stream.result()
    return [times_of(stream) for stream in streams if stream.result().finish_reason == "length"]


def _arrivals(seconds: float, gap: Callable[[], float]) -> list[float]:
    found, at = [], gap()
    while at < seconds:
        found.append(at)
        at += gap()
    return found


# ---- tokens per second -----------------------------------------------------------------------------------------


def throughput(world: World) -> None:
    """The same prompts by the engine, then by transformers' continuous batching, on the same weights."""
    sizes = world.sizes
    prompts = [world.tokens(sizes.request_prompt, number) for number in range(sizes.requests)]
    world.fill()
    world.until -= 0.6 * world.left
    engine = world.engine()
    speeds: list[float] = []
    while len(speeds) < 2 or (world.left > 0 and len(speeds) < 6):  # the first one warms up
        speeds.append(_engine_speed(engine, prompts, sizes.request_new))
    ours = middle(speeds[1:])
    world.say("tokens_per_s", ours, f"{len(speeds) - 1} runs, {min(speeds[1:]):.0f} to {max(speeds[1:]):.0f}")
    world.close()  # transformers takes its own memory for KV
    theirs = _transformers_speed(world, prompts, sizes.request_new)
    world.say("tokens_per_s_transformers", theirs, "generate_batch, grouped_mm, after a run to warm up")
    world.say("tokens_per_s_ratio", ours / theirs)


def _engine_speed(engine: Engine, prompts: list[list[int]], new: int) -> float:
    start = time.perf_counter()
    streams = [engine.submit(prompt, max_new_tokens=new, priority=0, stop=()) for prompt in prompts]
    tokens = sum(len(stream.result().tokens) for stream in streams)
    return tokens / (time.perf_counter() - start)


def _transformers_speed(world: World, prompts: list[list[int]], new: int) -> float:
    model, needed = world.model, len(prompts) * -(-(len(prompts[0]) + new) // TRANSFORMERS_PAGE)
    config = ContinuousBatchingConfig(num_blocks=2 * needed, max_batch_tokens=world.sizes.long)
    try:
        model.set_attn_implementation("sdpa")
        model.set_experts_implementation("grouped_mm")
        for tokens in (max(2, new // 16), new):
            greedy = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
            start = time.perf_counter()
            answers = model.generate_batch(
                prompts,
                generation_config=greedy,
                continuous_batching_config=config,
                progress_bar=False,
                max_new_tokens=tokens,
                persistent_manager=True,
            )
            seconds = time.perf_counter() - start
            made = sum(len(answer.generated_tokens) for answer in answers.values())
            if made < tokens * len(prompts):
                raise RuntimeError(f"transformers' continuous batching gave {made} tokens; its log says why")
    finally:
        with suppress(AttributeError):
            model.destroy_cached_continuous_batching_manager()
        model.set_attn_implementation(NAME)
        model.set_experts_implementation(NAME)
    return made / seconds
