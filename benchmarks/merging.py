"""qllm and hybrid without and with shared expert queues (`merge`), on two configurations: what merging buys.

    python benchmarks/merging.py [CONFIG ...] [--jobs 2] [--out docs/results/merging.json]

Simulated on imported or modelled A100 timings (the caption says which), not measured. All policies see the same
requests, but a pass that takes another time changes which requests share the next one: differences within the spread of
the seeds (last column, standard deviation of the BE turnaround's mean over the seeds) say nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from results_file import add_out, save

from qllm import load_config, simulate
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.timings import Timings

CONFIGS = Path(__file__).parents[1] / "configs"
RATES = {"paper": 2, "long_prefill": 0.4}
POLICIES = """[
    {name: qllm, fill_tokens: 0}, {name: qllm, fill_tokens: 0, merge: true, label: qllm+merge},
    {name: qllm, fill_tokens: 0, resume: idle, label: idle},
    {name: qllm, fill_tokens: 0, resume: idle, merge: true, label: idle+merge},
    {name: hybrid}, {name: hybrid, merge: true, label: hybrid+merge}]"""


def table(requests: pd.DataFrame) -> pd.DataFrame:
    """A row per policy."""
    rows = {}
    for policy, mine in requests.groupby("policy", sort=False):
        ls, be = (mine[mine["class"] == c] for c in ("ls", "be"))
        turnaround = be["finish_s"] - be["arrival_s"]
        ttft = ls["first_token_s"] - ls["arrival_s"]
        rows[policy] = {
            "LS TTFT mean ms": 1e3 * ttft.mean(),
            "p99 ms": 1e3 * ttft.quantile(0.99),
            "BE turnaround s": turnaround.mean(),
            "preempted per BE": be["preemptions"].mean(),
            "over seeds s": turnaround.groupby(be["seed"]).mean().std(),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=[str(CONFIGS / f"{name}.yaml") for name in RATES])
    parser.add_argument("--jobs", type=int, default=2)
    add_out(parser, "merging")
    args = parser.parse_args()
    tables, sources = {}, []
    pd.set_option("display.width", 220, "display.max_columns", 20)
    for config in args.configs:
        rate = RATES.get(Path(config).stem)
        chosen = [] if rate is None else [f"sweep.rate=[{rate}]"]
        results = simulate(config, jobs=args.jobs, set=[f"policies={POLICIES}", *chosen])
        most = PassCostModel(Timings.load(load_config(config).timings)).merge_rows
        told = results.config.provenance["timings"]
        print(f"\n{Path(config).stem} at {rate or 'all'} requests/s ({told}); merge_rows: {most}")
        rows = table(results.requests)
        print(rows.round(4).to_string())
        name, kind = told.split(";")[0].split(": ")
        sources.append(f"{Path(config).stem} on {kind} step times ({name}; merge_rows {most})")
        tables[Path(config).stem] = rows.rename_axis("policy").reset_index().assign(rate=rate)
    if args.out:
        save(args.out, source="simulated: " + ", ".join(sources), tables=tables)


if __name__ == "__main__":
    main()
