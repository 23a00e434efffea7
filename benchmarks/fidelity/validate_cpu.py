"""The simulator against the real engine on this CPU: calibrates and validates in one run.

    python benchmarks/fidelity/validate_cpu.py FOLDER [--threads 1] [--requests 60] [--repeats 3] [--loads 0.3,0.6,0.85]
        [--tries 1]

FOLDER: the checkpoint of tools/make_moe.py (165.6 M random parameters, float32), made where it is missing. Rates
are those shares of the rate at which fcfs is simulated to be busy all the time. Policies fcfs, priority and qllm; long
best-effort prompts, short latency-sensitive ones. A first calibration cuts the engine's passes and gives the rates.
Those that runs are simulated with are made in the runs: a run's clock stands still while the engine's thread makes a
visit, as often as two rounds of visits need, so that they see the machine that the run sees and nothing of the run
itself. Two rounds say how fast the machine was in a run, but little of a single kind of pass: what a step costs is the
mean of the calibrations of all runs, and only the machine's speed is a run's own. Prints the errors (with step times
of the machine's average speed in the run, and at the speed that it had from moment to moment, both by those visits),
their spread over the repeats and the largest contributions; writes everything to --out.

A machine that shares its host is slower for minutes at a time. So a run can have several --tries: one during which more
than a tenth of the visits took over 1.1 times the median of their kind is made again, and the least disturbed is kept.
That looks at the machine alone: what is simulated has no say in it. A finished run is kept in --out:
after an interruption, or with more --repeats, the same command runs what is missing, and simulates everything. Needs a
machine that does nothing else. One thread by default: two processors of a virtual machine may be one core at one time
and two at another.
"""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from make_moe import make
from processes import Cores
from validation_table import summary

from qllm.config.config import Config, load_config
from qllm.config.from_config import request_trace, scheduler_limits, step_model
from qllm.executor.calibration.calibrate import Extent, calibrate, calibration
from qllm.executor.calibration.subject import Subject, load_subject
from qllm.experiment.run import Run, runs
from qllm.scheduler import make_policy
from qllm.sim import simulate
from qllm.traces.step_times.timing_mean import mean_of
from qllm.traces.step_times.timings import Timings
from qllm.validation.machine_speed import Visited, slowed_in
from qllm.validation.results import report, save
from qllm.validation.validate import Comparison, EngineRun, replay_run, simulate_run

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
EXTENT = Extent(max_tokens=1024, max_context=1088, max_batch=16)  # the longest sequence has 1,072 tokens
ROUNDS = (2, 2)  # of the calibration in a run
SLOW = 1.1  # times the median of its kind: a visit that was disturbed
DISTURBED = 0.1  # share of such visits from which a run is made again


def capacity(config: Config) -> float:
    """Requests per second that fcfs is simulated to finish while it always has work: all arrive at once."""
    trace = request_trace(config, 0).scaled(1e6)
    result = simulate(
        trace,
        priorities=config.priorities,
        policy=make_policy("fcfs"),
        limits=scheduler_limits(config, step_model(config).timings),
        steps=step_model(config),
    )
    return len(trace) / result.makespan


def prepare(args: argparse.Namespace, subject: Subject) -> Config:
    """The configuration in --out, made at the first call: what is offered must not change from repeat to repeat."""
    path, timings = args.out / "config.yaml", args.timings or args.out / "timings.csv"
    whole = {**CONFIG, "timings": str(timings.resolve()), "requests": args.requests, "seeds": args.repeats}
    if not path.exists():
        if args.timings is None:
            calibrate(subject, timings, EXTENT)
        busy = args.out / "capacity.yaml"
        busy.write_text(yaml.safe_dump({**whole, "rate": 1.0}, sort_keys=False))
        most = capacity(load_config(busy))
        rates = [round(float(load) * most, 3) for load in args.loads.split(",")]
        print(f"capacity {most:.2f} requests/s; rates {rates}", flush=True)
        whole |= {"sweep": {"rate": rates}}
    else:
        found = yaml.safe_load(path.read_text())
        whole |= {"sweep": found["sweep"]}
        if found | {"seeds": args.repeats} != whole:
            raise SystemExit(
                f"{path}: of another --requests or --timings, or an earlier version; remove it or ask as then"
            )
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return load_config(path)


def kept_in(folder: Path, run: Run) -> Path:
    """Where a finished run is kept."""
    return folder / f"run-{run.title}-{run.config.rate:g}-{run.seed}.pkl"


