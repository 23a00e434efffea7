"""Capacity by search against capacity read off a fine sweep, and how long the search takes.

    python benchmarks/capacity.py [--config configs/long_prefill.yaml] [--jobs 2] [--out docs/results/capacity.json]

The sweep simulates every policy whole, with `qllm simulate`, at rates around what the search found, a step of 1.5 %
from one to the next. Read off it:

    SLO         where rates that meet the SLO of every class, all seeds pooled, end and those that fail begin: the place
                with the fewest exceptions, since near it one request more or less decides
    saturation  the most requests per second of makespan that any of its rates gives

and the capacity of the sweep is the lower of the two. Simulated on the step times that the configuration names.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF

import numpy as np
import pandas as pd
from joblib.externals.loky import get_reusable_executor
from results_file import add_out, save

from qllm import simulate
from qllm.capacity.capacity import find_capacity
from qllm.config.config import Config
from qllm.experiment.metrics import totals

CONFIGS = Path(__file__).parents[1] / "configs"
STEP, AROUND = 1.015, 12  #: of the sweep: ratio of two rates, and how many on either side


def by_sweep(config: Config, policy: str, rate: float, jobs: int) -> tuple[float, float]:
    """Where the SLOs begin to fail (inf: nowhere), and the highest throughput, in a fine sweep around `rate`."""
    rates = [float(f"{rate * STEP**k:.6g}") for k in range(-AROUND, AROUND + 1)]
    mine = [one for one in config.policies if one.title == policy]
    summary = simulate(
        config.model_copy(update={"policies": mine, "sweep": {"rate": rates}}), jobs=jobs, any_size=True
    ).summary
    asked = config.capacity.attainment
    met = (summary["slo_attainment"].isna() | (summary["slo_attainment"] >= asked)).groupby(summary["rate"]).all()
    good = met.sort_index().to_numpy()
    wrong = [int((~good[:k]).sum() + good[k:].sum()) for k in range(len(good) + 1)]
    last = int(np.argmin(wrong))  # so many rates meet it
    slo = np.inf if last == len(rates) else rates[last - 1] if last else 0.0
    return float(slo), float(totals(summary)["throughput_rps"].max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGS / "long_prefill.yaml")
    parser.add_argument("--jobs", type=int, default=2)
    add_out(parser, "capacity")
    args = parser.parse_args()
    pd.set_option("display.width", 220, "display.max_columns", 20)
    began = time.perf_counter()
    found = find_capacity(args.config, set=["capacity.price_per_gpu_hour=2.5"], jobs=args.jobs, progress=True)
    seconds = time.perf_counter() - began
    get_reusable_executor().shutdown(wait=True)  # workers that are waited for count in what children used
    used = sum(one.ru_utime + one.ru_stime for one in map(resource.getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN)))
    rows = found.capacity
    print(rows.round(4).to_string(index=False))
    print(f"{int(found.seeds['runs'].sum())} simulations for single seeds, {int(found.seeds['cut'].sum())} ended early")
    print(f"{seconds:.0f} s on {args.jobs} processes, {used:.0f} s of CPU in all")
    swept = []
    for policy, rate in zip(rows["policy"], rows["rate_rps"], strict=True):
        slo, saturation = by_sweep(found.config, policy, rate, args.jobs)
        swept.append({"policy": policy, "slo": slo, "saturation": saturation, "capacity": min(slo, saturation)})
        print(policy, swept[-1], flush=True)
    table = rows.merge(pd.DataFrame(swept), on="policy", suffixes=("", "_sweep"))
    table["difference"] = table["rate_rps"] / table["capacity"] - 1
    print(table[["policy", "rate_rps", "capacity", "difference", "limit"]].round(4).to_string(index=False))
    if args.out:
        kept = ["policy", "rate_rps", "rate_lo_rps", "rate_hi_rps", "saturation_rps", "limit", "output_tokens_per_s"]
        kept += ["tokens_per_s", "cost_per_million_output_tokens", "cost_per_million_tokens", "capacity", "difference"]
        timings = found.config.provenance["timings"]
        table = table[kept].rename(columns={"capacity": "by_sweep_rps"})
        facts = {"config": args.config.name, "attainment": found.config.capacity.attainment, "price_per_gpu_hour": 2.5}
        facts |= {"seconds": round(seconds), "cpu_seconds": round(used)}
        save(args.out, source=f"simulated; step times {timings}", tables={"rows": table}, **facts)


if __name__ == "__main__":
    main()
