"""Soak test of the engine: random arrivals, cancellations and injected exceptions, for as long as wanted.

    python benchmarks/soak.py [--minutes 10] [--seed 0] [--policy qllm] [--merge] [--evict offload]

A tiny random MoE on the CPU, memory kept short. At the end every request must have been answered, no KV block may be
missing and the process's memory must not have grown; exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from qllm.executor.engine.clock import RealClock
from qllm.executor.engine.engine import Engine
from qllm.executor.engine.execution import Execution, RealExecution
from qllm.executor.engine.requests import EngineRequest
from qllm.executor.errors import RequestFailed
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.passes import RunningPass
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits, Pass, make_policy
from qllm.traces.step_times.cost_model import PassCost

BLOCKS = 40
EARLY = 0.2  # of the time and of the requests, when memory is read for the first time
GROWTH_MB = 64  # allowed from then to the end: allocators and thread pools fill up late


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


def memory_mb() -> float:
    """Resident memory of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(
    seconds: float,
    seed: int = 0,
    policy: str = "qllm",
    evict: str = "offload",
    merge: bool = False,
    clients: int = 6,
    at_least: int = 0,
) -> dict:
    """Run it for so many seconds, and on until `at_least` requests have been sent.

    Returns counts of endings, "sent", "unanswered", "leaked_blocks", "passes", and resident memory in MB: "early_mb",
    after a fifth of the way, and "late_mb", at the end.
    """
    rng = random.Random(seed)
    limits = Limits(max_seqs=6, max_batched_tokens=96, kv_blocks=BLOCKS, block_size=4, urgent_blocks=4, evict=evict)
    endings: Counter[str] = Counter()
    lock = threading.Lock()
    sent = 0
    until = time.monotonic() + seconds
    early = 0.0
    model = prepare_model(tiny_model("qwen3_moe"))
    chosen = make_policy(policy, **({"merge": True} if merge else {}))
    with Engine(model, policy=chosen, limits=limits, clock=FaultyClock(rng, 4000), seed=seed) as engine:

        def client(own: random.Random) -> None:
            nonlocal sent
            while time.monotonic() < until or sent < at_least:
                prompt = [own.randrange(3, 96) for _ in range(own.randrange(1, 60))]
                with lock:
                    sent += 1
                new = own.randrange(1, 24)
                stream = engine.submit(
                    prompt, max_new_tokens=new, priority=own.randrange(3), temperature=own.choice((0, 1)), stop=()
                )
                give_up = own.randrange(new) if own.random() < 0.25 else None
                if give_up == 0:
                    time.sleep(own.random() * 0.02)
                    stream.cancel()
                try:
                    for _ in stream:
                        if len(stream.tokens) == give_up:
                            stream.cancel()
                except RequestFailed as error:
                    if not isinstance(error.__cause__, Injected):
                        raise
                with lock:
                    endings[stream.finish_reason or "unanswered"] += 1
                time.sleep(own.expovariate(100))

        threads = [threading.Thread(target=client, args=(random.Random(seed + i),)) for i in range(clients)]
        for thread in threads:
            thread.start()
        while time.monotonic() < until - (1 - EARLY) * seconds or sent < EARLY * at_least:
            time.sleep(0.01)
        early = memory_mb()
        for thread in threads:
            thread.join()
        stats = engine.stats()
        held = engine.call(lambda loop: loop.memory.held)
        late = memory_mb()
    return {
        **endings,
        "sent": sent,
        "unanswered": sent - sum(endings.values()),
        "leaked_blocks": max(held, BLOCKS - stats.free_blocks),
        "passes": stats.passes,
        "early_mb": round(early, 1),
        "late_mb": round(late, 1),
    }


def flaws(found: dict) -> list[str]:
    """What is wrong with the outcome of `soak`, [] if nothing is."""
    out = [f"{found[key]} {key}" for key in ("unanswered", "leaked_blocks") if found[key]]
    grown = found["late_mb"] - found["early_mb"]
    return out + ([f"memory grew by {grown:.0f} MB"] if grown > GROWTH_MB else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", default="qllm")
    parser.add_argument("--merge", action="store_true", help="merge suspended passes' tokens at shared experts")
    parser.add_argument("--evict", choices=("recompute", "offload"), default="offload")
    args = parser.parse_args()
    found = soak(args.minutes * 60, args.seed, args.policy, args.evict, args.merge)
    print(json.dumps(found))
    wrong = flaws(found)
    if wrong:
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
