"""The schedules of docs/img/policies.png: one small scene under every policy that ships.

    python benchmarks/policy_timelines.py [--out docs/results/policies.json]

A long BE prompt runs, an LS request comes and decodes, another LS request comes; a second BE prompt waits. Simulated on
imported A100 kernel times.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from results_file import RESULTS, save
from timeline import PRIORITIES, TIMINGS, rows

from qllm.scheduler import POLICIES, Limits, make_policy
from qllm.sim import simulate
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import RunResult
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.timings import Timings

#: settings of those that are not shown with their defaults
SETTINGS: dict[str, dict[str, Any]] = {"layer": {"fill_tokens": 0}, "qllm": {"fill_tokens": 0}}
#: arrival (s), prompt tokens, output tokens, class
REQUESTS = (
    (0.00, 12_288, 12, "be"),
    (0.05, 8192, 12, "be"),
    (0.20, 500, 30, "ls"),
    (0.55, 500, 12, "ls"),
)


def trace() -> RequestTrace:
    """The requests of the scene."""
    arrival, prompt, output, names = zip(*REQUESTS, strict=True)
    cls = np.array([("ls", "be").index(name) for name in names])
    return RequestTrace(np.array(arrival), np.array(prompt), np.array(output), cls, ("ls", "be"))


def run(policy: str, steps: PassCostModel) -> RunResult:
    """The scene under one policy."""
    return simulate(
        trace(),
        priorities=PRIORITIES,
        policy=make_policy(policy, **SETTINGS.get(policy, {})),
        limits=Limits(max_seqs=32, max_batched_tokens=12_288, kv_blocks=4096, block_size=16),
        steps=steps,
        timeline=True,
    )


def requests(results: list[RunResult]) -> list[dict[str, Any]]:
    """A row per panel and request, times in seconds."""
    asked = trace()
    return [
        {
            "panel": panel,
            "class": asked.classes[asked.cls[i]],
            "prompt_tokens": int(asked.prompt_tokens[i]),
            "output_tokens": int(asked.output_tokens[i]),
            "arrival": float(result.arrival[i]),
            "first_token": float(result.first_token[i]),
            "finish": float(result.finish[i]),
        }
        for panel, result in enumerate(results)
        for i in range(len(asked))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "policies.json", metavar="FILE")
    out = parser.parse_args().out
    timings = Timings.load(TIMINGS)
    steps = PassCostModel(timings, max_step=0.002)
    told = f"simulated; step times {timings.name}: {timings.source}; {timings.device}; {timings.model}; {timings.dtype}"
    results = [run(policy, steps) for policy in POLICIES]
    panels = [
        {"policy": name, "settings": ", ".join(f"{key} {value}" for key, value in SETTINGS.get(name, {}).items())}
        for name in POLICIES
    ]
    tables = {"panels": panels, "requests": requests(results), "slices": rows(results)}
    save(out, source=told, tables=tables, layers=timings.layers)
    print(f"{out}; `make figures` draws it")


if __name__ == "__main__":
    main()
