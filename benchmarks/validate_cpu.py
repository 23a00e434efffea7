"""The simulator against the real engine on this CPU: calibrates and validates in one run.

    python benchmarks/validate_cpu.py FOLDER [--threads 2] [--requests 60] [--repeats 3] [--loads 0.3,0.6,0.85]

FOLDER: the checkpoint of benchmarks/make_moe.py (165.6 M random parameters, float32), made where it is missing. Rates
are those shares of the rate at which fcfs is simulated to be busy all the time. Policies fcfs, priority and qllm; long
best-effort prompts, short latency-sensitive ones. Prints the errors (with the calibrated step times, and with those at
the speed that the machine had in each run), their spread over the repeats and the largest contributions; writes
everything to --out. Needs a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from make_moe import make
from processes import Cores

from executor.calibrate import Extent, calibrate
from executor.subject import Subject, load_subject
from qllm.build import request_trace, scheduler_limits, step_model
from qllm.config import Config, load_config
from qllm.runs import Run, runs
from qllm.validate import compare
from qllm.validation_results import report, save
from scheduler import make_policy
from sim import simulate

CONFIG = {
    "name": "validate-cpu",
    "classes": {
        "ls": {"priority": 0, "share": 0.4, "prompt": {"uniform": [16, 128]}, "output": {"fixed": 16}},
        "be": {"priority": 1, "prompt": {"uniform": [256, 1024]}, "output": {"uniform": [8, 48]}},
    },
    "limits": {"max_seqs": 16, "max_tokens": 1024, "kv_blocks": 2048},
    "max_step": 0.005,
    "policies": ["fcfs", "priority", "qllm"],
}
EXTENT = Extent(max_tokens=1024, max_context=2048, max_batch=16)


def capacity(config: Config) -> float:
    """Requests per second that fcfs is simulated to finish while it always has work: all arrive at once."""
    trace = request_trace(config, 0).scaled(1e6)
    result = simulate(
        trace,
        priorities={name: job.priority for name, job in config.classes.items()},
        policy=make_policy("fcfs"),
        limits=scheduler_limits(config, step_model(config).timings),
        steps=step_model(config),
    )
    return len(trace) / result.makespan


def repeats(path: Path, args: argparse.Namespace, subject: Subject) -> Iterator[Run]:
    """The runs of each repeat in turn, each repeat after a calibration of its own: the machine drifts. The first has
    the one that the rates were chosen with."""
    for seed in range(args.repeats):
        timings = args.timings or args.out / f"timings-{seed}.csv"
        if args.timings is None and seed:
            calibrate(subject, timings, EXTENT)
        yield from (run for run in runs(load_config(path, [f"timings={timings.resolve()}"])) if run.seed == seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loads", default="0.3,0.6,0.85")
    parser.add_argument("--timings", type=Path, help="a finished calibration; default: calibrate before each repeat")
    parser.add_argument("--out", type=Path, default=Path("out/validate-cpu"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    subject = load_subject(str(make(args.folder)), dtype="float32")
    timings = args.timings or args.out / "timings-0.csv"
    if args.timings is None:
        calibrate(subject, timings, EXTENT)
    path = args.out / "config.yaml"
    whole = {**CONFIG, "timings": str(timings.resolve()), "requests": args.requests, "seeds": args.repeats}
    path.write_text(yaml.safe_dump({**whole, "rate": 1.0}, sort_keys=False))
    most = capacity(load_config(path))
    rates = [round(float(load) * most, 3) for load in args.loads.split(",")]
    path.write_text(yaml.safe_dump({**whole, "sweep": {"rate": rates}}, sort_keys=False))
    print(f"capacity {most:.2f} requests/s; rates {rates}", flush=True)
    compared = []
    for run in repeats(path, args, subject):
        cores = Cores(os.getpid())
        compared.append(compare(run, subject.model))
        real, simulated = (float(np.mean(r.finish - r.arrival)) for r in (compared[-1].real, compared[-1].simulated))
        speed, others = compared[-1].speed, cores.used()[1]
        print(f"{run}: mean turnaround {real:.3f} s real, {simulated:.3f} s simulated; ", end="")
        print(f"steps took {speed.few:.3f} (up to {speed.bound} tokens) and {speed.many:.3f} (more) ", end="")
        print(f"of what is predicted; other cores {others:.2f}", flush=True)
    save(compared, subject.model, args.out)
    print(report(args.out))
    print("\nmeans of single repeats, smallest and largest")
    print(pd.read_csv(args.out / "spread.csv").to_string(index=False, float_format="{:.4f}".format))


if __name__ == "__main__":
    main()
