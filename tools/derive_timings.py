"""Re-create the timing traces that ship in traces/data/timings: python tools/derive_timings.py [SOURCE]

Those of BOX come from the installed package of tables (extra `timings`). The three A100 traces that came first are made
of SOURCE, a folder of aiconfigurator tables (default ../shared/data/a100; one of them left the newer package) or
"aiconfigurator-core"; where SOURCE lacks them, they stay as they are, and the tool says so.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from eager_4bit import model_eager_4bit

from qllm.traces.step_times.aiconfigurator.importer import import_aiconfigurator
from qllm.traces.step_times.aiconfigurator.known import import_known
from qllm.traces.step_times.file_format import TimingError, TimingWarning
from qllm.traces.step_times.model_shapes import SHAPES
from qllm.traces.step_times.timings import Timings

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "traces" / "data" / "timings"
# What fits with room for KV in a GPU; of DeepSeek-V3, which fits in none, the layers of one.
BOX = [
    *(("h100", model, dtype) for model, dtype in (("qwen3-30b-a3b", "bf16"), ("qwen3-30b-a3b", "fp8"))),
    *(("h100", "mixtral-8x7b", dtype) for dtype in ("fp8", "int4")),
    *(("h100", f"gpt-oss-{size}", "mxfp4") for size in ("20b", "120b")),
    *((gpu, "qwen3-30b-a3b", dtype) for gpu in ("h200", "b200") for dtype in ("bf16", "fp8")),
    *((gpu, "mixtral-8x7b", dtype) for gpu in ("h200", "b200") for dtype in ("bf16", "fp8")),
    *((gpu, f"gpt-oss-{size}", "mxfp4") for gpu in ("h200", "b200") for size in ("20b", "120b")),
    ("b200", "qwen3-235b-a22b", "nvfp4"),
    ("h200", "deepseek-v3", "fp8"),
    ("b200", "deepseek-v3", "nvfp4"),
    ("l40s", "qwen3-30b-a3b", "fp8"),
    ("l40s", "gpt-oss-20b", "mxfp4"),
]


def derive(source: str | Path) -> list[Timings]:
    """The A100 traces, from the tables in `source`."""
    mixtral_int4 = import_aiconfigurator(
        source,
        shape=SHAPES["mixtral-8x7b"],
        moe="sglang:0.5.10",
        moe_dtype="int4_wo",
        dense="sglang:0.5.10",
        attention="vllm:0.14.0",
        expert_weights="int4",
        name="a100-mixtral-8x7b-int4",
    )
    qwen3 = import_aiconfigurator(
        source,
        shape=SHAPES["qwen3-30b-a3b"],
        moe="trtllm:1.2.0rc5",
        moe_dtype="float16",  # so labelled; the kernel ran in bfloat16
        dense="sglang:0.5.10",
        attention="vllm:0.14.0",
        name="a100-qwen3-30b-a3b-bf16",
    )
    mixtral_hf = model_eager_4bit(
        source,
        shape=SHAPES["mixtral-8x7b"],
        dense="sglang:0.5.10",
        attention="vllm:0.14.0",
        moe="sglang:0.5.10",
        name="a100-mixtral-8x7b-4bit-hf",
    )
    return [mixtral_int4, qwen3, mixtral_hf]


def box() -> Iterator[Timings]:
    """The traces of BOX, from the installed package."""
    for gpu, model, dtype in BOX:
        yield import_known(gpu, SHAPES[model], dtype)


if __name__ == "__main__":
    warnings.simplefilter("ignore", TimingWarning)  # the files say it
    try:
        first = derive(sys.argv[1] if len(sys.argv) > 1 else ROOT.parent / "shared" / "data" / "a100")
    except TimingError as error:
        first = []
        print(f"the A100 traces stay as they are: {error}")
    for timings in (*first, *box()):
        timings.save(OUT / f"{timings.name}.csv")
        print(f"{timings.name}: {len(timings.points)} points, {timings.framework}")
    sizes = [path.stat().st_size for path in OUT.glob("*.csv")]
    print(f"{len(sizes)} files, {sum(sizes) / 1e3:.0f} kB")
