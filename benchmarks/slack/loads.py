"""slack beside the other policies: LS latency, and what BE and throughput pay for it, at several loads.

    python benchmarks/slack/loads.py [--configs long_prefill azure] [--loads 0.6 0.8 0.95] [--jobs 2]
        [--out docs/results/slack.json]

A load of 1 is the rate at which the best of `fcfs`, `priority`, `chunked` and `hybrid` serves requests that are all
there from the start. Simulated on the timings that the configurations name. For LS:

    TTFT / isolated   p99, over what the prompt takes alone on the idle device; "met no LS": of requests in whose TTFT
                      no other LS request was in the system
    TPOT / isolated   the same over what a decode pass takes that holds the request alone
    TPOT / LS only    p99, over the p99 of the same LS requests without BE ("LS only", served by `priority`)

The goals of `slack`: TTFT p99 at most 1.1 and TPOT p99 at most 1.3 times isolated, throughput at least 0.98 of the
best, BE turnaround at most 1.1 times that of `priority`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from results_file import save
from runs import CONFIGS, FOR_THROUGHPUT, OTHERS, Run, capacity, drawn, options, p99, pooled, run, throughput

from qllm.config.config import Config, load_config
from qllm.config.from_config import load_timings
from qllm.traces.requests.trace import TraceError

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, settings) for name, settings in OTHERS.items()},
    "slack": ("slack", {}),
    "slack, shortest": ("slack", {"order": "shortest"}),
    "slack, LS TPOT x3": ("slack", {"tpot_stretch": 3.0}),
}
LS_ONLY = "LS only"


def metrics(runs: list[Run]) -> dict[str, float]:
    """Of one row, requests of all seeds pooled."""
    met = np.concatenate([one.met for one in runs])
    of_ls = {name: pooled(runs, name, ls=True) for name in ("ttft", "tpot", "alone_ttft", "alone_tpot")}
    ttft, tpot = of_ls["ttft"] / of_ls["alone_ttft"], of_ls["tpot"] / of_ls["alone_tpot"]
    be = pooled(runs, "turnaround", ls=False)
    return {
        "ttft_mean": float(of_ls["ttft"].mean()),
        "ttft_over_isolated_p99": p99(ttft),
        "ttft_over_isolated_p99_met_no_ls": p99(ttft[~met]),
        "tpot_mean": float(np.nanmean(of_ls["tpot"])),
        "tpot_p99": p99(of_ls["tpot"]),
        "tpot_over_isolated_p50": float(np.nanmedian(tpot)),
        "tpot_over_isolated_p99": p99(tpot),
        "be_turnaround": float(be.mean()) if len(be) else float("nan"),
        "be_turnaround_p99": p99(be),
        "throughput": throughput(runs),
    }


def row_at(config: Config, row: str) -> dict[str, float]:
    """Metrics of one row of the table."""
    policy, settings = ROWS.get(row, ("priority", {}))
    only = "ls" if row == LS_ONLY else None
    return metrics([run(config, drawn(config, seed, only), seed, policy, settings) for seed in config.seed_list])


def table(config: Config, load: float, rate: float, jobs: int) -> pd.DataFrame:
    """All rows at one load, with their ratios to what they are held against."""
    at = config.model_copy(update={"rate": rate})
    with ProcessPoolExecutor(jobs) as pool:
        found = list(pool.map(partial(row_at, at), [*ROWS, LS_ONLY]))
    rows = pd.DataFrame(found, index=[*ROWS, LS_ONLY])
    best = rows.loc[list(FOR_THROUGHPUT), "throughput"].max()
    rows["tpot_p99_over_ls_only"] = rows["tpot_p99"] / rows.loc[LS_ONLY, "tpot_p99"]
    rows["be_over_priority"] = rows["be_turnaround"] / rows.loc["priority", "be_turnaround"]
    rows["throughput_over_best"] = rows["throughput"] / best
    return rows.rename_axis("policy").reset_index().assign(config=config.name, load=load, rate=rate)


SHOWN = {
    "policy": "policy",
    "ttft_over_isolated_p99": "TTFT/iso p99",
    "ttft_over_isolated_p99_met_no_ls": "met no LS",
    "tpot_over_isolated_p50": "TPOT/iso p50",
    "tpot_over_isolated_p99": "p99",
    "tpot_p99_over_ls_only": "TPOT/LS only",
    "be_turnaround": "BE turnaround s",
    "be_over_priority": "/priority",
    "throughput_over_best": "throughput/best",
}


def main() -> None:
    parser = options(__doc__, "slack")
    parser.add_argument("--configs", nargs="+", default=["long_prefill", "azure"])
    parser.add_argument("--loads", nargs="+", type=float, default=[0.6, 0.8, 0.95])
    args = parser.parse_args()
    tables = []
    sources = []
    for name in args.configs:
        overrides = ["sweep={}", "rate=1", *([f"requests={args.requests}"] if args.requests else [])]
        try:
            config = load_config(CONFIGS / f"{name}.yaml", overrides)
            most = capacity(config)
        except TraceError as error:
            print(f"{name}: left out: {error}")
            continue
        timings = load_timings(config.timings)
        sources.append(f"{name} on {timings.source} step times ({config.timings})")
        for load in args.loads:
            found = table(config, load, load * most, args.jobs)
            print(f"\n{name}, load {load:g}: {load * most:.3g} requests/s\n", _shown(found), flush=True)
            tables.append(found)
    if args.out:
        save(args.out, source=f"simulated: {'; '.join(sources)}", tables={"rows": pd.concat(tables)})


def _shown(found: pd.DataFrame) -> Iterable[str]:
    return found[list(SHOWN)].rename(columns=SHOWN).round(3).to_string(index=False)


if __name__ == "__main__":
    main()
