"""The file of a timing trace: `# key: value` header lines (YAML), then a CSV table of points. docs/timing_traces.md."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from qllm.traces.comment_header import HeaderError, read_header, render_header

FORMAT = "qllm-timings 1"
GRIDS = ("attention_prefill", "attention_decode")
STEPS = ("dense_pre", "attention_prefill", "attention_decode", "dense_post", "expert", "head")
OPTIONAL = ("launch", "after_prefill")  # steps that a trace may leave out
ALL_STEPS = (*STEPS, *OPTIONAL)
SOURCES = ("measured", "imported", "modelled")
EXPERT_MODES = ("fused", "separate")
MOST_EXPERTS = 1 << 24  # in all layers together: a simulation counts the tokens of each
MOST_TOKENS = 1 << 40
COLUMNS = ("step", "tokens", "context", "seconds", "spread_s", "repeats", "source")


class TimingError(ValueError):
    """A timing trace that cannot be used; the message names file, row or key, and what is allowed."""


class TimingWarning(UserWarning):
    """A timing trace that can be used and is not plausible; the message names the step and says why."""


class Point(NamedTuple):
    """One measured point. `context` is None for the steps without one; `source` says where this very number is from."""

    step: str
    tokens: int
    context: int | None
    seconds: float
    spread_s: float | None = None
    repeats: int | None = None
    source: str = "measured"


@dataclass(frozen=True, kw_only=True)
class TimingHeader:
    """What a timing trace says of itself. Times in seconds, sizes in bytes, bandwidth in bytes per second."""

    name: str
    source: str
    device: str
    model: str
    dtype: str
    framework: str
    date: str
    licence: str
    provenance: str
    layers: int
    hidden: int
    experts: int
    top_k: int
    expert_mode: str
    experts_base_s: float
    launch_s: float
    launches_per_expert: int
    host_s: float
    suspend_s: float
    resume_s: float
    kv_bytes_per_token: int
    weights_bytes: int
    memory_bytes: int
    host_bandwidth: float
    query_block_s: float | None = None  # each block of a cut attention; untold, it is `launch_s`
    sequence_bytes: int = 0  # what a sequence keeps, however long it is: sliding windows, recurrent states
    wake_s: float = 0.0  # what a pass takes longer after the device stood idle
    engine_loop_s: float | None = None  # the part of `host_s` that is the engine's loop, beyond a pass itself
    engine_between_s: float | None = None  # the part of `engine_loop_s` that lies between two passes
    max_context: int | None = None  # tokens that a sequence of the model may have
    least_s: dict[str, list[float]] = field(default_factory=dict)  # roofline.py: seconds that a step takes at least
    repeats: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)
    modelled: dict[str, str] = field(default_factory=dict)


_KINDS = {f.name: str(f.type) for f in fields(TimingHeader)}
_REQUIRED = tuple(f.name for f in fields(TimingHeader) if f.default is MISSING and f.default_factory is MISSING)
_CHOICES = {"source": SOURCES, "expert_mode": EXPERT_MODES}
_MAY_BE_ZERO = (
    "experts_base_s",
    "launch_s",
    "launches_per_expert",
    "host_s",
    "suspend_s",
    "resume_s",
    "query_block_s",
    "wake_s",
    "sequence_bytes",
    "engine_loop_s",
    "engine_between_s",
)


def check_header(header: dict[str, Any], where: str) -> dict[str, Any]:
    """The header with numbers as their own types. TimingError for a missing, unknown or impossible key."""
    unknown = sorted(set(header) - set(_KINDS), key=str)
    if unknown:
        told = f"unknown header key {unknown[0]!r:.40}; allowed: {', '.join(_REQUIRED)}"
        raise TimingError(f"{where}: {told}, and those of docs/timing_traces.md")
    checked: dict[str, Any] = {}
    for key in _KINDS:
        if key not in header or header[key] is None:
            if key in _REQUIRED:
                raise TimingError(f"{where}: header key {key!r} is missing")
            continue
        checked[key] = _checked_value(key, header[key], where)
    _check_together(checked, where)
    return checked


def _check_together(header: dict[str, Any], where: str) -> None:
    """TimingError for keys that exclude each other."""
    for key, most in (("top_k", "experts"), ("engine_loop_s", "host_s")):
        if key in header and most in header and header[key] > header[most]:
            raise TimingError(
                f"{where}: header key {key!r} must be at most {most} ({header[most]:g}), got {header[key]:g}"
            )
    if header["layers"] * header["experts"] > MOST_EXPERTS:
        raise TimingError(f"{where}: header keys 'layers' x 'experts' must be at most {MOST_EXPERTS}")
    for step, least in header.get("least_s", {}).items():
        values = least if isinstance(least, list) else []
        numbers = [type(value) in (int, float) and 0 <= value < math.inf for value in values]
        if step not in STEPS or len(numbers) != 2 or not all(numbers):
            raise TimingError(
                f"{where}: header key 'least_s' must give two numbers of at least 0 for each of {', '.join(STEPS)}, "
                f"got {step!s:.40}: {least!r:.80}"
            )


def _checked_value(key: str, value: Any, where: str) -> Any:
    kind = _KINDS[key]
    if key in _CHOICES and value not in _CHOICES[key]:
        raise TimingError(f"{where}: header key {key!r} is {value!r:.80}; allowed: {', '.join(_CHOICES[key])}")
    if kind.startswith("dict"):
        if not isinstance(value, dict):
            raise TimingError(f"{where}: header key {key!r} must be a mapping, got {value!r:.80}")
        return {str(name): entry.item() if hasattr(entry, "item") else entry for name, entry in value.items()}
    if kind == "str":
        if isinstance(value, dict | list):
            raise TimingError(f"{where}: header key {key!r} must be a text, got {value!r:.80}")
        return str(value)
    whole = kind.startswith("int")
    try:
        number = float(value)
        if isinstance(value, bool | str) or not math.isfinite(number) or (whole and number != int(number)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        allowed = "a whole number" if whole else "a number"
        raise TimingError(f"{where}: header key {key!r} must be {allowed}, got {value!r:.80}") from None
    if number < 0 or (number == 0 and key not in _MAY_BE_ZERO):
        bound = "at least 0" if key in _MAY_BE_ZERO else "above 0"
        raise TimingError(f"{where}: header key {key!r} must be {bound}, got {value!r:.80}")
    if whole and number >= 1 << 63:
        raise TimingError(f"{where}: header key {key!r} must be below 2**63, got {value!r:.80}")
    return int(value) if whole and isinstance(value, int) else int(number) if whole else number


def check_points(points: list[Point], rows: list[str]) -> None:
    """TimingError with the row (`rows`: "FILE, row 12") unless points are possible, steps complete, 2-D grids full."""
    where = rows[0].rsplit(", row", 1)[0] if rows else "timings"
    seen: dict[tuple[str, int, int | None], str] = {}
    for point, row in zip(points, rows, strict=True):
        _check_point(point, row)
        key = point[:3]
        if key in seen:
            raise TimingError(f"{row}: {point.step} at tokens {point.tokens}, context {point.context} stands twice")
        seen[key] = row
    for step in ALL_STEPS:
        mine = [point for point in points if point.step == step]
        if len(mine) < 2 and (mine or step in STEPS):
            raise TimingError(f"{where}: step {step!r} has {len(mine)} points; at least 2 are needed")
        if step in GRIDS:
            _check_rectangle(step, mine, seen, where)


def _check_point(point: Point, row: str) -> None:
    if point.step not in ALL_STEPS:
        raise TimingError(f"{row}: unknown step {point.step!r:.80}; allowed: {', '.join(ALL_STEPS)}")
    if not 1 <= point.tokens <= MOST_TOKENS:
        bound = "at least 1" if point.tokens < 1 else f"at most {MOST_TOKENS}"
        raise TimingError(f"{row}: tokens must be {bound}, got {point.tokens}")
    if (point.context is None) == (point.step in GRIDS):
        need = "needs a context" if point.context is None else "takes no context"
        raise TimingError(f"{row}: step {point.step!r} {need}")
    if point.context is not None and not 0 <= point.context <= MOST_TOKENS:
        bound = "at least 0" if point.context < 0 else f"at most {MOST_TOKENS}"
        raise TimingError(f"{row}: context must be {bound}, got {point.context}")
    if not math.isfinite(point.seconds) or point.seconds < 0:
        raise TimingError(f"{row}: seconds must be a number of at least 0, got {point.seconds}")
    if point.spread_s is not None and not (math.isfinite(point.spread_s) and point.spread_s >= 0):
        raise TimingError(f"{row}: spread_s must be empty or at least 0, got {point.spread_s}")
    if point.repeats is not None and point.repeats < 1:
        raise TimingError(f"{row}: repeats must be empty or at least 1, got {point.repeats}")
    if point.source not in SOURCES:
        raise TimingError(f"{row}: unknown source {point.source!r:.80}; allowed: {', '.join(SOURCES)}")


def _check_rectangle(step: str, points: list[Point], seen: dict[tuple[str, int, int | None], str], where: str) -> None:
    contexts = sorted({point.context for point in points if point.context is not None})
    for tokens in sorted({point.tokens for point in points}):
        for context in contexts:
            if (step, tokens, context) not in seen:
                near = next(seen[p[:3]] for p in points if p.tokens == tokens)
                raise TimingError(
                    f"{where}: the grid of {step!r} has a hole: no row for tokens {tokens}, context {context} "
                    f"(other rows of tokens {tokens} start at {near.rsplit(', ', 1)[-1]})"
                )


def parse(text: str, where: str) -> tuple[dict[str, Any], list[Point]]:
    """Header and points of a file's text. TimingError with file and row for anything wrong."""
    lines = text.splitlines()
    try:
        told, head = read_header(lines)
    except HeaderError as error:
        raise TimingError(f"{where}{f', row {error.row}' if error.row else ''}: {error}") from None
    header, count = _checked_header(told, where)
    if head >= len(lines):
        raise TimingError(f"{where}: truncated: no table after the header")
    if tuple(lines[head].split(",")) != COLUMNS:
        raise TimingError(f"{where}, row {head + 1}: the columns must be {','.join(COLUMNS)}, got {lines[head]!r:.80}")
    points, rows = [], []
    try:
        table = list(csv.reader(lines[head + 1 :]))
    except csv.Error as error:
        raise TimingError(f"{where}: the table is no CSV: {error}") from None
    for number, cells in enumerate(table, start=head + 2):
        row = f"{where}, row {number}"
        if len(cells) != len(COLUMNS):
            raise TimingError(
                f"{row}: {len(cells)} fields where {len(COLUMNS)} are needed (truncated?): {','.join(cells)!r:.80}"
            )
        points.append(_parse_point(cells, row))
        rows.append(row)
    if len(points) != count:
        raise TimingError(
            f"{where}: truncated or edited: the header announces {count} points, the table has {len(points)}"
        )
    if not points:
        raise TimingError(f"{where}: truncated: no row below the columns")
    check_points(points, rows)
    return header, points