def replayed_once(run: Run, subject: Subject, args: argparse.Namespace) -> tuple[EngineRun, Timings]:
    """The run on the real engine with the calibration that was made in it; from its file, where it is finished."""
    kept = kept_in(args.out, run)
    if kept.exists():
        found: tuple[EngineRun, Timings] = pickle.loads(kept.read_bytes())
        return found
    cores = Cores(os.getpid())
    if args.timings:
        both = replay_run(run, subject.model), Timings.load(args.timings)
        shares = []
    else:
        both, shares = least_disturbed(run, subject, kept.with_suffix(".csv"), args.tries)
    kept.with_suffix(".part").write_bytes(pickle.dumps(both))
    kept.with_suffix(".part").rename(kept)
    visits = ", ".join(f"{share:.2f}" for share in shares)
    print(f"{run}: disturbed visits [{visits}], other cores {cores.used()[1]:.2f}", flush=True)
    return both


def least_disturbed(
    run: Run, subject: Subject, used: Path, tries: int
) -> tuple[tuple[EngineRun, Timings], list[float]]:
    """`calibrated`, until a run is hardly `disturbed` or there were so many `tries`: the least disturbed, and the share
    of each."""
    shares: list[float] = []
    best: tuple[EngineRun, Timings] | None = None
    while best is None or (len(shares) < tries and min(shares) > DISTURBED):
        both = calibrated(run, subject, used)
        shares.append(disturbed(both[0].visits))
        if best is None or shares[-1] < min(shares[:-1]):
            best = both
    best[1].save(used)
    return best, shares


def disturbed(visits: list[Visited]) -> float:
    """Share of the visits that took more than SLOW times the median of their kind."""
    seconds = pd.Series([visit.seconds for visit in visits])
    medians = seconds.groupby([visit.cell.key for visit in visits]).transform("median")
    return float((seconds > SLOW * medians).mean())


def calibrated(run: Run, subject: Subject, used: Path) -> tuple[EngineRun, Timings]:
    """The run on the real engine, and the calibration `used`, made in it."""
    used.with_name(used.name + ".measured").unlink(missing_ok=True)  # of a run that was cut off
    visits = calibration(subject, used, EXTENT, ROUNDS)
    replayed = replay_run(run, subject.model, visits)
    for _ in visits:  # what was left of it
        pass
    return replayed, Timings.load(used)


def simulated(replayed: list[tuple[EngineRun, Timings]]) -> list[Comparison]:
    """The runs in both worlds, simulated with the mean of all their calibrations at the speed that each run had."""
    timings, bound = mean_of([timings for _, timings in replayed]), EXTENT.max_batch
    slowed = slowed_in([run.visits for run, _ in replayed], bound)
    return [simulate_run(run, timings, seen) for (run, _), seen in zip(replayed, slowed, strict=True)]


def told(one: Comparison) -> str:
    """A line about one run in both worlds."""
    worlds = (one.real, one.simulated, one.at_speed)
    real, simulated, followed = (float(np.mean(result.finish - result.arrival)) for result in worlds)
    few, many, bound = one.speed
    times = f"mean turnaround {real:.3f} s real, {simulated:.3f} s simulated, {followed:.3f} s at speed"
    return f"{one.run}: {times}; steps took {few:.3f} (up to {bound} tokens) and {many:.3f} (more) of what is predicted"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loads", default="0.3,0.6,0.85")
    parser.add_argument(
        "--timings", type=Path, help="a finished calibration; default: calibrate at first, and in each run"
    )
    parser.add_argument("--tries", type=int, default=1, help="of a run that the machine disturbs (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("out/validate-cpu"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    subject = load_subject(str(make(args.folder)), dtype="float32")
    todo = sorted(runs(prepare(args, subject)), key=lambda run: run.seed)  # whole repeats, one after another
    if not all(kept_in(args.out, run).exists() for run in todo):
        fastest = max(todo, key=lambda run: run.config.rate or 0)
        # Not counted: oneDNN makes a kernel at the first use of each size, in 0.2 ms.
        replay_run(fastest, subject.model)
    compared = simulated([replayed_once(run, subject, args) for run in todo])
    save(compared, subject.model, args.out)
    print(*map(told, compared), sep="\n")
    print(report(args.out))
    print(summary(args.out))
    print("\nmeans of single repeats, smallest and largest")
    print(pd.read_csv(args.out / "spread.csv").to_string(index=False, float_format="{:.4f}".format))


if __name__ == "__main__":
    main()
