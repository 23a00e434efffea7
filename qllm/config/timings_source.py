"""`timings: {gpu: h200, model: qwen3-30b-a3b}`: the trace that ships, or one imported if the tables are installed."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import ValidationError, ValidationInfo

from qllm.traces import import_defaults as defaults
from qllm.traces.requests.strict_model import StrictModel, existing_file, explain
from qllm.traces.step_times.data_sheet import data_sheet_name, short_name
from qllm.traces.step_times.file_format import TimingError, TimingWarning
from qllm.traces.step_times.hf_config import shape_from_config
from qllm.traces.step_times.model_shapes import SHAPES, ModelShape, known_model
from qllm.traces.step_times.timings import bundled_timings


class TimingsSource(StrictModel):
    """Names that stand for a timing trace."""

    gpu: str  #: as h200, h200_sxm, l40s
    model: str  #: as qwen3-30b-a3b or Qwen/Qwen3-30B-A3B, or the path of a config.json
    dtype: str | None = None  #: of the experts' weights; default: as published, or the widest that fits


def named_timings(value: Any, info: ValidationInfo) -> Any:
    """What a mapping under `timings` stands for: a bundled name, or the path of an imported trace. ValueError."""
    if not isinstance(value, dict):
        return value
    try:
        given = TimingsSource.model_validate(value)
    except ValidationError as error:
        key, text = explain(error, value)
        raise ValueError(f"{key[-1]}: {text}" if key else text) from None
    if given.model.endswith(".json"):
        return find_timings(given.gpu, shape_from_config(existing_file(given.model, info)), given.dtype)
    return find_timings(given.gpu, SHAPES[known_model(given.model)], given.dtype)


def find_timings(gpu: str, shape: ModelShape, dtype: str | None = None) -> str:
    """The name of the bundled trace of these, or the path of one that is imported, once a process.

    Args:
        gpu: A key of DATA_SHEETS, with or without its _sxm.
        shape: The model.
        dtype: The type of the experts' weights. Default: the first, from that of the published checkpoint to
            narrower ones, that fits the GPU and that ships; if none ships, the first that can be imported.

    Raises:
        TimingError: A name is unknown, no such trace ships or can be imported, or the model does not fit.
        ValueError: What was imported cannot be written to the user's cache.
    """
    from qllm.traces.step_times.aiconfigurator.known import dtypes_that_fit, tables_version, too_large, trace_name

    gpu = data_sheet_name(gpu)
    kinds = [dtype] if dtype else dtypes_that_fit(gpu, shape)
    if not kinds:
        raise TimingError(too_large(gpu, shape))
    for kind in kinds:
        name = trace_name(gpu, shape, kind)
        if name in bundled_timings() and SHAPES.get(shape.name) == shape:
            return name
    missing = f"no timing trace of {' '.join(filter(None, (short_name(gpu), shape.name, dtype)))} ships"
    if tables_version() is None:
        raise TimingError(f"{missing}, and {defaults.SOURCE} is not installed; {_instead(gpu, shape)}")
    problem = ""
    for kind in kinds:
        try:
            return _imported(gpu, shape, kind)
        except TimingError as error:
            problem = problem or str(error)
    raise TimingError(f"{missing}, nor can one be imported ({problem}); {_instead(gpu, shape)}")


def _instead(gpu: str, shape: ModelShape) -> str:
    """What there is for the same model or else the same GPU, and how to make one."""
    names = [name for name in bundled_timings() if f"-{shape.name}-" in name]
    names = names or [name for name in bundled_timings() if name.startswith(f"{short_name(gpu)}-")]
    there = f"there are: {', '.join(names)}; " if names else ""
    return f"{there}or model one: qllm timings roofline --gpu {gpu} --model {shape.name} --out FILE"


@lru_cache(maxsize=64)
def _imported(gpu: str, shape: ModelShape, dtype: str) -> str:
    """The path of the imported trace, in the user's cache, written where it is not there yet or has changed."""
    from qllm.traces.step_times.aiconfigurator.known import import_known, tables_version

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TimingWarning)  # whoever reads the file is told
        timings = import_known(gpu, shape, dtype)
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = root / "qllm" / "timings" / f"{defaults.SOURCE}-{tables_version()}"
    path = folder / f"{timings.name}.csv"
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        timings.save(part)
        if path.is_file() and path.read_bytes() == part.read_bytes():
            part.unlink()
        else:
            os.replace(part, path)
    except OSError as error:
        problem = f"{path}: the imported trace cannot be written: {error.strerror or error}"
        raise ValueError(f"{problem}; allowed: XDG_CACHE_HOME, a folder to keep it in") from None
    return str(path)
