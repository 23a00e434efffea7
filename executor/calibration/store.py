"""Finished measurements of a calibration, kept in a file beside its result until all are there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qllm.executor.calibration.grid import Cell
from qllm.executor.calibration.stopwatch import PassTimes
from qllm.executor.errors import ExecutorError
from qllm.traces.step_times.drift import STALLED, slowness_by_size


class CalibrationError(ExecutorError, ValueError):
    """A calibration that cannot be made or gone on with; the message names the file or option."""


@dataclass(frozen=True)
class Measured:
    """Repeats of a kind of pass, made at different times. parts: names of the intervals
    (`qllm.executor.calibration.stopwatch`); seconds: float64[repeats, intervals]; routing: rows of each expert,
    int64[repeats, MoE layers, experts]."""

    parts: tuple[str, ...]
    seconds: np.ndarray
    routing: np.ndarray

    def and_also(self, other: Measured) -> Measured:
        """With the repeats of both."""
        seconds = np.concatenate([self.seconds, other.seconds])
        return Measured(self.parts, seconds, np.concatenate([self.routing, other.routing]))

    @property
    def layers(self) -> list[np.ndarray]:
        """The routing of each MoE layer, int64[repeats, experts]."""
        return list(self.routing.swapaxes(0, 1))

    @property
    def repeats(self) -> int:
        return len(self.seconds)

    def total(self, *names: str) -> float:
        """Seconds of these parts, all where none is named: the sum of `means`."""
        return float(self.means[self._columns(names)].sum())

    def each(self, name: str) -> np.ndarray:
        """Seconds of each interval of that name, float64[intervals]: its `means`."""
        return self.means[self._columns((name,))]

    @property
    def means(self) -> np.ndarray:
        """Mean seconds of each interval, float64[intervals]: what waits behind passes waits for their mean, not for
        their median. A pass that took more than STALLED times the median counts as if it had taken that. Of an
        interval the median is taken, scaled so that their sum is the pass: what disturbs passes hits now one, now
        another."""
        medians, passes = np.median(self.seconds, axis=0), self.seconds.sum(axis=1)
        mean = np.minimum(passes, STALLED * np.median(passes)).mean()
        return medians * (mean / medians.sum())

    def spread(self, *names: str) -> float:
        """Interquartile range (seconds) over the repeats of the sum of these parts."""
        low, high = np.percentile(self.seconds[:, self._columns(names)].sum(axis=1), [25, 75])
        return float(high - low)

    def uncertainty(self) -> float:
        """Half the width of the 95 % interval of the pass's median, relative: 1.96 x 1.2533 x 1.4826 MAD / sqrt(n)."""
        totals = self.seconds.sum(axis=1)
        median = float(np.median(totals))
        return 1.96 * 1.2533 * 1.4826 * float(np.median(np.abs(totals - median))) / median / self.repeats**0.5

    def _columns(self, names: tuple[str, ...]) -> np.ndarray:
        return np.array([not names or part in names for part in self.parts])


class Kept:
    """The file of finished measurements: a first line that says what they are of, then one line each.

    A line is written at once and flushed to the disk; one that was cut short by an interruption is dropped when the
    file is read. Raises CalibrationError where the file is of something else.
    """

    def __init__(self, path: Path, of: dict[str, Any]):
        self.path = path
        self.cells: dict[str, Measured] = {}
        self.order: list[tuple[str, float]] = []  #: key of the cell of each repeat, and when it was made
        self.numbers: dict[str, float] = {}
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        whole = lines[:-1]  # what follows the last newline was cut short
        if whole:
            self._check(whole[0], of)
            for line in whole[1:]:
                self._take(json.loads(line))
            path.write_text("\n".join(whole) + "\n", encoding="utf-8")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"of": of}, "w")

    def _check(self, line: str, of: dict[str, Any]) -> None:
        try:
            found = json.loads(line)["of"]
        except (ValueError, TypeError, KeyError):
            raise CalibrationError(f"{self.path}, row 1: not a file of measurements; remove it to start anew") from None
        for key in sorted({*of, *found}):
            if found.get(key) != of.get(key):
                raise CalibrationError(
                    f"{self.path}: holds measurements with {key} = {found.get(key)}, asked for {of.get(key)}; remove "
                    "it to start anew, or calibrate as before to go on"
                )

    def add(self, cell: Cell, passed: PassTimes, at: float) -> None:
        """Keep a repeat of `cell`, made at `at` (seconds since the epoch)."""
        seconds = [round(value, 10) for _, value in passed.parts]
        line: dict[str, Any] = {"cell": cell.key, "parts": [name for name, _ in passed.parts], "seconds": seconds}
        line |= {"routing": passed.routing, "at": round(at, 3)}
        self._write(line)
        self._take(line)

    def repeats(self, cell: Cell) -> int:
        """How often `cell` was measured."""
        found = self.cells.get(cell.key)
        return 0 if found is None else found.repeats

    def steady(self, grid: Sequence[Cell], bound: int) -> tuple[dict[Cell, Measured], float]:
        """The measurements of `grid` as if the machine had had its average speed all the time, for itself for passes of
        up to `bound` tokens and for larger ones (`qllm.traces.step_times.drift`); and the speed's standard deviation,
        relative."""
        cells = {cell.key: cell for cell in grid}
        rows = {key: iter(self.cells[key].seconds) for key in cells}
        visits = [(key, at, next(rows[key]).sum()) for key, at in self.order if key in rows]
        keys = np.array([key for key, _, _ in visits])
        at, seconds = (np.array([visit[column] for visit in visits]) for column in (1, 2))
        small = np.array([cells[key].tokens <= bound for key, _, _ in visits], dtype=bool)
        slow = slowness_by_size(at, keys.tolist(), seconds, small)
        found = {}
        for key, cell in cells.items():
            one = self.cells[key]
            found[cell] = replace(one, seconds=one.seconds / slow[keys == key, None])
        return found, float(slow.std())

    def number(self, name: str, value: float) -> None:
        """Keep a single result."""
        self._write({"number": name, "value": value})
        self.numbers[name] = value

    def _take(self, line: dict[str, Any]) -> None:
        if "number" in line:
            self.numbers[line["number"]] = line["value"]
            return
        key = line["cell"]
        visit = Measured(tuple(line["parts"]), np.atleast_2d(line["seconds"]), np.array([line["routing"]]))
        self.cells[key] = self.cells[key].and_also(visit) if key in self.cells else visit
        self.order.append((key, line["at"]))

    def _write(self, line: dict[str, Any], mode: str = "a") -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
