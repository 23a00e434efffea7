"""Overload: four times as many requests as the device can serve, of which LS alone fits.

    python benchmarks/slack/overload.py [--ls-rate 0.5] [--times 4] [--jobs 2] [--out docs/results/slack_overload.json]

Requests of configs/long_prefill.yaml, simulated on its step times: LS at a rate that takes a part of the device, BE at
a rate that makes both together `--times` the capacity of that mix (see loads.py). Where BE is shed, a request of BE is
turned away if those before it would take longer than `SHED_S` to be launched; and one that was in no running pass for
`BOUND_S` in all is served as LS.

    LS SLO        share of all LS requests sent whose TTFT is within the configuration's bound
    BE of left    BE requests served, over those that the device serves of BE alone in the seconds that LS leaves it:
                  the run's, without the seconds of passes that the same LS requests take without BE
    BE shed       share of BE requests that were turned away
    BE launch     the longest time from arrival to the first pass, of those served
    BE waiting    the longest time in no running pass and no suspended one, of those served
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from results_file import save
from runs import CONFIGS, OTHERS, Run, capacity, drawn, options, p99, pooled, run

from qllm.config.config import Config, load_config
from qllm.config.from_config import load_timings

SHED_S, BOUND_S = 30.0, 120.0
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, settings) for name, settings in OTHERS.items()},
    "slack": ("slack", {}),
    "slack, shed": ("slack", {"shed_s": SHED_S, "max_wait_s": BOUND_S}),
}


def at_load(config: Config, ls_rate: float, times: float) -> tuple[Config, float]:
    """The configuration with that LS rate and so many times the capacity of what it is then; and that capacity."""
    ls, be = config.classes["ls"], config.classes["be"]
    most = capacity(config)
    for _ in range(3):  # with more BE among the requests the device serves fewer of them
        share = ls_rate / (times * most)
        classes = {"ls": ls.model_copy(update={"share": share}), "be": be.model_copy(update={"share": 1 - share})}
        config = config.model_copy(update={"classes": classes, "rate": times * most})
        most = capacity(config)
    return config, most


def simulated(config: Config, row: str, only: str | None = None) -> list[Run]:
    """The runs of a row, one a seed."""
    policy, settings = ROWS[row]
    return [run(config, drawn(config, seed, only), seed, policy, settings) for seed in config.seed_list]


def metrics(runs: list[Run], bound: float, be_per_s: float, ls_s: float) -> dict[str, float]:
    """Of one row, requests of all seeds pooled; a request that was turned away has no TTFT, and misses its SLO."""
    ttft, alone = pooled(runs, "ttft", ls=True), pooled(runs, "alone_ttft", ls=True)
    served = pooled(runs, "served", ls=False)
    left = sum(one.makespan for one in runs) - ls_s
    return {
        "slo": float((ttft <= bound * alone).mean()),
        "ttft_over_isolated_p99": p99(ttft / alone),
        "be_of_left": float(served.sum()) / (be_per_s * left),
        "be_shed": 1 - float(served.mean()),
        "be_launch_max": float(pooled(runs, "first_launch", ls=False)[served].max()),
        "be_waiting_max": float(pooled(runs, "queueing", ls=False)[served].max()),
        "be_turnaround": float(pooled(runs, "turnaround", ls=False)[served].mean()),
        "makespan": sum(one.makespan for one in runs) / len(runs),
    }


SHOWN = {
    "policy": "policy",
    "slo": "LS SLO",
    "ttft_over_isolated_p99": "LS TTFT/iso p99",
    "be_of_left": "BE of left",
    "be_shed": "BE shed",
    "be_launch_max": "BE launch s",
    "be_waiting_max": "BE waiting s",
    "be_turnaround": "BE turnaround s",
}


def main() -> None:
    parser = options(__doc__, "slack_overload")
    parser.add_argument("--ls-rate", type=float, default=0.5, help="LS requests per second")
    parser.add_argument("--times", type=float, default=4.0, help="the capacity")
    parser.set_defaults(requests=1200)
    args = parser.parse_args()
    config = load_config(CONFIGS / "long_prefill.yaml", ["sweep={}", "rate=1", f"requests={args.requests}"])
    config, most = at_load(config, args.ls_rate, args.times)
    bound = config.classes["ls"].slo.ttft_over_isolated
    be_per_s = capacity(config, only="be")
    alone = simulated(config, "priority", only="ls")
    ls_s = sum(one.busy for one in alone)
    of_device = ls_s / sum(one.makespan for one in alone)
    print(f"{config.rate:.3g} requests/s, {args.ls_rate:g} of them LS, which alone take {of_device:.0%} of the device;")
    print(f"capacity {most:.3g} requests/s; of BE alone {be_per_s:.3g}/s")
    with ProcessPoolExecutor(args.jobs) as pool:
        found = list(pool.map(partial(simulated, config), ROWS))
    rows = pd.DataFrame([metrics(runs, bound, be_per_s, ls_s) for runs in found], index=[*ROWS])
    rows = rows.rename_axis("policy").reset_index()
    print(rows[list(SHOWN)].rename(columns=SHOWN).round(3).to_string(index=False))
    if args.out:
        timings = load_timings(config.timings)
        source = f"simulated: long_prefill on {timings.source} step times ({config.timings})"
        facts = {"rate": config.rate, "ls_rate": args.ls_rate, "capacity": most, "ls_of_device": of_device}
        save(args.out, source=source, tables={"rows": rows}, **facts, shed_s=SHED_S, bound_s=BOUND_S)


if __name__ == "__main__":
    main()
