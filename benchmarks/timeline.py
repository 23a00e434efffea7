"""The schedules of docs/img/timeline.png, or timeline_engine.png: a few requests under fcfs, priority and qllm.

    python benchmarks/timeline.py [--out docs/results/timeline.json]
    python benchmarks/timeline.py --engine FOLDER [--threads 2]    # FOLDER: that of tools/make_moe.py, or where to

The picture of the paper's figure 1, from our own scheduler: two long BE prompts, and LS prompts that arrive while they
run. Simulated on imported A100 kernel times with prompts of 16k tokens; with --engine, measured on the real engine on
this CPU, prompts a fourth as long and arrivals twice as far apart. Needs a machine that does nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from results_file import RESULTS, save

from qllm.scheduler import Limits, make_policy
from qllm.sim import simulate
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import RunResult
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.timings import Timings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = ("start", "end", "pass_id", "priority", "prefills", "first_layer", "layer")  #: of a slice, in the picture
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


def run(policy: str, settings: dict, steps: PassCostModel) -> RunResult:
    """The picture's requests under one policy, simulated."""
    return simulate(
        trace(),
        priorities=PRIORITIES,
        policy=make_policy(policy, **settings),
        limits=Limits(max_seqs=32, max_batched_tokens=16_384, kv_blocks=4096, block_size=16),
        steps=steps,
        timeline=True,
    )


def run_engine(policy: str, settings: dict, model: PreTrainedModel) -> RunResult:
    """The same on the real engine."""
    from qllm.executor import Engine, replay

    limits = Limits(max_seqs=32, max_batched_tokens=LONG // ENGINE_SHORTER, kv_blocks=1024, block_size=16)
    with Engine(model, policy=make_policy(policy, **settings), limits=limits) as engine:
        replay(engine, trace(True).head(1), priorities=PRIORITIES)  # warms up
        return replay(engine, trace(True), priorities=PRIORITIES)


def rows(results: list[RunResult]) -> list[dict[str, Any]]:
    """What the picture shows of each panel's passes: a row a stretch that a pass ran."""
    found = []
    for panel, result in enumerate(results):
        for piece in result.slices or []:
            found.append({"panel": panel, **{name: getattr(piece, name) for name in SHOWN}})
    return found


def requests(results: list[RunResult], asked: RequestTrace) -> list[dict[str, Any]]:
    """A row per panel and request, times in seconds."""
    columns = (asked.cls, asked.arrival, asked.prompt_tokens)
    return [
        {"panel": panel, "class": asked.classes[cls], "prompt_tokens": tokens, "arrival": at, "first_token": first}
        for panel, result in enumerate(results)
        for cls, at, tokens, first in zip(*(x.tolist() for x in (*columns, result.first_token)), strict=True)
    ]


def write(out: Path, results: list[RunResult], asked: RequestTrace, layers: int, source: str) -> None:
    """The results file that tools/figures.py draws the picture from."""
    titles = [{"policy": policy, "title": title} for policy, _, title in PANELS]
    tables = {"panels": titles, "requests": requests(results, asked), "slices": rows(results)}
    save(out, source=source, tables=tables, layers=layers)


def simulated(out: Path) -> None:
    timings = Timings.load(TIMINGS)
    steps = PassCostModel(timings, max_step=0.002)
    told = f"simulated; step times {timings.name}: {timings.source}; {timings.device}; {timings.model}; {timings.dtype}"
    results = [run(policy, settings, steps) for policy, settings, _ in PANELS]
    write(out, results, trace(), timings.layers, told)


def measured(out: Path, folder: Path, threads: int) -> None:
    import torch

    from qllm.executor.calibration.environment import device_name
    from qllm.executor.model.info import model_facts
    from qllm.executor.model.loading import load_model
    from qllm.executor.testing import make_checkpoint

    torch.set_num_threads(threads)
    model = load_model(make_checkpoint(folder), dtype="float32")
    told = f"measured on the real engine: {device_name(model.device)}; Qwen3-MoE of 166 M random parameters; float32"
    results = [run_engine(policy, settings, model) for policy, settings, _ in PANELS]
    write(out, results, trace(True), model_facts(model)["layers"], told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engine", type=Path, metavar="FOLDER", help="measure on the real engine, with this checkpoint"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: docs/results/timeline.json, or timeline_engine"
    )
    args = parser.parse_args()
    out = args.out or RESULTS / ("timeline_engine.json" if args.engine else "timeline.json")
    if args.engine:
        measured(out, args.engine, args.threads)
    else:
        simulated(out)
    print(f"{out}; `make figures` draws it")


if __name__ == "__main__":
    main()
