"""slack beside the other policies: LS latency, and what BE and throughput pay for it, at several loads.

    python benchmarks/slack.py [--configs long_prefill azure] [--loads 0.6 0.8 0.95] [--jobs 2]
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

import argparse
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from results_file import add_out, save

from qllm.config.config import Config, load_config
from qllm.config.from_config import (
    cost_model,
    isolated,
    load_timings,
    popularity,
    request_trace,
    scheduler_limits,
)
from qllm.scheduler import make_policy
from qllm.sim import simulate
from qllm.traces.requests.trace import RequestTrace, TraceError
from qllm.traces.step_times.expected import expected_seconds

CONFIGS = Path(__file__).parents[1] / "configs"
FOR_THROUGHPUT = ("fcfs", "priority", "chunked", "hybrid")
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "fcfs": ("fcfs", {}),
    "priority": ("priority", {}),
    "chunked": ("chunked", {"budget": 512}),
    "layer": ("layer", {"fill_tokens": 0}),
    "qllm": ("qllm", {"fill_tokens": 0}),
    "hybrid": ("hybrid", {"budget": 2048}),
    "slack": ("slack", {}),
    "slack, shortest": ("slack", {"order": "shortest"}),
    "slack, LS TPOT x3": ("slack", {"tpot_stretch": 3.0}),
}
LS_ONLY = "LS only"


@dataclass
class Run:
    """One simulation."""

    trace: RequestTrace
    ttft: np.ndarray
    tpot: np.ndarray
    turnaround: np.ndarray
    alone_ttft: np.ndarray
    alone_tpot: np.ndarray
    ls: np.ndarray
    met: np.ndarray  #: of LS: whether another LS request was there before the first token
    makespan: float


def run(config: Config, row: str, seed: int, at_once: bool = False) -> Run:
    """Simulate a row; `at_once`: with everybody there from the start."""
    trace = request_trace(config, seed)
    if at_once:
        trace = replace(trace, arrival=np.zeros(len(trace)))
    mine = trace.cls == trace.classes.index("ls")
    if row == LS_ONLY:
        trace = RequestTrace(
            trace.arrival[mine], trace.prompt_tokens[mine], trace.output_tokens[mine], trace.cls[mine], trace.classes
        )
        mine = np.ones(len(trace), dtype=bool)
    name, settings = ROWS.get(row, ("priority", {}))
    steps = cost_model(config)
    result = simulate(
        trace,
        priorities=config.priorities,
        policy=make_policy(name, **settings),
        limits=scheduler_limits(config, load_timings(config.timings)),
        steps=steps,
        popularity=popularity(config),
        seed=seed,
    )
    expected = expected_seconds(steps)
    middle = trace.prompt_tokens + trace.output_tokens // 2
    gaps = np.where(trace.output_tokens > 1, trace.output_tokens - 1, np.nan)
    arrival, first = result.arrival[mine], result.first_token[mine]
    finish = result.finish[mine]
    met = np.array([((arrival < t) & (finish > a)).sum() > 1 for a, t in zip(arrival, first, strict=True)])
    return Run(
        trace=trace,
        ttft=result.first_token - result.arrival,
        tpot=(result.finish - result.first_token) / gaps,
        turnaround=result.finish - result.arrival,
        alone_ttft=isolated(config, trace.prompt_tokens),
        alone_tpot=np.array([expected((), 1, int(context)) for context in middle]),
        ls=mine,
        met=met,
        makespan=float(np.nanmax(result.finish) - result.arrival[0]),
    )


def capacity(config: Config) -> float:
    """Requests per second of the best policy for throughput, all requests there from the start."""
    best = 0.0
    for row in FOR_THROUGHPUT:
        runs = [run(config, row, seed, at_once=True) for seed in config.seed_list]
        best = max(best, sum(len(one.trace) for one in runs) / sum(one.makespan for one in runs))
    return best


def metrics(runs: list[Run]) -> dict[str, float]:
    """Of one row, requests of all seeds pooled."""

    def ls(column: str) -> np.ndarray:
        return np.concatenate([getattr(one, column)[one.ls] for one in runs])

    def p99(values: np.ndarray) -> float:
        kept = values[~np.isnan(values)]
        return float(np.percentile(kept, 99)) if len(kept) else float("nan")

    met = np.concatenate([one.met for one in runs])
    ttft, tpot = ls("ttft") / ls("alone_ttft"), ls("tpot") / ls("alone_tpot")
    be = np.concatenate([one.turnaround[~one.ls] for one in runs])
    return {
        "ttft_mean": float(ls("ttft").mean()),
        "ttft_over_isolated_p99": p99(ttft),
        "ttft_over_isolated_p99_met_no_ls": p99(ttft[~met]),
        "tpot_mean": float(np.nanmean(ls("tpot"))),
        "tpot_p99": p99(ls("tpot")),
        "tpot_over_isolated_p50": float(np.nanmedian(tpot)),
        "tpot_over_isolated_p99": p99(tpot),
        "be_turnaround": float(be.mean()) if len(be) else float("nan"),
        "be_turnaround_p99": p99(be),
        "throughput": sum(len(one.trace) for one in runs) / sum(one.makespan for one in runs),
    }


def row_at(config: Config, row: str) -> dict[str, float]:
    return metrics([run(config, row, seed) for seed in config.seed_list])


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["long_prefill", "azure"])
    parser.add_argument("--loads", nargs="+", type=float, default=[0.6, 0.8, 0.95])
    parser.add_argument("--requests", type=int, help="sent in each run; default: as the configuration says")
    parser.add_argument("--jobs", type=int, default=2)
    add_out(parser, "slack")
    args = parser.parse_args()
    pd.set_option("display.width", 200, "display.max_columns", 20)
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
