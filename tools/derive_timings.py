"""Re-create the timing traces that ship in traces/data/timings: python tools/derive_timings.py [SOURCE]

SOURCE is a folder of aiconfigurator tables (default ../shared/data/a100) or "aiconfigurator-core".
"""

from __future__ import annotations

import sys
from pathlib import Path

from eager_4bit import model_eager_4bit

from qllm.traces.step_times.aiconfigurator.importer import import_aiconfigurator
from qllm.traces.step_times.model_shapes import SHAPES
from qllm.traces.step_times.timings import Timings

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "traces" / "data" / "timings"


def derive(source: str | Path) -> list[Timings]:
    """The shipped traces, from the tables in `source`."""
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


if __name__ == "__main__":
    for timings in derive(sys.argv[1] if len(sys.argv) > 1 else ROOT.parent / "shared" / "data" / "a100"):
        timings.save(OUT / f"{timings.name}.csv")
        print(f"{timings.name}: {len(timings.points)} points")
