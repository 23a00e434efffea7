"""The paper's set-up under `slack`: LS's gain over fcfs, and whether BE and throughput pay for it.

    python benchmarks/slack/paper_rates.py [--rates 1 2 4 6 7] [--jobs 2] [--out docs/results/slack_paper.json]

configs/paper.yaml, simulated on the step times that it names. A pass takes a quarter to half a second there, whatever
is in it. In the rows "for 3 s" LS says that it wants its first token within 3 s, its SLO; an LS prefill takes along
what makes it at most 1.3 times longer, and no LS decodes apart, since that costs a whole pass. LS SLO: share of all LS
requests sent.
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
from runs import CONFIGS, OTHERS, drawn, options, p99, pooled, run, throughput

from qllm.config.config import Config, load_config
from qllm.config.from_config import load_timings

SLO_S = 3.0  # of the paper's Figure 4, and the configuration's
IN_TIME = {"tpot_stretch": float("inf"), "ttft_stretch": 1.3}
ROWS: dict[str, tuple[str, dict[str, Any], bool]] = {  # policy, settings, whether LS says that it wants SLO_S
    **{name: (name, {} if name == "hybrid" else settings, False) for name, settings in OTHERS.items()},
    "slack": ("slack", {}, False),
    "slack for 3 s": ("slack", IN_TIME, True),
    "slack for 3 s, shortest": ("slack", IN_TIME | {"order": "shortest"}, True),
}


def row_at(config: Config, row: str) -> dict[str, float]:
    """Metrics of one row of the table, requests of all seeds pooled."""
    policy, settings, wants = ROWS[row]
    if wants:
        ls = config.classes["ls"]
        said = type(ls).model_validate(ls.model_dump(exclude_unset=True) | {"deadline": {"ttft": SLO_S}})
        config = config.model_copy(update={"classes": config.classes | {"ls": said}})
    runs = [run(config, drawn(config, seed), seed, policy, settings) for seed in config.seed_list]
    ttft = pooled(runs, "ttft", ls=True)
    return {
        "ttft_mean": float(ttft.mean()),
        "ttft_p99": p99(ttft),
        "slo": float((ttft <= SLO_S).mean()),
        "ls_turnaround": float(pooled(runs, "turnaround", ls=True).mean()),
        "be_turnaround": float(pooled(runs, "turnaround", ls=False).mean()),
        "throughput": throughput(runs),
    }


def table(config: Config, rate: float, jobs: int) -> pd.DataFrame:
    """All rows at one rate, with their ratios to fcfs."""
    at = config.model_copy(update={"rate": rate})
    with ProcessPoolExecutor(jobs) as pool:
        rows = pd.DataFrame(list(pool.map(partial(row_at, at), ROWS)), index=[*ROWS])
    fcfs = rows.loc["fcfs"]
    rows["ttft_gain"] = fcfs["ttft_mean"] / rows["ttft_mean"]
    rows["turnaround_gain"] = fcfs["ls_turnaround"] / rows["ls_turnaround"]
    rows["be_over_fcfs"] = rows["be_turnaround"] / fcfs["be_turnaround"]
    rows["throughput_over_fcfs"] = rows["throughput"] / fcfs["throughput"]
    return rows.rename_axis("policy").reset_index().assign(rate=rate)


SHOWN = {
    "policy": "policy",
    "ttft_mean": "LS TTFT s",
    "ttft_p99": "p99",
    "ttft_gain": "fcfs's /",
    "slo": "LS SLO",
    "turnaround_gain": "LS turnaround, fcfs's /",
    "be_turnaround": "BE turnaround s",
    "be_over_fcfs": "/ fcfs's",
    "throughput": "requests/s",
    "throughput_over_fcfs": "/ fcfs's ",
}


def main() -> None:
    parser = options(__doc__, "slack_paper")
    parser.add_argument("--rates", nargs="+", type=float, default=[1, 2, 4, 6, 7])
    args = parser.parse_args()
    overrides = ["sweep={}", "rate=1", *([f"requests={args.requests}"] if args.requests else [])]
    config = load_config(CONFIGS / "paper.yaml", overrides)
    tables = []
    for rate in args.rates:
        found = table(config, rate, args.jobs)
        shown = found[list(SHOWN)].rename(columns=SHOWN).round(3).to_string(index=False)
        print(f"\npaper, {rate:g} requests/s\n", shown, flush=True)
        tables.append(found)
    if args.out:
        timings = load_timings(config.timings)
        source = f"simulated: paper on {timings.source} step times ({config.timings})"
        save(args.out, source=source, tables={"rows": pd.concat(tables)})


if __name__ == "__main__":
    main()
