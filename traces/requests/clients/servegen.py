"""Read the clients of ServeGen (github.com/alibaba/ServeGen), each from two files of one folder.

    chunk-0-trace.csv     a row a window, without a header: begin (s), requests per second, coefficient of variation of
                          the gaps, Gamma or Weibull, its shape and scale. No name: nobody comes. Windows of all clients
                          are the same
    chunk-0-dataset.json  {begin of a window (s): {"input_tokens": "{45: 0.25, 46: 0.75}", "output_tokens": ...}}: how
                          often each count occurs, as text. These windows are longer; one goes on until the next begins

The scale follows from the rate, and the coefficient of variation from the shape: they are checked and not used.
"""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from qllm.traces.files import file_stamp
from qllm.traces.messages import clipped
from qllm.traces.requests._columns import text_lines
from qllm.traces.requests.clients.pool import ClientPool, Distribution
from qllm.traces.requests.clients.settings import Servegen
from qllm.traces.requests.trace import TraceError

FIELDS = ("input_tokens", "output_tokens")
LAST_S = 600.0  # how long the only window of a file lasts: as ServeGen's do
SHAPES = {"Gamma": (1e-4, 1e6), "Weibull": (1e-2, 1e3)}  # what float64 draws well

_NUMBER = re.compile(r"chunk-(\d+)-trace\.csv")
_PAIR = r"\d+: \d[\d.e+-]*"
_COUNTS = re.compile(rf"\{{(?:{_PAIR}(?:, {_PAIR})*)?\}}")


def servegen_pool(settings: Servegen, *, lengths: bool) -> ClientPool:
    """The clients of a folder, in the part of its time that is asked for.

    Args:
        settings: Which folder, which of its clients and which time.
        lengths: Whether their lengths are read too: many clients have large files.

    Raises:
        TraceError: A file is not as above, or there is no request; the message names file and row.
    """
    folder = Path(settings.folder)
    found = {int(match[1]): path for path in folder.iterdir() if (match := _NUMBER.fullmatch(path.name))}
    if not found:
        raise TraceError(f"folder: {folder} holds no chunk-0-trace.csv, chunk-1-trace.csv, ...: no clients of ServeGen")
    traces = tuple(found[number] for number in sorted(found))
    files = [*traces, *map(_dataset_of, traces)] if lengths else traces
    return _read(traces, settings, lengths, tuple(map(file_stamp, files)))


# A sweep draws from one folder many times over; a changed file has another stamp.
@lru_cache(maxsize=2)
def _read(traces: tuple[Path, ...], settings: Servegen, lengths: bool, _: object) -> ClientPool:
    begins, first = _windows(traces[0])
    rows = np.stack([first, *(_same_windows(path, traces[0], begins) for path in traces[1:])])
    ends = np.append(begins[1:], begins[-1] + (begins[-1] - begins[-2] if len(begins) > 1 else LAST_S))
    stop = ends[-1] if settings.end_s is None else min(settings.end_s, ends[-1])
    inside = np.minimum(ends, stop) - np.maximum(begins, settings.begin_s)
    kept = np.flatnonzero(inside > 0)
    if not len(kept):
        raise TraceError(f"begin_s: {settings.begin_s:g} lies behind the last window; allowed: below {ends[-1]:g}")
    seconds, begins = inside[kept], begins[kept]
    rates, gamma, shapes = rows[:, kept].transpose(2, 0, 1)
    sent = rates @ seconds
    busy = np.argsort(-sent, kind="stable")[: settings.busiest]
    busy = np.sort(busy[sent[busy] > 0])
    if not len(busy):
        raise TraceError(f"folder: {traces[0].parent}: no client sends a request within this time")
    known = None
    if lengths:
        known = tuple(_lengths(_dataset_of(traces[c]), begins, rates[c] > 0) for c in busy.tolist())
    names = tuple(traces[c].name.removesuffix("-trace.csv") for c in busy.tolist())
    return ClientPool(names, seconds, rates[busy], gamma[busy] > 0, shapes[busy], known)


def _dataset_of(trace: Path) -> Path:
    return trace.with_name(trace.name.replace("-trace.csv", "-dataset.json"))


