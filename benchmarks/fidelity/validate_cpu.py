"""The simulator against the real engine on this CPU: calibrates, replays, simulates and compares.

    python benchmarks/fidelity/validate_cpu.py FOLDER [--threads 1] [--requests 60] [--repeats 3] [--loads 0.3,0.6,0.85]

FOLDER: the checkpoint of tools/make_moe.py (165.6 M random parameters, float32), made where it is missing. Policies
fcfs, priority and qllm; long best-effort prompts, short latency-sensitive ones. The rates are those shares of the rate
at which fcfs is simulated to be busy all the time, by the first calibration.

Each repeat begins with a calibration, which splits the engine's passes and gives the simulator its times; then each run
is replayed and simulated, as `qllm validate` does. A finished repeat is kept in --out: after an interruption, or with
more --repeats, the same command runs what is missing. Prints the errors over all repeats, and the means of each.
Needs a machine that does nothing else. One thread by default: two processors of a virtual machine may be one core at
one time and two at another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
import yaml
from validation_table import repeats, summary

from qllm.config.config import Config, load_config
from qllm.config.from_config import cost_model, scheduler_limits
from qllm.config.workload import request_trace
from qllm.executor.calibration.calibrate import Extent, calibrate
from qllm.executor.model.loading import LoadedModel, load
from qllm.executor.testing import make_checkpoint
from qllm.experiment.run import runs
from qllm.scheduler import make_policy
from qllm.sim import simulate
from qllm.validation.results import report, save
from qllm.validation.validate import compare, errors

CONFIG = {
    "name": "validate-cpu",
    "classes": {
        "ls": {"priority": 0, "share": 0.4, "prompt": {"uniform": [16, 128]}, "output": {"fixed": 16}},
        "be": {"priority": 1, "prompt": {"uniform": [256, 1024]}, "output": {"uniform": [8, 48]}},
    },
    "limits": {"max_seqs": 16, "max_batched_tokens": 1024, "kv_blocks": 2048},
    "max_step": 0.005,
    "policies": ["fcfs", "priority", "qllm"],
}
EXTENT = Extent(max_tokens=1024, max_context=1088, max_batch=16)  # the longest sequence has 1,072 tokens


def capacity(config: Config) -> float:
    """Requests per second that fcfs is simulated to finish while it always has work: all arrive at once."""
    trace = request_trace(config, 0).scaled(1e6)
    result = simulate(
        trace,
        priorities=config.priorities,
        policy=make_policy("fcfs"),
        limits=scheduler_limits(config, cost_model(config).timings),
        steps=cost_model(config),
    )
    return len(trace) / result.makespan


def configuration(args: argparse.Namespace, timings: Path) -> Path:
    """The configuration in --out, made at the first call: what is offered must not change from repeat to repeat."""
    path = args.out / "config.yaml"
    whole = {**CONFIG, "timings": str(timings.resolve()), "requests": args.requests}
    if not path.exists():
        path.write_text(yaml.safe_dump({**whole, "rate": 1.0}, sort_keys=False))
        most = capacity(load_config(path))
        rates = [round(float(load) * most, 3) for load in args.loads.split(",")]
        print(f"capacity {most:.2f} requests/s; rates {rates}", flush=True)
        path.write_text(yaml.safe_dump({**whole, "sweep": {"rate": rates}}, sort_keys=False))
    found = yaml.safe_load(path.read_text())
    if {key: value for key, value in found.items() if key != "sweep"} != whole:
        raise SystemExit(f"{path}: of another --requests, or an earlier version; remove {args.out} or ask as then")
    return path


def repeat(number: int, loaded: LoadedModel, args: argparse.Namespace) -> pd.DataFrame:
    """The requests of one repeat, a row each and world; measured unless it is finished."""
    folder, timings = args.out / f"repeat-{number}", args.out / f"timings-{number}.csv"
    folder.mkdir(exist_ok=True)
    if not (folder / "validation.png").exists():  # written last
        if not timings.exists():
            calibrate(loaded, timings, EXTENT)
        path = configuration(args, args.out / "timings-0.csv")
        compared = []
        for run in runs(load_config(path, [f"timings={timings.resolve()}", f"seeds=[{number}]"])):
            compared.append(compare(run, loaded))
            real, simulated = compared[-1].real.result, compared[-1].simulated
            means = [(result.finish - result.arrival).mean() for result in (real, simulated)]
            print(f"{run}: mean turnaround {means[0]:.3f} s real, {means[1]:.3f} s simulated", flush=True)
        save(compared, folder)
        print(report(folder), flush=True)
    return pd.read_csv(folder / "requests.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loads", default="0.3,0.6,0.85")
    parser.add_argument("--out", type=Path, default=Path("out/validate-cpu"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    loaded = load(str(make_checkpoint(args.folder)), dtype="float32")
    requests = pd.concat([repeat(number, loaded, args) for number in range(args.repeats)], ignore_index=True)
    requests.to_csv(args.out / "requests.csv", index=False)
    errors(requests).to_csv(args.out / "errors.csv", index=False)
    print(summary(args.out))
    print(f"\nmeans of single repeats\n{repeats(requests).to_string(float_format='{:.4f}'.format)}")


if __name__ == "__main__":
    main()
