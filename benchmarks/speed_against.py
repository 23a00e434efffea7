"""The simulator's speed against that of another revision, both run in turn on this machine.

    python benchmarks/speed_against.py --base REV [--repeats 5] [--only WORD ...]

REV is checked out into a worktree that is removed in the end. Each load runs in a fresh process by turns with either
build, on the same requests, and counts the CPU seconds of the simulation (of the whole command for `demo`). The ratio
is the median over the pairs of runs, so a machine that is busy with other things slows both down alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sim_speed import MODELS, decode_only, once

from qllm.scheduler import Limits, make_policy
from qllm.sim import simulate
from qllm.traces.requests.generate import generate
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.timings import Timings

ROOT = Path(__file__).parents[1]
REPLAYED = 23_608  #: requests of Mooncake's tool-and-agent trace, in an hour
#: Lengths with that trace's means (8,596 and 182 tokens); the lognormal shape is an assumption, as is the arrival.
MOONCAKE = {
    "arrival": {"process": "poisson"},
    "classes": {
        "ls": {
            "prompt": {"lognormal": {"mean": 8596, "sigma": 1.0, "min": 16, "max": 120_000}},
            "output": {"lognormal": {"mean": 182, "sigma": 1.0, "min": 1, "max": 2000}},
        }
    },
}


def replay() -> tuple[float, int]:
    """(seconds, passes) of as many requests of such lengths under `priority`."""
    trace = generate(MOONCAKE, rate=REPLAYED / 3600, requests=REPLAYED, seed=1)
    steps = PassCostModel(Timings.load("a100-qwen3-30b-a3b-bf16"))
    limits = Limits(max_seqs=64, max_batched_tokens=16_384, kv_blocks=40_000)
    started = time.perf_counter()
    result = simulate(trace, priorities={"ls": 0}, policy=make_policy("priority"), limits=limits, steps=steps, seed=1)
    return time.perf_counter() - started, result.passes


LOADS = {
    **{
        f"{policy} {timings}": partial(once, timings, policy, 3000)
        for policy in ("fcfs", "chunked", "qllm")
        for timings in MODELS
    },
    **{f"decoding {timings}": partial(decode_only, timings) for timings in MODELS},
    "replay": replay,
}


def measure(load: str) -> dict[str, float]:
    """CPU seconds of a run of `load` by the build that is imported; the second, but for the long one."""
    if load != "replay":
        LOADS[load]()
    before = time.process_time()
    passes = LOADS[load]()[1]
    return {"cpu_s": time.process_time() - before, "passes": passes}


def run(build: Path, load: str) -> dict[str, float]:
    """`measure` in a process of its own that imports `build`; for `demo` the CPU seconds of the whole command."""
    environment = {**os.environ, "PYTHONPATH": str(build), "OMP_NUM_THREADS": "1"}
    if load != "demo":
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", load]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        return dict(json.loads(out))
    with tempfile.TemporaryDirectory() as out_folder:
        before = _children()
        config = ROOT / "configs" / "paper.yaml"
        command = [sys.executable, "-m", "qllm", "simulate", str(config), "--out", "paper"]
        subprocess.run(command, env=environment, cwd=out_folder, capture_output=True, check=True)
        return {"cpu_s": _children() - before, "passes": 0}


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def builds(base: str) -> Iterator[tuple[Path, Path]]:
    """Folders from which `base` and the working tree are imported as installed: all packages inside qllm."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), base], cwd=ROOT, check=True, capture_output=True
        )
        try:
            yield _linked(tree, Path(folder, "base")), _linked(ROOT, Path(folder, "now"))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def _linked(tree: Path, build: Path) -> Path:
    package = build / "qllm"
    package.mkdir(parents=True)
    for part in (*(tree / "qllm").iterdir(), *(tree / name for name in ("scheduler", "sim", "traces", "executor"))):
        (package / part.name).symlink_to(part)
    return build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HEAD", help="revision to compare with (default: HEAD)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs of each load (default: 5)")
    parser.add_argument("--only", nargs="*", default=[], help="loads whose name holds one of these words")
    parser.add_argument("--measure", choices=LOADS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with builds(args.base) as (base, now):
        print(f"CPU seconds, medians of {args.repeats}; ratio: median of the pairs (lowest, highest)")
        for load in (*LOADS, "demo"):
            if args.only and not any(word in load for word in args.only):
                continue
            pairs = [(run(base, load), run(now, load)) for _ in range(args.repeats)]
            if any(before["passes"] != after["passes"] for before, after in pairs):
                raise SystemExit(f"{load}: the builds simulate different numbers of passes")
            ratios = [before["cpu_s"] / after["cpu_s"] for before, after in pairs]
            old, new = (statistics.median(pair[i]["cpu_s"] for pair in pairs) for i in (0, 1))
            spread = f"({min(ratios):.2f}, {max(ratios):.2f})"
            print(f"  {load:34} {old:7.3f} -> {new:7.3f} s  {statistics.median(ratios):6.2f}x {spread}", flush=True)


if __name__ == "__main__":
    main()
