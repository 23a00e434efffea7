"""Draw docs/img/timeline.png: the same few requests under fcfs, priority and qllm.

    python benchmarks/timeline.py [--out docs/img/timeline.png]

The picture of the paper's figure 1, from our own scheduler: two BE prompts of 16k tokens, and LS prompts that arrive
while they run. Simulated on imported A100 kernel times, not measured here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qllm.timeline_figure import plot_timeline, timeline_key
from scheduler import Limits, make_policy
from sim import SimResult, simulate
from traces.requests import RequestTrace
from traces.steps import StepModel
from traces.timing import Timings

NAMES = {0: "LS", 1: "BE"}
LONG = 16_384  #: tokens of a BE prompt
TIMINGS = "a100-qwen3-30b-a3b-bf16"
PANELS = (
    ("fcfs", {}, "fcfs: LS prompts wait for everything that came before them"),
    ("priority", {}, "priority, between passes: LS prompts wait for the end of the BE pass that runs"),
    ("qllm", {"fill_tokens": 0}, "qllm: the BE pass stops inside a layer, lets LS run, and goes on where it stood"),
)
#: arrival (s), prompt tokens, output tokens, class
REQUESTS = (
    (0.00, LONG, 12, "be"),
    (0.10, LONG, 12, "be"),
    (0.35, 500, 8, "ls"),
    (0.90, 1000, 8, "ls"),
    (2.10, 500, 8, "ls"),
)


def trace() -> RequestTrace:
    """The requests of the picture."""
    arrival, prompt, output, names = zip(*REQUESTS, strict=True)
    cls = np.array([("ls", "be").index(name) for name in names])
    return RequestTrace(np.array(arrival), np.array(prompt), np.array(output), cls, ("ls", "be"))


def run(policy: str, settings: dict, steps: StepModel) -> SimResult:
    """The picture's requests under one policy."""
    return simulate(
        trace(),
        priorities={"ls": 0, "be": 1},
        policy=make_policy(policy, **settings),
        limits=Limits(max_seqs=32, max_tokens=16_384, kv_blocks=4096, block_size=16),
        steps=steps,
        timeline=True,
    )


def panel(ax: Axes, result: SimResult, title: str, layers: int) -> None:
    """One schedule, the LS requests below."""
    asked = trace()
    requests = list(zip(asked.cls.tolist(), asked.arrival.tolist(), result.first_token.tolist(), strict=True))
    plot_timeline(result.slices or [], NAMES, layers=layers, requests=[r for r in requests if r[0] == 0], ax=ax)
    ax.set_title(title, fontsize=10, loc="left")


def draw(out: Path) -> None:
    """Write the figure to `out`."""
    timings = Timings.load(TIMINGS)
    steps = StepModel(timings, max_step=0.002)
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    for ax, (policy, settings, title) in zip(axes, PANELS, strict=True):
        panel(ax, run(policy, settings, steps), title, timings.layers)
    axes[0].set_xlim(0, 1.05 * max(ax.get_xlim()[1] for ax in axes))
    for ax in axes[:-1]:
        ax.set_xlabel("")
    figure.legend(**timeline_key(NAMES), loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    asked = (
        "Two BE prompts of 16,384 tokens arrive at 0 and 0.1 s, three LS prompts of 500 to 1,000 tokens while they run."
    )
    source = f"Simulated. Timings: {timings.name}: {timings.source}; {timings.device}; {timings.model}; {timings.dtype}"
    figure.supxlabel(f"{asked}\n{source}", fontsize=7, color="0.35")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "img" / "timeline.png")
    args = parser.parse_args()
    draw(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
