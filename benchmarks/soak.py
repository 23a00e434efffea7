"""Soak test of the engine: rounds of random load over every family, policy and setting, for as long as wanted.

    python benchmarks/soak.py [--minutes 20] [--seed 0] [--family qwen3_moe]        (or: make soak)

A round serves one tiny random model of a family (CPU, float32) to six clients, with a random policy, random limits with
little KV, random cuts, greedy and sampled requests, stop tokens, cancellations and exceptions thrown into passes; now
and then a policy that raises. Half of the rounds are closed while requests are under way.

Every output must be that of `generate` (sampled ones: that of the same request alone), and one that was cut short a
beginning of it. Every request must be answered, every block come back, `close()` end, and memory not grow. Prints one
JSON object; exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import random
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qllm.executor.engine.clock import RealClock
from qllm.executor.engine.engine import Engine
from qllm.executor.engine.execution import Execution, RealExecution
from qllm.executor.engine.requests import EngineRequest
from qllm.executor.errors import EngineClosed, RequestFailed, UnsupportedModelError
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.packed_batch import Batch
from qllm.executor.model.passes import RunningPass
from qllm.executor.model.split import Split
from qllm.executor.testing import families, tiny_model
from qllm.scheduler import POLICIES, Limits, Pass, Policy, PolicyError, Scheduler, make_policy
from qllm.traces.step_times.cost_model import PassCost

PROMPTS, NEW_TOKENS, VOCABULARY = 6, 20, 96
CLIENTS = 6
ROUND_S = (1.0, 4.0)  # seconds that a round lasts
PATIENCE_S = 60.0  # after which an engine that does not close, or a request without an end, counts as hanging
#: From when every family was loaded and half of the time is over: until then libraries fill their caches.
GROWTH_MB = 100
M_ARENA_MAX = -8  # of glibc's mallopt
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 9, "top_p": 0.7},
)


class Injected(RuntimeError):
    """The exception that is thrown into passes."""


class FaultyExecution(RealExecution):
    """Throws an exception into the pass at one point in `every`."""

    def __init__(
        self,
        running: RunningPass,
        sequences: tuple[EngineRequest, ...],
        granularity: str,
        rng: random.Random,
        every: int,
    ):
        super().__init__(running, sequences, granularity)
        self._rng, self._every = rng, every

    def advance(self) -> bool:
        more = super().advance()
        if more and self._rng.randrange(self._every) == 0:
            self.running.fail(Injected("injected"))
        return more


class FaultyClock(RealClock):
    """Real time, with executions that break."""

    def __init__(self, rng: random.Random, every: int):
        super().__init__()
        self._rng, self._every = rng, every

    def execution(
        self,
        p: Pass,
        running: RunningPass,
        sequences: tuple[EngineRequest, ...],
        cost: PassCost | None,
        granularity: str,
    ) -> Execution:
        return FaultyExecution(running, sequences, granularity, self._rng, self._every)


class Raising(Policy):
    """Serves some decisions, then raises."""

    def __init__(self, decisions: int):
        self._left = decisions

    def select(self, s: Scheduler, batch: Any, now: float) -> None:
        self._left -= 1
        if self._left < 0:
            raise Injected("in a policy")
        super().select(s, batch, now)


@dataclass
class Subject:
    """A prepared model, and what each prompt is to be answered with in each setting."""

    model: PreTrainedModel
    prompts: list[list[int]]
    answers: list[list[list[int]]]  #: by prompt and setting, token ids [NEW_TOKENS]


def subject(family: str) -> Subject:
    """Raises UnsupportedModelError for a family that is not served, or of which no tiny model generates text."""
    rng = random.Random(family)
    prompts = [[rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(1, 50))] for _ in range(PROMPTS)]
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    try:
        model = tiny_model(family)
        greedy = [model.generate(torch.tensor([p]), **settings)[0, len(p) :].tolist() for p in prompts]  # type: ignore[arg-type]
    except Exception as error:  # of its own rules, when a size has a name that is unknown here
        raise UnsupportedModelError(f"{family}: no tiny model: {error}") from error
    prepare_model(model)
    with Engine(model, limits=Limits(kv_blocks=40)) as engine:
        answers = [
            [answer, *(alone(engine, prompt, number, s) for number, s in enumerate(SETTINGS) if s)]
            for prompt, answer in zip(prompts, greedy, strict=True)
        ]
    return Subject(model, prompts, answers)


def alone(engine: Engine, prompt: list[int], seed: int, settings: dict[str, Any]) -> list[int]:
    return engine.submit(prompt, max_new_tokens=NEW_TOKENS, stop=(), seed=seed, **settings).result().tokens


def some_policy(rng: random.Random) -> Policy:
    if rng.random() < 0.05:
        return Raising(rng.randrange(1, 60))
    name = rng.choice(sorted(POLICIES))
    settings: dict[str, Any] = {"merge": True} if name in ("qllm", "hybrid") and rng.random() < 0.4 else {}
    return make_policy(name, **settings)


def some_splits(rng: random.Random) -> Split:
    return Split(rng.choice((1, 2, 8)), rng.choice((1, 3, 64)))


@dataclass
class Tally:
    """What happened, over all rounds and clients."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def flaw(self, text: str) -> None:
        with self.lock:
            self.wrong.append(text)


