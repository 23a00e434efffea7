"""Timing traces: a header and points, the seconds of each step of a pass on one GPU. Format: docs/timing_traces.md."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qllm.traces.step_times.file_format import (
    OPTIONAL,
    STEPS,
    Point,
    TimingError,
    TimingHeader,
    TimingWarning,
    check_header,
    check_points,
    read,
    render,
)
from qllm.traces.step_times.interpolate import Curve, ExtrapolationWarning, Grid
from qllm.traces.step_times.model_shapes import SHAPES
from qllm.traces.step_times.roofline import implausible, times_least

__all__ = ["ExtrapolationWarning", "Point", "TimingError", "TimingWarning", "Timings", "bundled_timings"]

_FOLDER = Path(__file__).parents[1] / "data" / "timings"


def bundled_timings() -> list[str]:
    """Names of the timing traces that ship with the package; each can be given to `Timings.load`."""
    return sorted(path.stem for path in _FOLDER.glob("*.csv"))


@dataclass(frozen=True, kw_only=True)
class Timings(TimingHeader):
    """One timing trace: its header's keys as attributes, and what gives seconds for ONE layer (head: one pass).

    Steps are called as methods. They take numbers or numpy arrays, never fall when an argument grows, and give 0.0 for
    no tokens. Outside the measured range (`range`) the last segment goes on, with one ExtrapolationWarning per step.
    Launches and the host (`launch_s`, `host_s`) are not included, but with `expert_mode` "separate" `expert` has its
    kernels' launches.

    A whole MoE layer whose experts got m_0, m_1, ... tokens takes `experts_base_s + sum_e expert(m_e)` seconds.
    """

    points: tuple[Point, ...] = field(repr=False)

    def __post_init__(self) -> None:
        where = f"timings {self.name!r}"
        checked = check_header({f.name: getattr(self, f.name) for f in fields(TimingHeader)}, where)
        for key, value in checked.items():
            object.__setattr__(self, key, value)
        check_points(list(self.points), [f"{where}, row {i}" for i in range(1, len(self.points) + 1)])

    @classmethod
    def load(cls, path: str | Path) -> Timings:
        """Read a timing trace; a TimingWarning for each step that its GPU cannot be so fast or so slow at.

        Args:
            path: The file, or the name of a bundled trace.

        Raises:
            TimingError: There is no such file or name, or the file is broken; the message names the row or the key.
        """
        name = str(path)
        if name in bundled_timings():
            path = _FOLDER / f"{name}.csv"
        elif not Path(path).is_file():
            names = bundled_timings()
            close = ", ".join(get_close_matches(name, names) or names[:3])
            raise TimingError(
                f"{name:.200}: no such file, and no bundled timing trace; bundled: {close}, {len(names)} in all "
                "(qllm timings list)"
            )
        header, points = read(Path(path))
        timings = cls(points=tuple(points), **header)
        for line in timings.implausible():
            warnings.warn(f"timings {timings.name!r}: {line}", TimingWarning, stacklevel=2)
        return timings

    def implausible(self) -> list[str]:
        """What is not plausible, a line each: steps against the GPU's roofline, sizes against its memory, units."""
        return implausible(self, self.points)

    def save(self, path: str | Path) -> None:
        """Write the file; `load` gives an equal timing trace (seconds are kept to six digits)."""
        Path(path).write_text(render(self, list(self.points)), encoding="utf-8")

    # Built at the first call: a file loads in milliseconds, and most callers use all of them, some only one.
    @cached_property
    def dense_pre(self) -> Curve:
        """Norm and QKV projection by tokens, up to the attention: seconds a layer."""
        return self._curve("dense_pre")

    @cached_property
    def dense_post(self) -> Curve:
        """Output projection, norm and router (and shared experts) by tokens: seconds a layer."""
        return self._curve("dense_post")

    @cached_property
    def expert(self) -> Curve:
        """f(m), what one expert with m tokens adds to its MoE layer: seconds; f(0) = 0."""
        return self._curve("expert")

    @cached_property
    def head(self) -> Curve:
        """Final norm, LM head and sampling by the sequences that get a token: seconds a pass."""
        return self._curve("head")

    @cached_property
    def attention_prefill(self) -> Grid:
        """Attention of one sequence by its new tokens and the tokens already cached: seconds a layer."""
        return self._grid("attention_prefill")

    @cached_property
    def attention_decode(self) -> Grid:
        """One new token each, by the sequences and the tokens that they have cached on average: seconds a layer."""
        return self._grid("attention_decode")

    @cached_property
    def _launch(self) -> Curve | None:
        return self._curve("launch", rises=False) if "launch" in self.steps else None

    @cached_property
    def _after_prefill(self) -> Curve | None:
        return self._curve("after_prefill") if "after_prefill" in self.steps else None

    def launch(self, tokens: Any) -> Any:
        """Seconds of one launch more in a pass: by the curve (may fall; flat beyond its end), else `launch_s`."""
        if self._launch is None:
            return self.launch_s
        return self._launch(min(max(tokens, self._launch.lo), self._launch.hi))

    def after_prefill(self, batch: Any) -> Any:
        """Seconds a pass of `batch` decodes takes longer right after prompts; 0 where the trace does not say."""
        return 0.0 if self._after_prefill is None else self._after_prefill(batch)

    @property
    def context_limit(self) -> int | None:
        """Tokens that a sequence of the model may have, by the header or the known shape of that name; else None."""
        known = SHAPES.get(self.model)
        return self.max_context or (known.max_context or None if known else None)

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps that it has points of."""
        return (*STEPS, *(step for step in OPTIONAL if any(point.step == step for point in self.points)))

    def check_matches(self, **used: Any) -> None:
        """TimingError, naming each key that differs, unless the trace is of this model and device.

        `used`: any of device, model, dtype, layers, hidden, experts, top_k.
        """
        differing = [(key, getattr(self, key), value) for key, value in used.items() if getattr(self, key) != value]
        if differing:
            told = "; ".join(f"{key} is {mine!r}, used with {value!r}" for key, mine, value in differing)
            raise TimingError(f"timings {self.name!r} are of another model or device: {told}")

    def expert_table(self, limit: int) -> np.ndarray:
        """f(m) for m = 0..limit as float64[limit + 1], for callers that index it themselves."""
        return self.expert.table(limit)

    def range(self, step: str) -> tuple[Any, Any]:
        """(lowest, highest) size measured for a step: tokens, or (tokens, context) for attention. TimingError."""
        if step not in self.steps:
            raise TimingError(f"timings {self.name!r}: unknown step {step!r}; allowed: {', '.join(self.steps)}")
        shape = self._shape(step)
        return shape.lo, shape.hi

    def describe(self) -> dict[str, Any]:
        """Describe the trace.

        Returns:
            The header; `implausible`: lines, as `implausible()`; `steps`: for each its range, points by source, the
            largest change by the monotone clean-up, and the lowest and highest time over that of the GPU's roofline.
        """
        steps, times = {}, times_least(self, self.points)
        for step in self.steps:
            mine = [point for point in self.points if point.step == step]
            low, high = self.range(step)
            sources = sorted({point.source for point in mine})
            steps[step] = {
                "lowest": low,
                "highest": high,
                "points": {source: sum(point.source == source for point in mine) for source in sources},
                "cleaned_max": self._cleaned(mine),
                "times_least": times.get(step),
            }
        header = {f.name: getattr(self, f.name) for f in fields(TimingHeader)}
        return {**header, "implausible": self.implausible(), "steps": steps}

    def _cleaned(self, points: list[Point]) -> float:
        """The largest relative difference between a point and the monotone curve through its step."""
        change = 0.0
        for point in points:
            at = (point.tokens,) if point.context is None else (point.tokens, point.context)
            value = self._shape(point.step)(*at)
            change = max(change, abs(value - point.seconds) / point.seconds if point.seconds else 0.0)
        return change

    def _shape(self, step: str) -> Curve | Grid:
        found: Curve | Grid = getattr(self, f"_{step}" if step in OPTIONAL else step)
        return found

    def _curve(self, step: str, rises: bool = True) -> Curve:
        mine = sorted((point.tokens, point.seconds) for point in self.points if point.step == step)
        return Curve(step, [tokens for tokens, _ in mine], [seconds for _, seconds in mine], rises)

    def _grid(self, step: str) -> Grid:
        mine = {(p.tokens, p.context): p.seconds for p in self.points if p.step == step and p.context is not None}
        xs, ys = sorted({x for x, _ in mine}), sorted({y for _, y in mine})
        return Grid(step, xs, ys, np.array([[mine[x, y] for y in ys] for x in xs]))
