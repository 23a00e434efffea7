"""What a prefix cache is worth to conversations: with less and less memory for KV, with the cache and without.

    python benchmarks/prefix_cache.py [--config configs/conversations.yaml] [--rate 1.5] [--jobs 2]
        [--out docs/results/prefix_cache.json]

Simulated on the step times that the configuration names. All see the same conversations; a turn comes when the last was
answered. "Least": as many blocks as the longest conversation takes, twice.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from results_file import add_out, save

from qllm import load_config, simulate
from qllm.config.from_config import load_timings, scheduler_limits
from qllm.config.workload import request_trace
from qllm.experiment.metrics import totals

CONFIG = Path(__file__).parents[1] / "configs" / "conversations.yaml"
PLACES = 3  #: sizes of the memory, from all of it to the least


def sizes(config: Path) -> list[int]:
    """KV blocks: what the GPU has, down to twice what the longest request takes, in equal ratios."""
    loaded = load_config(config)
    limits = scheduler_limits(loaded, load_timings(loaded.timings))
    traces = [request_trace(loaded.at({}), seed) for seed in loaded.seed_list]
    longest = max(int((trace.prompt_tokens + trace.output_tokens).max()) for trace in traces)
    least = 2 * -(-longest // limits.block_size)
    return np.geomspace(limits.blocks, least, PLACES).round().astype(int).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second")
    parser.add_argument("--jobs", type=int, default=2)
    add_out(parser, "prefix_cache")
    args = parser.parse_args()
    swept = f"sweep={{limits.kv_blocks: {sizes(args.config)}, limits.prefix_cache: [false, true]}}"
    found = simulate(load_config(args.config, [f"rate={args.rate}", swept]), jobs=args.jobs, progress=True)
    by = ["limits.kv_blocks", "policy", "limits.prefix_cache"]
    summary = found.summary.assign(policy=found.summary["policy"].astype(str))
    summary["limits.prefix_cache"] = summary["limits.prefix_cache"].astype(str) == "true"
    every = totals(summary).set_index(by)
    classes = [summary[summary["class"] == name].set_index(by) for name in ("chat", "agent")]
    chat, agent = classes
    prompts = found.requests.groupby("class", observed=True)["prompt_tokens"].sum()
    cached = sum(one["cached_share"] * prompts[name] for one, name in zip(classes, ("chat", "agent"), strict=True))
    table = pd.DataFrame(
        {
            "cached_share": cached / prompts[["chat", "agent"]].sum(),
            "chat_ttft_mean_ms": 1e3 * chat["ttft_mean_s"],
            "chat_ttft_p99_ms": 1e3 * chat["ttft_p99_s"],
            "chat_tpot_p99_ms": 1e3 * chat["tpot_p99_s"],
            "agent_turnaround_s": agent["turnaround_mean_s"],
            "evictions": every["evictions"],
            "throughput_rps": every["throughput_rps"],
        }
    ).reset_index(names=["kv_blocks", "policy", "prefix_cache"])
    table["cached_share"] = table["cached_share"].fillna(0.0)
    print(table.round(3).to_string(index=False))
    if args.out:
        timings = load_config(args.config).timings
        source = f"simulated; step times {timings} ({load_timings(timings).source})"
        save(args.out, source=source, tables={"rows": table}, config=args.config.name, rate=args.rate)


if __name__ == "__main__":
    main()
