"""The table of errors in Markdown, from the errors.csv of benchmarks/fidelity/validate_cpu.py or `qllm validate`.

    python benchmarks/fidelity/validation_table.py FOLDER

All classes, a row per policy and rate: simulated over real - 1. Under it how many of the errors lie within this
project's goals: 5 % of means and p50, 10 % of p99, 2 % of throughput.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from qllm.validation.validate import METRICS, REAL, SIMULATED

STATISTICS = ("mean", "p50", "p99")  # without p95: no goal is set for it
GOALS = {"mean": 0.05, "p50": 0.05, "p99": 0.10, "throughput": 0.02}
METRICS_HEAD = "| policy | requests/s | TTFT mean, p50, p99 | TPOT mean, p50, p99 | turnaround mean, p50, p99 |"
HEAD = METRICS_HEAD + " throughput | preemptions real, simulated |"


def row(policy: str, rate: float, shown: Callable[[str, str], str]) -> list[str]:
    """Cells under METRICS_HEAD; `shown`: the text of a metric's statistic."""
    return [policy, f"{rate:g}", *(", ".join(shown(metric, name) for name in STATISTICS) for metric in METRICS)]


def markdown(head: str, rows: Iterable[list[str]]) -> str:
    """A table of rows of cells."""
    return "\n".join([head, "|---" * head.count(" |") + "|", *("| " + " | ".join(cells) + " |" for cells in rows)])


def table(errors: pd.DataFrame) -> str:
    """`errors` (of `qllm.validation.validate.errors`) in Markdown."""
    rows = []
    for (policy, rate), mine in errors[errors["class"] == "all"].groupby(["policy", "rate"]):
        at = mine.set_index(["metric", "statistic"])
        cells = row(policy, rate, lambda metric, name, at=at: f"{at.loc[(metric, name), 'error']:+.1%}")
        cells.append(f"{at.loc[('throughput_rps', 'mean'), 'error']:+.1%}")
        cells.append(", ".join(f"{at.loc[('preemptions', 'sum'), world]:.0f}" for world in (REAL, SIMULATED)))
        rows.append(cells)
    return markdown(HEAD, rows)


def held(errors: pd.DataFrame) -> str:
    """How many errors of all classes lie within each goal."""
    mine = errors[errors["class"] == "all"]
    found = []
    for name, goal in GOALS.items():
        if name == "throughput":
            rows = mine["metric"] == "throughput_rps"
        else:
            rows = mine["metric"].isin(METRICS) & (mine["statistic"] == name)
        found.append(f"{name}: {(mine.loc[rows, 'error'].abs() <= goal).sum()} of {rows.sum()} within {goal:.0%}")
    return "; ".join(found)


def summary(folder: Path) -> str:
    """Both, of the errors.csv in `folder`."""
    errors = pd.read_csv(folder / "errors.csv")
    return f"{table(errors)}\n\n{held(errors)}"


def repeats(requests: pd.DataFrame) -> pd.DataFrame:
    """The means of single repeats, real and simulated: a row per policy and rate, a column per metric, world, seed."""
    means = requests.groupby(["policy", "rate", "world", "seed"], sort=False)[list(METRICS)].mean()
    return means.unstack(["world", "seed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(summary(parser.parse_args().folder))


if __name__ == "__main__":
    main()
