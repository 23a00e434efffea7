"""A sweep of many small simulations: how long it takes, and how much memory the table of all of them does.

    python benchmarks/large_sweep.py [--points 10000] [--jobs 2] [--backend local]

Rates and seeds make the points; every request of every simulation is a row of one table. Simulated on the step times
that the configuration names; what is told of is this machine's time and memory.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from qllm import simulate

CONFIG = """\
name: large_sweep
timings: a100-mixtral-8x7b-int4
classes:
  ls: {priority: 0, share: 0.25, prompt: {uniform: [50, 500]}, output: {fixed: 5}, slo: {ttft: 0.5}}
  be: {priority: 1, prompt: {uniform: [500, 2000]}, output: {fixed: 5}}
requests: 20
policies: [priority, slack]
"""
SEEDS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10_000, help="simulations, a multiple of 100")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--backend", default="local")
    args = parser.parse_args()
    rates = np.linspace(0.5, 5, args.points // (2 * SEEDS)).round(4).tolist()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "large_sweep.yaml"
        file.write_text(CONFIG, encoding="utf-8")
        began = time.perf_counter()
        swept = [f"sweep.rate={rates}", f"seeds={SEEDS}"]
        results = simulate(file, set=swept, jobs=args.jobs, backend=args.backend, any_size=True)
        seconds = time.perf_counter() - began
    requests = results.requests
    runs = requests[["policy", "rate", "seed"]].drop_duplicates()
    print(f"{len(runs)} simulations, {len(requests)} rows, {len(results.failures)} failed")
    print(f"{seconds:.0f} s on {args.jobs} processes ({args.backend}), {1e3 * seconds / len(runs):.1f} ms each")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    print(f"peak memory of the process that holds the table: {peak:.2f} GB")
    print(f"table: {requests.memory_usage(deep=True).sum() / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