def client(engine: Engine, s: Subject, tally: Tally, rng: random.Random, until: float, where: str) -> None:
    """Send requests one after another until then, or until the engine is closed."""
    while time.monotonic() < until:
        prompt, setting = rng.randrange(PROMPTS), rng.choice((0, 0, 0, *range(len(SETTINGS))))
        new, give_up = rng.randint(1, NEW_TOKENS), rng.randrange(NEW_TOKENS) if rng.random() < 0.25 else None
        expected = s.answers[prompt][setting][:new]
        stop = (expected[rng.randrange(new)],) if rng.random() < 0.2 else ()
        if stop:
            expected = expected[: expected.index(stop[0]) + 1]
        settings: dict[str, Any] = {"max_new_tokens": new, "priority": rng.randrange(3), "stop": stop, "seed": setting}
        try:
            stream = engine.submit(s.prompts[prompt], **settings, **SETTINGS[setting])
        except EngineClosed:
            return
        tally.count("sent")
        if give_up == 0:
            stream.cancel()
        ended = None
        try:
            for _ in stream:
                if len(stream.tokens) == give_up:
                    stream.cancel()
            ended = stream.finish_reason
        except RequestFailed as error:
            ended = "failed" if isinstance(error.__cause__, Injected) else f"failed: {error!r}"
        except EngineClosed:
            ended = "closed"
        tally.count(str(ended))
        whole = ended in ("stop", "length")
        if ended not in ("stop", "length", "cancelled", "failed", "closed"):
            tally.flaw(f"{where}: a request ended with {ended}")
        if stream.tokens != (expected if whole else expected[: len(stream.tokens)]):
            tally.flaw(f"{where}: prompt {prompt}, {settings}, {SETTINGS[setting]}: {stream.tokens} for {expected}")
        time.sleep(rng.expovariate(200))


def one_round(family: str, s: Subject, tally: Tally, rng: random.Random) -> None:
    policy = some_policy(rng)
    blocks = rng.randrange(20, 60)
    limits = Limits(
        max_seqs=rng.choice((2, 6)),
        max_batched_tokens=rng.choice((16, 96)),
        kv_blocks=blocks,
        block_size=4,
        urgent_blocks=rng.choice((0, 2)),
        max_suspended_tokens=rng.choice((None, 60)),
        evict=rng.choice(("recompute", "offload")),
    )
    splits = random.Random(rng.random())
    where = f"{family}, {policy!r}, {limits}"

    def splitter(_: Batch) -> Split:
        return some_splits(splits)

    clock = FaultyClock(random.Random(rng.random()), rng.choice((300, 4000, 10**9)))
    engine = Engine(s.model, policy=policy, limits=limits, clock=clock, splitter=splitter)
    lasts = rng.uniform(*ROUND_S)
    until, early = time.monotonic() + lasts, rng.random() < 0.5
    rngs = [random.Random(rng.random()) for _ in range(CLIENTS)]
    threads = [threading.Thread(target=client, args=(engine, s, tally, r, until, where), daemon=True) for r in rngs]
    for thread in threads:
        thread.start()
    if early:
        time.sleep(lasts * rng.random())
        tally.count("rounds closed early")
    else:
        for thread in threads:
            thread.join(lasts + PATIENCE_S)
        try:
            stats, held = engine.stats(), engine.call(lambda loop: loop.memory.held)
            if stats.free_blocks != blocks or held or stats.host_bytes:
                tally.flaw(f"{where}: {blocks - stats.free_blocks} blocks not back, {held} held")
        except EngineClosed as closed:
            if not (isinstance(policy, Raising) and isinstance(closed.__cause__, PolicyError)):
                tally.flaw(f"{where}: {closed}")
    closer = threading.Thread(target=engine.close, daemon=True)
    closer.start()
    for thread in (closer, *threads):
        thread.join(PATIENCE_S)
        if thread.is_alive():
            tally.flaw(f"{where}: {'close()' if thread is closer else 'a request'} hangs")
    tally.count("rounds")


def one_arena() -> None:
    """Have all threads share glibc's heap, so that what grows is a leak.

    By default each thread has an arena of its own, and each round starts an engine's thread: what their arenas keep
    unused looked like a leak of 300 MB in ten minutes, while not one object more was alive.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, 1)


def memory_mb() -> float:
    """Resident memory of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(seconds: float, seed: int = 0, only: list[str] | None = None, rounds: int = 0) -> dict[str, Any]:
    """Rounds for so many seconds, and at least so many; what happened, and what was "wrong"."""
    rng, tally = random.Random(seed), Tally()
    subjects: dict[str, Subject] = {}
    refused: set[str] = set()
    until, order, early = time.monotonic() + seconds, [*(only or families())], 0.0
    rng.shuffle(order)
    begun = 0
    while time.monotonic() < until or begun < rounds:
        family = order[begun % len(order)]
        if family not in subjects:
            try:
                subjects[family] = subject(family)
            except UnsupportedModelError:
                refused.add(family)
                order.remove(family)
                continue
        begun += 1
        one_round(family, subjects[family], tally, rng)
        if not early and begun > len(order) and time.monotonic() > until - seconds / 2:
            early = memory_mb()
    late = memory_mb()
    if early and late - early > GROWTH_MB:
        tally.flaw(f"memory grew from {early:.0f} to {late:.0f} MB")
    found = {"families": sorted(subjects), "refused": sorted(refused), **tally.counts}
    return {**found, "early_mb": round(early), "late_mb": round(late), "wrong": tally.wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", action="append", help="only this one; may be given several times")
    args = parser.parse_args()
    torch.set_num_threads(1)
    one_arena()
    warnings.filterwarnings("ignore", "another engine of this process")
    logging.getLogger("qllm").setLevel(logging.CRITICAL)  # it tells of every exception that is thrown in
    threading.excepthook = lambda a: None if isinstance(a.exc_value, PolicyError) else sys.__excepthook__(*a[:3])
    found = soak(args.minutes * 60, args.seed, args.family)
    print(json.dumps(found, indent=1))
    if found["wrong"]:
        sys.exit(f"{len(found['wrong'])} things are wrong")


if __name__ == "__main__":
    main()