def _windows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where the windows begin, float64[w]; their rates, whether gaps are Gamma, and the shapes, float64[w, 3]."""
    begins: list[float] = []
    rows: list[tuple[float, float, float]] = []
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        cells = line.strip().split(",")
        try:
            begin, rate, cv = map(float, cells[:3])
            shape, scale = map(float, cells[4:])
        except ValueError:
            raise TraceError(
                f"{where}: {clipped(line.strip())!r} must be begin (s), rate, cv, Gamma or Weibull or nothing, shape, "
                "scale"
            ) from None
        if not (0 <= begin < math.inf and 0 <= rate < math.inf and 0 <= cv < math.inf and 0 <= scale < math.inf):
            raise TraceError(f"{where}: begin, rate, cv and scale must be finite and >= 0")
        if begins and begin <= begins[-1]:
            raise TraceError(f"{where}: begins at {begin:g} s, must begin after the row before ({begins[-1]:g} s)")
        name = cells[3]
        if name and name not in SHAPES:
            raise TraceError(f"{where}: {clipped(name)!r} is unknown; allowed: {', '.join(SHAPES)}, or nothing")
        if not name:
            rate, shape = 0.0, 1.0
        elif rate and not SHAPES[name][0] <= shape <= SHAPES[name][1]:
            low, high = SHAPES[name]
            raise TraceError(f"{where}: shape is {shape:g}; of {name} must be from {low:g} to {high:g}")
        begins.append(begin)
        rows.append((rate, float(name == "Gamma"), shape))
    if not rows:
        raise TraceError(f"{path}: holds no window")
    return np.array(begins), np.array(rows)


def _same_windows(path: Path, other: Path, begins: np.ndarray) -> np.ndarray:
    """The rows of a file whose windows must be those of another one."""
    mine, rows = _windows(path)
    if len(mine) != len(begins):
        raise TraceError(f"{path}: has {len(mine)} windows, must have {len(begins)} as {other.name} has")
    if not np.array_equal(mine, begins):
        i = int(np.argmax(mine != begins))
        raise TraceError(f"{path}: window {i + 1} begins at {mine[i]:g} s, must at {begins[i]:g} s as in {other.name}")
    return rows


def _lengths(path: Path, begins: np.ndarray, busy: np.ndarray) -> tuple[tuple[Distribution, Distribution] | None, ...]:
    """Prompt and output tokens in each window with requests: of the latest entry that began before, or the first."""
    try:
        text = "".join(text_lines(path))
        entries = json.loads(text)
        known = {int(key): entry for key, entry in entries.items()}
    except TraceError:
        raise
    except (ValueError, AttributeError, RecursionError):
        lfs = text.startswith("version https://git-lfs")
        hint = (
            "is a pointer of Git LFS: run git lfs pull" if lfs else "must be a JSON object: begin of a window -> fields"
        )
        raise TraceError(f"{path}: {hint}") from None
    known = {begin: entry for begin, entry in known.items() if not _empty(entry)}  # a window without requests
    if not known:
        raise TraceError(f"{path}: holds no lengths")
    keys = np.sort(list(known))
    at = keys[np.maximum(np.searchsorted(keys, begins, side="right") - 1, 0)]
    read: dict[int, tuple[Distribution, Distribution]] = {}
    for key in np.unique(at[busy]).tolist():
        prompt, output = (_distribution(f"{path}, {key!r}: {field}", known[key], field) for field in FIELDS)
        read[key] = prompt, output
    return tuple(read[key] if needed else None for key, needed in zip(at.tolist(), busy.tolist(), strict=True))


def _empty(entry: Any) -> bool:
    return isinstance(entry, dict) and any(entry.get(field) == "{}" for field in FIELDS)


def _distribution(where: str, entry: Any, field: str) -> Distribution:
    text = entry.get(field) if isinstance(entry, dict) else None
    if text is None:
        raise TraceError(
            f"{where} is missing; allowed: clients of language or reasoning models, or lengths given by the classes"
        )
    if not isinstance(text, str) or not _COUNTS.fullmatch(text):
        raise TraceError(f"{where} is {clipped(str(text))!r}, must be text such as '{{45: 0.25, 46: 0.75}}'")
    try:
        pairs = np.array(text[1:-1].replace(":", ",").split(","), dtype=np.float64).reshape(-1, 2)
    except ValueError:
        raise TraceError(f"{where} must hold a count and its share in each pair") from None
    counts, shares = pairs.T
    total = shares.sum()
    if not (0.999 <= total <= 1.001 and (shares >= 0).all() and counts.max() < 1 << 53):
        raise TraceError(f"{where}: shares must be >= 0 and add up to 1 (they do to {total:g}), counts be < 2**53")
    return Distribution(np.maximum(counts, 1).astype(np.int64), np.cumsum(shares) / total)
