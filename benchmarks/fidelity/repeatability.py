"""How far runs of the same requests on the real engine lie apart: what the machine does to a run.

    python benchmarks/fidelity/repeatability.py FOLDER VALIDATED [--threads 1] [--runs 2] [--least-rate 0]

FOLDER: the checkpoint of tools/make_moe.py; VALIDATED: where benchmarks/fidelity/validate_cpu.py wrote its results,
with the same --threads. The requests of its first repeat are replayed by each policy at each rate from --least-rate
on, on the real clock, all of them --runs times in turn. Prints how far any two of
these runs and of the real run in VALIDATED are apart (the mean over pairs, and how many pairs would hold the goals
that a simulation has to), and how far the simulation in VALIDATED is from all of them together. Needs a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from validation_table import GOALS, METRICS_HEAD, STATISTICS, markdown, row

from qllm.config.config import load_config
from qllm.executor.model.loading import load
from qllm.experiment.run import runs
from qllm.validation.validate import METRICS, REAL, SIMULATED, replay_run, request_rows, statistic


def statistics_of(rows: pd.DataFrame) -> pd.Series:
    """Mean, p50 and p99 of each metric over all `rows`, by (policy, rate, metric, statistic)."""
    found = {
        (policy, rate, metric, name): statistic(mine[metric], name)
        for (policy, rate), mine in rows.groupby(["policy", "rate"])
        for metric in METRICS
        for name in STATISTICS
    }
    return pd.Series(found).rename_axis(["policy", "rate", "metric", "statistic"])


def apart(worlds: list[pd.Series]) -> pd.DataFrame:
    """|one / other - 1| of any two `worlds`, a column a pair."""
    return pd.concat([(one / other - 1).abs() for one, other in combinations(worlds, 2)], axis=1)


def table(differences: pd.DataFrame) -> str:
    """The mean over pairs in Markdown, a row per policy and rate."""
    mean = differences.mean(axis=1)
    points = mean.index.droplevel(["metric", "statistic"]).unique()
    rows = [row(*point, lambda metric, name, point=point: f"{mean[(*point, metric, name)]:.1%}") for point in points]
    return markdown(METRICS_HEAD, rows)


def held(differences: pd.DataFrame) -> str:
    """How many of the differences lie within each goal."""
    found = []
    for name in STATISTICS:
        values = differences.xs(name, level="statistic").to_numpy()
        found.append(f"{name}: {np.mean(values <= GOALS[name]):.0%} of {values.size} within {GOALS[name]:.0%}")
    return "; ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("validated", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--least-rate", type=float, default=0.0, help="requests per second")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load(str(args.folder), dtype="float32")
    todo = [
        run
        for run in runs(load_config(args.validated / "config.yaml"))
        if run.seed == 0 and (run.config.rate or 0) >= args.least_rate
    ]
    validated = pd.read_csv(args.validated / "requests.csv").query("seed == 0 and rate >= @args.least_rate")
    worlds = [validated[validated["world"] == REAL]]
    for number in range(args.runs):
        rows = []
        for run in todo:
            real = replay_run(run, loaded)
            rows.append(request_rows(run, real.trace, real.result, f"run {number}"))
            print(
                f"{run}, {number + 1} of {args.runs}: mean turnaround {rows[-1]['turnaround_s'].mean():.3f} s",
                flush=True,
            )
        worlds.append(pd.concat(rows, ignore_index=True))
    pooled = pd.concat(worlds, ignore_index=True)
    pooled.to_csv(args.validated / "repeatability.csv", index=False)
    between = apart([statistics_of(rows) for rows in worlds])
    simulated = validated[validated["world"] == SIMULATED]
    against = (statistics_of(simulated) / statistics_of(pooled) - 1).abs().to_frame()
    print(f"any two of {len(worlds)} real runs, mean |difference|\n\n{table(between)}\n\n{held(between)}")
    print(f"\nsimulated against all of them together\n\n{table(against)}\n\n{held(against)}")


if __name__ == "__main__":
    main()
