"""The table of docs/fidelity.md from the errors.csv that benchmarks/validate_cpu.py or `qllm validate` wrote.

    python benchmarks/validation_table.py FOLDER

All classes, a row per policy and rate: simulated over real - 1. Then how many of the errors lie within this project's
goals: 5 % of means and p50, 10 % of p99, 2 % of throughput.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from qllm.validate import METRICS, REAL, SIMULATED

STATISTICS = ("mean", "p50", "p99")  # without p95: no goal is set for it
GOALS = {"mean": 0.05, "p50": 0.05, "p99": 0.10, "throughput": 0.02}
HEAD = (
    "| policy | requests/s | TTFT mean, p50, p99 | TPOT mean, p50, p99 | turnaround mean, p50, p99 | throughput "
    "| preemptions real, simulated | at speed: means of TTFT, TPOT, turnaround |"
)


def table(errors: pd.DataFrame) -> str:
    """`errors` (of `qllm.validate.errors`) in Markdown."""
    lines = [HEAD, "|---" * HEAD.count(" |") + "|"]
    for (policy, rate), mine in errors[errors["class"] == "all"].groupby(["policy", "rate"], sort=False):
        at = mine.set_index(["metric", "statistic"])
        cells = [policy, f"{rate:g}"]
        cells += [", ".join(f"{at.loc[(m, s), 'error']:+.1%}" for s in STATISTICS) for m in METRICS]
        cells.append(f"{at.loc[('throughput_rps', 'mean'), 'error']:+.1%}")
        cells.append(", ".join(f"{at.loc[('preemptions', 'sum'), world]:.0f}" for world in (REAL, SIMULATED)))
        cells.append(", ".join(f"{at.loc[(m, 'mean'), 'error_at_speed']:+.1%}" for m in METRICS))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def held(errors: pd.DataFrame) -> str:
    """How many errors of all classes lie within each goal, by the calibrated step times and at the run's speed."""
    mine = errors[errors["class"] == "all"]
    lines = []
    for name, goal in GOALS.items():
        if name == "throughput":
            rows = mine["metric"] == "throughput_rps"
        else:
            rows = mine["metric"].isin(METRICS) & (mine["statistic"] == name)
        within = [int((mine.loc[rows, column].abs() <= goal).sum()) for column in ("error", "error_at_speed")]
        lines.append(f"{name}: {within[0]} of {rows.sum()} within {goal:.0%}; at speed {within[1]}")
    return "\n".join(lines)


def summary(folder: Path) -> str:
    """Both, of the errors.csv in `folder`."""
    errors = pd.read_csv(folder / "errors.csv")
    return f"{table(errors)}\n\n{held(errors)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(summary(parser.parse_args().folder))


if __name__ == "__main__":
    main()
