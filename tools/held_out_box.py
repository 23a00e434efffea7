"""Held-out errors of each GPU in the box: python tools/held_out_box.py [--write]

Of the installed package of tables, for each GPU, model and kernel of the box, printed as mean absolute error (MAPE):

- balanced: each row of evenly spread tokens, predicted from the others.
- uneven: rows whose tokens follow a power law, which no fit has seen. The tables do not keep the draw, so the
  prediction is the mean over 32 draws by the same rule: shares as the inverse distribution function of x^-alpha between
  1 and 0.8 x tokens (0.01 and 2 where there are no more assignments than experts), rounded to whole tokens.
- frameworks: whole passes by each framework's kernels alone, against the trace that ships.
"""

from __future__ import annotations

import argparse
import json
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from check_roofline import pass_errors
from check_timings_held_out import experts_one_out
from derive_timings import BOX

from qllm.traces.step_times.aiconfigurator.importer import import_aiconfigurator
from qllm.traces.step_times.aiconfigurator.kernels import TILES
from qllm.traces.step_times.aiconfigurator.known import KERNELS, import_known
from qllm.traces.step_times.aiconfigurator.tables import Tables, series
from qllm.traces.step_times.data_sheet import data_sheet_name
from qllm.traces.step_times.expert_fit import fit_balanced
from qllm.traces.step_times.file_format import TimingError
from qllm.traces.step_times.interpolate import ExtrapolationWarning
from qllm.traces.step_times.model_shapes import SHAPES, ModelShape
from qllm.traces.step_times.timings import TimingWarning

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "held_out_box.json"
SOURCE = "aiconfigurator-core"
ALPHAS = (1.01, 1.2)
DRAWS = 32
MOST = 16384  # tokens of a pass
# The box has its A100 traces from another folder of tables; the same kernels stand in the package.
ALL = [("a100", "mixtral-8x7b", "int4"), ("a100", "qwen3-30b-a3b", "bf16"), *BOX]


def power_law_counts(rng: np.random.Generator, tokens: int, top_k: int, experts: int, alpha: float) -> np.ndarray:
    """Tokens of each expert, int64[experts], by one draw."""
    assigned = tokens * top_k
    low, high = (1.0, 0.8 * tokens) if assigned > experts else (0.01, 2.0)
    a = 1 - alpha
    sizes = (low**a + rng.random(experts) * (high**a - low**a)) ** (1 / a)
    counts = np.rint(sizes / sizes.sum() * assigned).astype(np.int64)
    order, rest = np.argsort(-counts), assigned - int(counts.sum())
    while rest:  # one token more, or less where there is one, for the largest first
        step = int(np.sign(rest))
        for at in order[: abs(rest)]:
            if counts[at] + step >= 0:
                counts[at] += step
                rest -= step
    return counts


def moe_errors(tables: Tables, shape: ModelShape, framework: str, dtype: str) -> dict[str, list[float]]:
    """Relative errors of a layer: "balanced", and by alpha. TimingError where the tables do not hold it."""
    wanted = {"hidden_size": shape.hidden, "inter_size": shape.inter, "num_experts": shape.experts, "topk": shape.top_k}
    wanted |= {"moe_tp_size": 1, "moe_ep_size": 1}
    rows, name = tables.read("moe", framework, moe_dtype=dtype, **wanted, distribution="balanced")
    tile = TILES.get(rows["kernel_source"].iloc[0])
    layer = series(rows, "num_tokens")
    layer = layer[layer.index <= MOST]
    fit = fit_balanced(layer, shape.experts, shape.top_k, tile)
    errors = {"balanced": experts_one_out(layer, shape, tile)}
    rng = np.random.default_rng(0)
    for alpha in ALPHAS:
        uneven, _ = tables.read("moe", name, moe_dtype=dtype, **wanted, distribution=f"power_law_{alpha}")
        measured = series(uneven, "num_tokens")
        errors[str(alpha)] = []
        for tokens in [int(n) for n in measured.index if n <= MOST]:
            drawn = [power_law_counts(rng, tokens, shape.top_k, shape.experts, alpha) for _ in range(DRAWS)]
            errors[str(alpha)].append(float(fit.predicted(drawn).mean()) / measured[tokens] - 1)
    return errors


def framework_errors(gpu: str, model: str, dtype: str, tables: Tables) -> dict[str, float]:
    """Of each framework that has all tables: the mean absolute difference of whole passes from the trace that ships."""
    shipped, found = import_known(gpu, SHAPES[model], dtype), {}
    for framework in tables.frameworks("moe"):
        for moe_dtype, gemm_dtype in KERNELS[dtype]:
            choice = {"moe": framework, "dense": framework, "attention": framework}
            try:
                alone = import_aiconfigurator(
                    *(SOURCE,),
                    **choice,
                    shape=SHAPES[model],
                    gpu=data_sheet_name(gpu),
                    moe_dtype=moe_dtype,
                    gemm_dtype=gemm_dtype,
                )
            except TimingError:
                continue
            found[framework] = float(np.mean(np.abs(list(pass_errors(alone, shipped).values()))))
            break
    return found


def mape(errors: list[float]) -> str:
    return f"{np.mean(np.abs(errors)):.1%}" if errors else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {OUT.name}")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ExtrapolationWarning)
    warnings.simplefilter("ignore", TimingWarning)
    rows: list[list[object]] = []
    for gpu in dict.fromkeys(gpu for gpu, _, _ in ALL):
        tables = Tables(SOURCE, data_sheet_name(gpu))
        kinds: dict[str, list[float]] = {"balanced": [], **{str(alpha): [] for alpha in ALPHAS}}
        apart: list[float] = []
        kernels = 0
        for model, dtype in [(model, dtype) for of, model, dtype in ALL if of == gpu]:
            for framework in tables.frameworks("moe"):
                for moe_dtype, _ in KERNELS[dtype]:
                    try:
                        errors = moe_errors(tables, SHAPES[model], framework, moe_dtype)
                    except TimingError:
                        continue
                    kernels += 1
                    told = "  ".join(f"{kind} {mape(found)}" for kind, found in errors.items())
                    print(f"{gpu} {model} {moe_dtype} {framework}: {told}")
                    for kind, found in errors.items():
                        kinds[kind] += found
            frameworks = framework_errors(gpu, model, dtype, tables)
            print(f"{gpu} {model} {dtype}, passes: " + "  ".join(f"{f} {e:.0%}" for f, e in frameworks.items()))
            apart += frameworks.values()
        told = [mape(found) for found in kinds.values()]
        shown = "  ".join(f"{kind} {error}" for kind, error in zip(kinds, told, strict=True))
        print(f"== {gpu}: {kernels} kernels: {shown}; passes by one framework alone {mape(apart)}")
        largest = max(abs(error) for found in kinds.values() for error in found)
        rows.append([gpu, kernels, *told, f"{largest:.0%}", mape(apart)])
    if args.write:
        told_of = {
            "command": "python tools/held_out_box.py --write",
            "date": date.today().isoformat(),
            "versions": {name: version(name) for name in ("numpy", "aiconfigurator-core")},
            "source": "computed from measurements imported from NVIDIA aiconfigurator",
        }
        columns = ["gpu", "kernels", "balanced", *(f"uneven_{alpha}" for alpha in ALPHAS), "largest", "frameworks"]
        lines = ",\n".join(json.dumps(row) for row in rows)
        table = f'"rows": {{"columns": {json.dumps(columns)}, "rows": [\n{lines}\n]}}'
        OUT.write_text(f'{{\n"provenance": {json.dumps(told_of, indent=1)},\n{table}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