def _checked_header(header: dict[str, Any], where: str) -> tuple[dict[str, Any], int]:
    """The header as `check_header` gives it, and the number of points that it announces."""
    if not header:
        raise TimingError(
            f"{where}: no header; a timing trace starts with '# format: {FORMAT}' and '# key: value' lines"
        )
    found = header.pop("format", None)
    if found != FORMAT:
        raise TimingError(f"{where}: header key 'format' is {found!r:.80}; allowed: {FORMAT!r}")
    count = header.pop("points", None)
    if not isinstance(count, int) or isinstance(count, bool):
        raise TimingError(
            f"{where}: header key 'points' (the number of rows) is missing or no whole number: {count!r:.80}"
        )
    return check_header(header, where), count


def _parse_point(cells: list[str], row: str) -> Point:
    step, tokens, context, seconds, spread, repeats, source = (cell.strip() for cell in cells)
    return Point(
        step,
        _number(tokens, "tokens", row, int),
        None if context == "" else _number(context, "context", row, int),
        _number(seconds, "seconds", row, float),
        None if spread == "" else _number(spread, "spread_s", row, float),
        None if repeats == "" else _number(repeats, "repeats", row, int),
        source,
    )


def _number(text: str, column: str, row: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise TimingError(
            f"{row}: {column} must be {what}, got {text!r:.80}" + (" (missing)" if not text else "")
        ) from None


def render(header: TimingHeader, points: list[Point]) -> str:
    """The file's text: header in the order of TimingHeader, points in the order of the steps, then by size."""
    shown = {"format": FORMAT, **{f.name: getattr(header, f.name) for f in fields(TimingHeader)}, "points": len(points)}
    shown = {key: value for key, value in shown.items() if value is not None and value != {}}
    out = io.StringIO()
    out.write(render_header(shown))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for point in sorted(points, key=lambda p: (ALL_STEPS.index(p.step), p.tokens, p.context or 0)):
        cells = ("" if cell is None else cell for cell in point[:3])
        spread = "" if point.spread_s is None else f"{point.spread_s:.6g}"
        repeats = "" if point.repeats is None else point.repeats
        writer.writerow([*cells, f"{point.seconds:.6g}", spread, repeats, point.source])
    return out.getvalue()


def read(path: Path) -> tuple[dict[str, Any], list[Point]]:
    """Header and points of the file at `path`. TimingError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TimingError(f"{path}: cannot be read as a timing trace: {error}") from None
    return parse(text, str(path))
