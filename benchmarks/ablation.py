"""fcfs -> priority -> chunked -> layer -> qllm -> hybrid on the three configurations: what each step buys and costs.

    python benchmarks/ablation.py [CONFIG ...] [--jobs 2]
    python benchmarks/ablation.py configs/long_prefill.yaml [--results FOLDER] --out docs/results/long_prefill.json
    python benchmarks/ablation.py configs/three_classes.yaml --out docs/results/three_classes.json

Of a configuration with other classes than LS and BE, a row per class, and the totals.

Times are simulated on imported or modelled A100 timings (the caption says which), not measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from paper import KEPT
from results_file import add_out, save

from qllm import load_results, simulate
from qllm.experiment.metrics import BOUNDS, totals
from qllm.traces.requests.trace import TraceError

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = ("paper", "long_prefill", "azure")
#: columns of the summary that a results file of other classes has, and of its totals
OF_ALL = ("sent", "rejected", "slo_attainment", "throughput_rps")
OF_CLASSES = (*OF_ALL, *BOUNDS.values(), "ttft_p99_s", "tpot_p99_s", "turnaround_mean_s")


def ablation(summary: pd.DataFrame) -> pd.DataFrame:
    """A row per rate and policy: LS latency, and what BE and throughput pay for it."""
    ls, be = (summary[summary["class"] == c].set_index(["rate", "policy"]) for c in ("ls", "be"))
    return pd.DataFrame(
        {
            "LS TTFT mean s": ls["ttft_mean_s"],
            "p99 s": ls["ttft_p99_s"],
            "p99 / isolated": ls["ttft_over_isolated_p99"],
            "blocking p99 ms": 1e3 * ls["blocking_p99_s"],
            "LS TPOT ms": 1e3 * ls["tpot_mean_s"],
            "SLO": ls["slo_attainment"],
            "BE turnaround s": be["turnaround_mean_s"],
            "BE suspended s": be["suspended_mean_s"],
            "req/s": ls["throughput_rps"] + be["throughput_rps"],
            "tokens/s": ls["output_tokens_per_s"] + be["output_tokens_per_s"],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=[str(CONFIGS / f"{name}.yaml") for name in NAMES])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", metavar="FOLDER", help="of `qllm simulate CONFIG`; without it, simulate now")
    add_out(parser, "long_prefill")
    args = parser.parse_args()
    if (args.out or args.results) and len(args.configs) != 1:
        parser.error("--out and --results are about one configuration: name it")
    pd.set_option("display.width", 220, "display.max_columns", 20, "display.max_rows", 200)
    for config in args.configs:
        try:
            results = load_results(args.results) if args.results else simulate(config, jobs=args.jobs)
        except TraceError as error:
            print(f"\n{config}: left out: {error}")
            continue
        print(f"\n{Path(config).stem} ({results.config.provenance['timings']})")
        if {"ls", "be"} <= results.config.classes.keys():
            found = ablation(results.summary)
            tables = {"ablation": found.reset_index(), "summary": results.summary[KEPT]}
        else:
            found = results.summary[[*KEPT[:4], *OF_CLASSES]]
            tables = {"summary": found, "totals": totals(results.summary)[["policy", "rate", *OF_ALL]]}
        print(found.round(3).to_string())
        if args.out:
            source = f"simulated; step times {results.config.provenance['timings']}"
            save(args.out, source=source, tables=tables, config=Path(config).name)


if __name__ == "__main__":
    main()
