"""The paper's five results beside ours, for each policy, from configs/paper.yaml. MODELLED step times.

    python benchmarks/paper.py [--jobs 2] [--results out/paper] [--out docs/results/paper.json]

Ratios are taken at each rate up to 7/s, then averaged (and their extreme shown), as the paper does. A ratio to an
overloaded FCFS grows with the length of the experiment: see docs/results.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from results_file import add_out, save

from qllm import load_results, simulate

CONFIG = Path(__file__).parents[1] / "configs" / "paper.yaml"
#: as its authors measured it on an A100; baseline Hugging Face TGI
PAPER = {
    "LS TTFT ratio mean": 65.5,
    "max": 101.6,
    "rate within 3 s (mean)": 7.0,
    "LS turnaround ratio max": 12.8,
    "BE turnaround mean": 1.38,
    "BE max": 2.04,
    "throughput": "equal or slightly higher",
}
KEPT = [
    "policy",
    "rate",
    "class",
    "saturated",
    "ttft_mean_s",
    "ttft_mean_lo_s",
    "ttft_mean_hi_s",
    "ttft_p99_s",
    "ttft_over_isolated_p99",
    "blocking_p99_s",
    "tpot_mean_s",
    "turnaround_mean_s",
    "suspended_mean_s",
    "slo_attainment",
    "throughput_rps",
    "output_tokens_per_s",
]  #: columns of the summary that the results file has
MAX_RATE = 7.0
SLO_S = 3.0


def compare(summary: pd.DataFrame, baseline: str = "fcfs") -> pd.DataFrame:
    """A row per policy: ratios to `baseline` over the rates up to MAX_RATE, and the highest rate within the SLO."""
    summary = summary[summary["rate"] <= MAX_RATE]
    ls, be = (summary[summary["class"] == c].set_index(["policy", "rate"]) for c in ("ls", "be"))
    both = (ls["throughput_rps"] + be["throughput_rps"]).unstack("policy")
    rows = []
    for policy in summary["policy"].unique():
        ttft = ls["ttft_mean_s"].unstack("policy")
        turnaround = {c: t["turnaround_mean_s"].unstack("policy") for c, t in (("ls", ls), ("be", be))}
        ttft_ratio = ttft[baseline] / ttft[policy]
        ls_ratio = turnaround["ls"][baseline] / turnaround["ls"][policy]
        be_ratio = turnaround["be"][policy] / turnaround["be"][baseline]
        through = both[policy] / both[baseline]
        mine = ls.loc[policy]
        rows.append(
            {
                "policy": policy,
                "LS TTFT ratio mean": ttft_ratio.mean(),
                "max": ttft_ratio.max(),
                "at 1/s": ttft_ratio.get(1.0),
                "rate within 3 s (mean)": highest(mine["ttft_mean_s"]),
                "(p99)": highest(mine["ttft_p99_s"]),
                "LS turnaround ratio max": ls_ratio.max(),
                "BE turnaround mean": be_ratio.mean(),
                "BE max": be_ratio.max(),
                "throughput min": through.min(),
                "throughput max": through.max(),
            }
        )
    return pd.DataFrame(rows).set_index("policy")


def highest(ttft_by_rate: pd.Series) -> float:
    """The highest rate up to which the value stays within the SLO at every rate, 0 if there is none."""
    best = 0.0
    for rate, value in ttft_by_rate.items():
        if not value <= SLO_S:
            break
        best = float(rate)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", metavar="FOLDER", help="of `make demo`; without it, simulate now")
    add_out(parser, "paper")
    args = parser.parse_args()
    results = load_results(args.results) if args.results else simulate(CONFIG, jobs=args.jobs)
    timings = results.config.provenance["timings"]
    ratios, to_priority = compare(results.summary), compare(results.summary, "priority")
    pd.set_option("display.width", 220, "display.max_columns", 20)
    print("The paper (A100, measured by its authors; baseline Hugging Face TGI):")
    for key, value in PAPER.items():
        print(f"  {key:24} {value}")
    print(f"\nOurs ({timings}), ratios to fcfs over rates up to {MAX_RATE:g}/s:")
    print(ratios.round(2).to_string())
    print("\nThe same, ratios to priority (what is left of the gain once the baseline knows priorities):")
    print(to_priority.round(2).to_string())
    if args.out:
        tables = {
            "paper": [PAPER],
            "to_fcfs": ratios.reset_index(),
            "to_priority": to_priority.reset_index(),
            "summary": results.summary[KEPT],
        }
        source = f"simulated; step times {timings}"
        save(args.out, source=source, tables=tables, config="configs/paper.yaml", slo=f"TTFT {SLO_S:g} s")


if __name__ == "__main__":
    main()
