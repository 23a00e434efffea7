"""This engine under the load of `mixed_load.py`, in a process of its own, so that the driver does not disturb it.

    python benchmarks/mixed_load_worker.py MODEL THREADS

Answers one line, {"policy", "settings", "max_step", "warmup", "isolated", "load": lists of requests}, with {"isolated",
"load"}: times of each request, seconds on the engine's clock, from the moment that the schedule says.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from processes import ANSWER

from qllm.executor.engine.engine import Engine
from qllm.executor.engine.stream import Stream
from qllm.executor.model.loading import load_model
from qllm.scheduler import Limits, make_policy

# 131,072 tokens of KV, 2 GiB, as vLLM has; passes of at most 1,024 tokens, since what lies between two layers' experts
# and attention is not cut (vLLM: 2,048 tokens a step)
LIMITS = Limits(kv_blocks=8192, max_batched_tokens=1024)


def send(engine: Engine, r: dict[str, Any]) -> Stream:
    return engine.submit(r["prompt"], max_new_tokens=r["nout"], priority=r["prio"], stop=())


def times(stream: Stream, sched: float) -> dict[str, Any]:
    """What the engine recorded of a request due at `sched`."""
    done = stream.result()
    r = done.times
    return {
        "tokens": len(done.tokens),
        "first_launch": r.first_launch - sched,
        "first": r.first_token - sched,
        "last": r.finish - sched,
        "sent": r.arrival - sched,
        "suspended": r.suspended,
        "preemptions": r.preemptions,
    }


def open_loop(engine: Engine, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Send each request at its time, whatever became of the others."""
    start = engine.clock.now() + 0.2
    streams = []
    for r in requests:
        time.sleep(max(0.0, start + r["sched"] - engine.clock.now()))
        streams.append(send(engine, r))
    return [times(stream, start + r["sched"]) for stream, r in zip(streams, requests, strict=True)]


def alone(engine: Engine, r: dict[str, Any]) -> dict[str, Any]:
    time.sleep(0.05)
    now = engine.clock.now()
    return times(send(engine, r), now)


def main() -> None:
    import torch  # after the engine, which sets how OpenMP's threads wait

    model, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    loaded = load_model(model, dtype="float32")
    q = json.loads(sys.stdin.readline())
    policy = make_policy(q["policy"], **q["settings"])
    with Engine(loaded, policy=policy, limits=LIMITS, max_step=q["max_step"]) as engine:
        for r in q["warmup"]:
            alone(engine, r)
        isolated = [alone(engine, r) for r in q["isolated"]]
        load = open_loop(engine, q["load"])
    print(ANSWER + json.dumps({"isolated": isolated, "load": load}), flush=True)


if __name__ == "__main__":
    main()
