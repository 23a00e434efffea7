"""Imports by the names of a GPU, a model and a type of weights alone; what ships is made by the same function."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from qllm.traces import import_defaults as defaults
from qllm.traces.messages import clipped, suggestion
from qllm.traces.step_times.aiconfigurator.importer import import_aiconfigurator
from qllm.traces.step_times.aiconfigurator.kernels import FASTEST
from qllm.traces.step_times.aiconfigurator.tables import PACKAGE
from qllm.traces.step_times.data_sheet import DATA_SHEETS, data_sheet_name, short_name
from qllm.traces.step_times.file_format import TimingError
from qllm.traces.step_times.model_shapes import PUBLISHED, ModelShape
from qllm.traces.step_times.timings import Timings

# A type of weights as people name it: (type of the experts' kernels, type of the other GEMMs), the first that the
# tables hold. In four bits are the experts alone, as in the checkpoints of gpt-oss and in AWQ and GPTQ ones of MoE.
KERNELS = {
    "bf16": (("bfloat16", "bfloat16"),),
    "fp8": (("fp8_block", "fp8_block"), ("fp8", "fp8")),
    "mxfp4": (("w4a16_mxfp4", "bfloat16"),),
    "nvfp4": (("nvfp4", "bfloat16"),),
    "int4": (("int4_wo", "bfloat16"),),
}
ROOM = 0.9  # of the memory that weights may take where the type is chosen: as much as limits.memory_fraction allows


def trace_name(gpu: str, shape: ModelShape, dtype: str) -> str:
    """What a trace of these is called: h200-qwen3-30b-a3b-bf16."""
    return f"{short_name(data_sheet_name(gpu))}-{shape.name}-{dtype}"


def dtypes_that_fit(gpu: str, shape: ModelShape) -> list[str]:
    """Types of weights to try where none is named: from the published one on, those that leave room for KV."""
    memory = DATA_SHEETS[data_sheet_name(gpu)].memory
    return [kind for kind in list(KERNELS)[_first(shape) :] if _bytes(shape, kind) <= ROOM * memory]


def too_large(gpu: str, shape: ModelShape) -> str:
    """A line that says so of a model that leaves no room in a GPU, whatever the type of its weights."""
    name = data_sheet_name(gpu)
    kinds = list(KERNELS)
    told = ", ".join(f"{_bytes(shape, kind) / 1e9:.0f} GB in {kind}" for kind in kinds[_first(shape) :])
    return (
        f"{shape.name} does not fit in one {short_name(name)} of {DATA_SHEETS[name].memory / 1e9:.0f} GB with room for "
        f"KV: {told}; give the dtype to have its layers' step times all the same (limits.kv_blocks is then needed)"
    )


def _first(shape: ModelShape) -> int:
    return list(KERNELS).index(PUBLISHED.get(shape.name, "bf16"))


def _bytes(shape: ModelShape, dtype: str) -> int:
    return shape.weights_bytes(dtype, dtype if dtype == "fp8" else "bf16")


def import_known(gpu: str, shape: ModelShape, dtype: str, source: str = defaults.SOURCE) -> Timings:
    """A trace by names, of each kind of table by the framework that is fastest. TimingError where there is none."""
    if dtype not in KERNELS:
        raise TimingError(f"unknown dtype {clipped(dtype)!r}; {suggestion(dtype, KERNELS)}")
    errors = []
    for moe_dtype, gemm_dtype in KERNELS[dtype]:
        try:
            return import_aiconfigurator(
                source,
                shape=shape,
                gpu=data_sheet_name(gpu),
                moe=FASTEST,
                moe_dtype=moe_dtype,
                dense=FASTEST,
                gemm_dtype=gemm_dtype,
                attention=FASTEST,
                name=trace_name(gpu, shape, dtype),
            )
        except TimingError as error:
            errors.append(error)
    raise TimingError(f"{trace_name(gpu, shape, dtype)}: {errors[0]}")


def tables_version() -> str | None:
    """The version of the installed package of tables, None where there is none."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    return importlib.metadata.version(defaults.SOURCE)
