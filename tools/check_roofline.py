"""How far traces modelled from data sheets are from the imported ones that ship.

python tools/check_roofline.py [--fit] [--write]

For each imported trace the same model and GPU is modelled with the default costs. Printed are the errors of whole
passes (modelled / imported - 1, experts evenly loaded), and of each step by what factor its rows are off (geometric
mean).
The costs come from the two A100 traces alone (`--fit` prints them): the other GPUs are predictions. `--write` keeps the
figures in docs/results/roofline.json.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.data_sheet import DATA_SHEETS, data_sheet_name
from qllm.traces.step_times.file_format import STEPS
from qllm.traces.step_times.interpolate import ExtrapolationWarning
from qllm.traces.step_times.model_shapes import SHAPES
from qllm.traces.step_times.modelled import Costs, roofline_timings
from qllm.traces.step_times.timings import Timings, TimingWarning, bundled_timings

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "roofline.json"
FITTED_ON = ("a100-mixtral-8x7b-int4", "a100-qwen3-30b-a3b-bf16")
# (new tokens of a prompt, sequences that decode, tokens that each of these has cached)
PASSES = {
    "decode 1": (0, 1, 1024),
    "decode 32": (0, 32, 1024),
    "decode 256": (0, 256, 1024),
    "prefill 512": (512, 0, 0),
}
PASSES |= {"prefill 4096": (4096, 0, 0), "prefill 2048 + decode 32": (2048, 32, 1024)}
SHARES = {  # of Costs: the steps whose rows it is fitted to
    "gemm_efficiency": ("dense_pre", "dense_post", "head"),
    "expert_efficiency": ("expert",),
    "attention_efficiency": ("attention_prefill",),
}
GRID = [round(0.2 + 0.025 * i, 3) for i in range(33)]


def imported() -> list[str]:
    """Names of the imported traces that ship."""
    return [name for name in bundled_timings() if Timings.load(name).source == "imported"]


def modelled(name: str, costs: Costs) -> Timings:
    """The same GPU, model and types by its data sheet."""
    gpu, rest = name.split("-", 1)
    model, dtype = rest.rsplit("-", 1)
    return roofline_timings(SHAPES[model], DATA_SHEETS[data_sheet_name(gpu)], dtype=dtype, costs=costs)


def pass_seconds(timings: Timings, prompt: int, decode: int, context: int) -> float:
    """Seconds of a pass without the host's time, which is a parameter of both."""
    steps = PassCostModel(replace(timings, host_s=0.0))
    rows = decode + (prompt > 0)
    cost = steps.cost([(None, prompt, 0)] if prompt else [], decode, decode * context, rows)
    share, rest = divmod((prompt + decode) * timings.top_k, timings.experts)
    counts = np.array([share + 1] * rest + [share] * (timings.experts - rest))
    return steps.total(cost, timings.layers * float(steps.experts(counts).sum()))


def step_factors(timings: Timings, mine: Timings) -> dict[str, float]:
    """Of each step, by what factor its rows are off in the geometric mean."""
    found = {}
    for step in STEPS:
        points = [p for p in timings.points if p.step == step and p.source == "imported"]
        logs = []
        for p in points:
            seconds = getattr(mine, step)(*((p.tokens,) if p.context is None else (p.tokens, p.context)))
            logs.append(abs(math.log(seconds / p.seconds)))
        found[step] = math.exp(float(np.mean(logs)))
    return found


def pass_errors(timings: Timings, mine: Timings) -> dict[str, float]:
    """Modelled / imported - 1 of each kind of pass."""
    return {what: pass_seconds(mine, *size) / pass_seconds(timings, *size) - 1 for what, size in PASSES.items()}


def fit(names: Sequence[str]) -> Costs:
    """The costs that suit these traces best: constants from their smallest rows, then each share of the peak alone."""
    loaded = {name: Timings.load(name) for name in names}
    base = float(np.exp(np.mean(np.log([timings.experts_base_s for timings in loaded.values()]))))
    smallest = [min(p.seconds for p in t.points if p.step.startswith("attention")) for t in loaded.values()]
    costs = Costs(experts_base_s=round(base, 6), attention_s=round(float(np.mean(smallest)), 6))

    def off(key: str, value: float) -> float:
        trial = replace(costs, **{key: value})
        factors = [step_factors(timings, modelled(name, trial)) for name, timings in loaded.items()]
        return sum(math.log(factor[step]) for factor in factors for step in SHARES[key])

    best = {key: min(GRID, key=lambda value, key=key: off(key, value)) for key in SHARES}
    return replace(costs, **best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="print the costs that the A100 traces suggest")
    parser.add_argument("--write", action="store_true", help=f"write {OUT.name}")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ExtrapolationWarning)
    warnings.simplefilter("ignore", TimingWarning)
    if args.fit:
        print(fit(FITTED_ON))
        return
    rows = []
    for name in imported():
        timings = Timings.load(name)
        mine = modelled(name, Costs())
        errors, factors = pass_errors(timings, mine), step_factors(timings, mine)
        used = "fitted" if name in FITTED_ON else "held out"
        print(f"{name:<28} {used:<8} " + "  ".join(f"{what} {error:+.0%}" for what, error in errors.items()))
        print(f"{'':<37} " + "  ".join(f"{step} x{factor:.2f}" for step, factor in factors.items()))
        rows.append([name, used, *(round(error, 3) for error in errors.values())])
        rows[-1] += [round(factor, 2) for factor in factors.values()]
    summary = []
    for gpu in dict.fromkeys(row[0].split("-")[0] for row in rows):
        mine = [row for row in rows if row[0].split("-")[0] == gpu]
        sizes = np.abs([row[2 : 2 + len(PASSES)] for row in mine])
        print(f"{gpu}: passes off by {sizes.mean():.0%} in the mean, {sizes.max():.0%} at most, {len(mine)} traces")
        summary.append([gpu, mine[0][1], len(mine), round(float(sizes.mean()), 3), round(float(sizes.max()), 3)])
    if args.write:
        told = {
            "command": "python tools/check_roofline.py --write",
            "date": date.today().isoformat(),
            "versions": {name: version(name) for name in ("qllm-moe", "numpy")},
            "source": "computed from data sheets, beside what is imported from NVIDIA aiconfigurator's measurements",
        }
        tables = {
            "gpus": {"columns": ["gpu", "used", "traces", "mean", "largest"], "rows": summary},
            "traces": {"columns": ["trace", "used", *PASSES, *STEPS], "rows": rows},
        }
        OUT.write_text(_rendered({"provenance": told, **tables}), encoding="utf-8")


def _rendered(found: dict[str, object]) -> str:
    """JSON with a row of a table in a line."""
    parts = [f'"provenance": {json.dumps(found["provenance"], indent=1)}']
    for key in ("gpus", "traces"):
        table = found[key]
        assert isinstance(table, dict)
        lines = ",\n".join(json.dumps(row) for row in table["rows"])
        parts.append(f'"{key}": {{"columns": {json.dumps(table["columns"])}, "rows": [\n{lines}\n]}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
