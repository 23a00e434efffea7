"""Draw docs/img/timeline.png, or timeline_engine.png: the same few requests under fcfs, priority and qllm.

    python benchmarks/timeline.py [--out docs/img/timeline.png]
    python benchmarks/timeline.py --engine FOLDER [--threads 2]    # FOLDER: the checkpoint of make_moe.py, or where to

The picture of the paper's figure 1, from our own scheduler: two long BE prompts, and LS prompts that arrive while they
run. Simulated on imported A100 kernel times with prompts of 16k tokens; with --engine, measured on the real engine on
this CPU, prompts a fourth as long and arrivals twice as far apart. Needs a machine that does nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qllm.plots.schedule import plot_timeline, timeline_key
from qllm.scheduler import Limits, make_policy
from qllm.sim import simulate
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import RunResult
from qllm.traces.step_times.cost_model import StepModel
from qllm.traces.step_times.timings import Timings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMAGES = Path(__file__).parents[1] / "docs" / "img"
NAMES = {0: "LS", 1: "BE"}
PRIORITIES = {"ls": 0, "be": 1}
LONG = 16_384  #: tokens of a BE prompt
TIMINGS = "a100-qwen3-30b-a3b-bf16"
PANELS = (
    ("fcfs", {}, "fcfs: LS prompts wait for everything that came before them"),
    ("priority", {}, "priority, between passes: LS prompts wait for the end of the BE pass that runs"),
    ("qllm", {"fill_tokens": 0}, "qllm: the BE pass stops inside a layer, lets LS run, and goes on where it stood"),
)
ENGINE_SHORTER, ENGINE_SLOWER = 4, 2  #: what a CPU's requests are beside those of the simulated GPU
#: arrival (s), prompt tokens, output tokens, class
REQUESTS = (
    (0.00, LONG, 12, "be"),
    (0.10, LONG, 12, "be"),
    (0.35, 500, 8, "ls"),
    (0.90, 1000, 8, "ls"),
    (2.10, 500, 8, "ls"),
)


def trace(engine: bool = False) -> RequestTrace:
    """The requests of the picture."""
    arrival, prompt, output, names = zip(*REQUESTS, strict=True)
    cls = np.array([("ls", "be").index(name) for name in names])
    at, tokens = np.array(arrival), np.array(prompt)
    if engine:
        at, tokens = ENGINE_SLOWER * at, tokens // ENGINE_SHORTER
    return RequestTrace(at, tokens, np.array(output), cls, ("ls", "be"))


def run(policy: str, settings: dict, steps: StepModel) -> RunResult:
    """The picture's requests under one policy, simulated."""
    return simulate(
        trace(),
        priorities=PRIORITIES,
        policy=make_policy(policy, **settings),
        limits=Limits(max_seqs=32, max_tokens=16_384, kv_blocks=4096, block_size=16),
        steps=steps,
        timeline=True,
    )


def run_engine(policy: str, settings: dict, model: PreTrainedModel) -> RunResult:
    """The same on the real engine."""
    from qllm.executor import Engine, replay

    limits = Limits(max_seqs=32, max_tokens=LONG // ENGINE_SHORTER, kv_blocks=1024, block_size=16)
    with Engine(model, policy=make_policy(policy, **settings), limits=limits) as engine:
        replay(engine, trace(True).head(1), priorities=PRIORITIES)  # warms up
        return replay(engine, trace(True), priorities=PRIORITIES)


def panel(ax: Axes, result: RunResult, asked: RequestTrace, title: str, layers: int) -> None:
    """One schedule, the LS requests below."""
    requests = list(zip(asked.cls.tolist(), asked.arrival.tolist(), result.first_token.tolist(), strict=True))
    plot_timeline(result.slices or [], NAMES, layers=layers, requests=[r for r in requests if r[0] == 0], ax=ax)
    ax.set_title(title, fontsize=10, loc="left")


def draw(out: Path, results: list[RunResult], asked: RequestTrace, layers: int, source: str) -> None:
    """Write the figure to `out`; `source` says where the times are from."""
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    for ax, result, (_, _, title) in zip(axes, results, PANELS, strict=True):
        panel(ax, result, asked, title, layers)
    axes[0].set_xlim(0, 1.05 * max(ax.get_xlim()[1] for ax in axes))
    for ax in axes[:-1]:
        ax.set_xlabel("")
    figure.legend(**timeline_key(NAMES), loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    ls, be = (asked.prompt_tokens[asked.cls == cls] for cls in (0, 1))
    told = f"Two BE prompts of {be[0]:,} tokens arrive at 0 and {asked.arrival[1]:.1f} s, three LS prompts of "
    told += f"{ls.min():,} to {ls.max():,} tokens while they run."
    figure.supxlabel(f"{told}\n{source}", fontsize=7, color="0.35")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, metadata={"Software": None})


def simulated(out: Path) -> None:
    timings = Timings.load(TIMINGS)
    steps = StepModel(timings, max_step=0.002)
    source = f"Simulated. Timings: {timings.name}: {timings.source}; {timings.device}; {timings.model}; {timings.dtype}"
    results = [run(policy, settings, steps) for policy, settings, _ in PANELS]
    draw(out, results, trace(), timings.layers, source)


def measured(out: Path, folder: Path, threads: int) -> None:
    import torch
    from make_moe import make

    from qllm.executor.model.info import device_name, model_facts
    from qllm.executor.model.loading import load_model

    torch.set_num_threads(threads)
    model = load_model(make(folder), dtype="float32")
    source = f"Measured on the real engine: {device_name(model.device)}; Qwen3-MoE of 166 M random parameters; float32"
    results = [run_engine(policy, settings, model) for policy, settings, _ in PANELS]
    draw(out, results, trace(True), model_facts(model)["layers"], source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engine", type=Path, metavar="FOLDER", help="measure on the real engine, with this checkpoint"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: docs/img/timeline.png, or timeline_engine.png")
    args = parser.parse_args()
    out = args.out or IMAGES / ("timeline_engine.png" if args.engine else "timeline.png")
    if args.engine:
        measured(out, args.engine, args.threads)
    else:
        simulated(out)
    print(out)


if __name__ == "__main__":
    main()
