"""How fast the simulator is: passes and requests per second on one core, memory, and time against size.

    python benchmarks/sim_speed.py [--out docs/results/sim_speed.json]

Measured on the machine that runs it. Every layer and expert of every pass is resolved and the routing is drawn. The
whole-process figures start a fresh Python each, imports included. Medians of alternated repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
from results_file import add_out, save, this_machine

from qllm.scheduler import Limits, make_policy
from qllm.sim import simulate
from qllm.traces.requests.generate import generate
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.timings import Timings

PEERS = """Peers (seen on such a machine, two cores): Vidur 3,000-6,000 iterations/s without experts, 8-11 s for 512
requests; NVIDIA Dynamo's replay (Rust) 0.2-0.4 million iterations/s; neither resolves experts."""

MODELS = {  # timing trace -> requests per second that keep an A100 busy with conversations
    "a100-mixtral-8x7b-int4": 3.0,
    "a100-qwen3-30b-a3b-bf16": 6.0,
}
CONVERSATION = {
    "arrival": {"process": "poisson"},
    "classes": {
        "ls": {"share": 0.2, "prompt": {"quantiles": "azure_conv"}, "output": {"quantiles": "azure_conv"}},
        "be": {"prompt": {"quantiles": "azure_conv"}, "output": {"quantiles": "azure_conv"}},
    },
}


def once(timings: str, policy: str, requests: int, group_of_one: bool = True) -> tuple[float, int]:
    """(seconds, passes) of one simulation, the request trace already made."""
    trace = generate(CONVERSATION, rate=MODELS[timings], requests=requests, seed=1)
    steps = PassCostModel(Timings.load(timings), max_step=1e-6 if group_of_one else 1e-3)
    limits = Limits(max_seqs=64, max_batched_tokens=8192, kv_blocks=16_000)
    started = time.perf_counter()
    result = simulate(
        trace, priorities={"ls": 0, "be": 1}, policy=make_policy(policy), limits=limits, steps=steps, seed=1
    )
    return time.perf_counter() - started, result.passes


def decode_only(timings: str, batch: int = 32, tokens: int = 3000) -> tuple[float, int]:
    """The same for a batch that only decodes: the cost of a pass by itself."""
    spec = {
        "arrival": {"process": "poisson"},
        "classes": {"ls": {"prompt": {"fixed": 64}, "output": {"fixed": tokens}}},
    }
    trace = generate(spec, rate=1e6, requests=batch, seed=1)
    steps = PassCostModel(Timings.load(timings), max_step=1e-3)
    started = time.perf_counter()
    result = simulate(
        trace, priorities={"ls": 0}, policy=make_policy("fcfs"), limits=Limits(max_seqs=batch), steps=steps, seed=1
    )
    return time.perf_counter() - started, result.passes


def process(timings: str, policy: str, requests: int) -> dict[str, float]:
    """Seconds and peak memory (bytes) of a whole fresh process."""
    code = (
        "import resource, json, sys; sys.path.insert(0, 'benchmarks')\n"
        f"import sim_speed; s, p = sim_speed.once({timings!r}, {policy!r}, {requests})\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "print(json.dumps({'inside': s, 'passes': p, 'peak': peak}))"
    )
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {"seconds": time.perf_counter() - started, **json.loads(out)}


def start_up(*argv: str, repeats: int = 7) -> float:
    """Median seconds of a command less those of an empty Python."""
    empty, mine = [], []
    for _ in range(repeats):
        for times, command in ((empty, [sys.executable, "-c", "pass"]), (mine, [*argv])):
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - started)
    return statistics.median(mine) - statistics.median(empty)


def speeds() -> list[dict[str, Any]]:
    """Passes per second on one core: conversations with every expert a boundary, and a batch that only decodes."""
    rows = []
    for timings in MODELS:
        once(timings, "qllm", 500)
        runs = {
            policy: [once(timings, policy, 5000) for _ in range(5)] for policy in ("fcfs", "chunked", "qllm", "slack")
        }
        for load, measured in (runs | {"decoding": [decode_only(timings) for _ in range(5)]}).items():
            found = [passes / seconds for seconds, passes in measured]
            row = {"timings": timings, "load": load, "passes_per_s": statistics.median(found)}
            rows.append({**row, "lowest": min(found)})
            print(f"  {timings:26} {load:8} {row['passes_per_s']:12,.0f}  (lowest {min(found):,.0f})")
    return rows


def processes() -> list[dict[str, Any]]:
    """Requests per second of a whole process."""
    rows = []
    for timings in MODELS:
        for policy in ("fcfs", "qllm", "slack"):
            seconds = statistics.median(process(timings, policy, 5000)["seconds"] for _ in range(5))
            rows.append({"timings": timings, "policy": policy, "seconds": seconds, "requests_per_s": 5000 / seconds})
            print(f"  {timings:26} {policy:8} {seconds:6.2f} s  {5000 / seconds:8,.0f} requests/s")
    return rows


def sizes() -> list[dict[str, Any]]:
    """Seconds and peak memory against the number of requests; the last row's growth: time ~ requests^growth."""
    rows = []
    for n in (1_000, 3_000, 10_000, 30_000, 100_000):
        r = process("a100-mixtral-8x7b-int4", "qllm", n)
        rows.append({"requests": n, "seconds": r["inside"], "peak_mb": r["peak"] / 1e6})
        each = 1e6 * r["inside"] / n
        print(f"  {n:8,} requests  {r['inside']:7.2f} s  {each:6.1f} us each  peak {r['peak'] / 1e6:6.0f} MB")
    logs = [np.log([row[key] for row in rows]) for key in ("requests", "seconds")]
    growth = float(np.polyfit(*logs, 1)[0])
    print(f"  growth: time ~ requests^{growth:.2f}")
    return [{**row, "growth": growth} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_out(parser, "sim_speed")
    args = parser.parse_args()
    print(PEERS)
    print("\npasses per second, one core (median of 5; conversations, every expert a boundary; and decoding only)")
    passes = speeds()
    print("\nwhole process, 5,000 requests of conversation lengths (median of 5)")
    whole = processes()
    print("\ntime and memory against the number of requests (qllm, whole process)")
    growth = sizes()
    print(f"\nimport qllm.sim: {start_up(sys.executable, '-c', 'import qllm.sim'):.3f} s; ", end="")
    print(f"qllm --help: {start_up(sys.executable, '-m', 'qllm', '--help'):.3f} s (above an empty Python)")
    if args.out:
        tables = {"passes": passes, "processes": whole, "sizes": growth}
        save(args.out, source=f"measured on {this_machine()}, one core", tables=tables)


if __name__ == "__main__":
    main()
