"""Finished measurements of a calibration, kept in a file beside its result until all are there."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qllm.executor.calibration.grid import PassKind
from qllm.executor.calibration.stopwatch import HOST, PassTimes
from qllm.executor.errors import CalibrationError

STALLED = 3.0  # times the median: a pass that took longer counts as if it had taken that; the machine stood still


@dataclass(frozen=True)
class Samples:
    """Repeats of one kind of pass."""

    parts: tuple[str, ...]  #: names of the intervals (`qllm.executor.calibration.stopwatch`)
    seconds: np.ndarray  #: of each interval, float64[repeats, intervals]
    routing: np.ndarray  #: rows of each expert, int64[repeats, MoE layers, experts]

    def joined(self, other: Samples) -> Samples:
        """The repeats of both. CalibrationError where they ran in other ways: only some were replayed."""
        if self.parts != other.parts:
            raise CalibrationError("measurements of another kind of passes; remove the file to start anew")
        seconds = np.concatenate([self.seconds, other.seconds])
        return Samples(self.parts, seconds, np.concatenate([self.routing, other.routing]))

    @property
    def replayed(self) -> bool:
        """Whether the passes were replayed, so that the host's part is told apart from the device's."""
        return HOST in self.parts

    @property
    def layers(self) -> list[np.ndarray]:
        """The routing of each MoE layer, int64[repeats, experts]."""
        return list(self.routing.swapaxes(0, 1))

    @property
    def repeats(self) -> int:
        """How many there are."""
        return len(self.seconds)

    def total(self, *names: str) -> float:
        """Seconds of these parts, of all without a name: the sum of `means`."""
        return float(self.means[self._columns(names)].sum())

    def each(self, name: str) -> np.ndarray:
        """Seconds of each interval of that name, float64[intervals]: its `means`."""
        return np.asarray(self.means[self._columns((name,))])

    @property
    def means(self) -> np.ndarray:
        """Mean seconds of each interval, float64[intervals]: requests wait for the mean pass, not the median one."""
        # Each interval's median, scaled so that they add up to the mean pass: a disturbance hits now one, now another.
        medians, passes = np.median(self.seconds, axis=0), self.seconds.sum(axis=1)
        mean = np.minimum(passes, STALLED * np.median(passes)).mean()
        return np.asarray(medians * (mean / medians.sum()))

    def spread(self, *names: str) -> float:
        """Interquartile range (seconds) over the repeats of the sum of these parts."""
        low, high = np.percentile(self.seconds[:, self._columns(names)].sum(axis=1), [25, 75])
        return float(high - low)

    def uncertainty(self) -> float:
        """Half the width of the 95 % interval of the pass's median, relative: 1.96 x 1.2533 x 1.4826 MAD / sqrt(n)."""
        totals = self.seconds.sum(axis=1)
        median = float(np.median(totals))
        deviation = float(np.median(np.abs(totals - median)))
        return 1.96 * 1.2533 * 1.4826 * deviation / median / float(self.repeats**0.5)

    def _columns(self, names: tuple[str, ...]) -> np.ndarray:
        return np.array([not names or part in names for part in self.parts])


class MeasurementStore:
    """The file of finished measurements: a first line that says of what `subject`, then one line each, flushed at once.

    One that an interruption cut short is dropped when the file is read. Raises CalibrationError where the file holds
    measurements of something else.
    """

    def __init__(self, path: Path, subject: dict[str, Any]):
        self.path = path
        self.samples: dict[str, Samples] = {}  #: by `PassKind.key`
        self.numbers: dict[str, float] = {}  #: single results by name
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        whole = lines[:-1]  # what follows the last newline was cut short
        if whole:
            self._check(whole[0], subject)
            for line in whole[1:]:
                self._take(json.loads(line))
            path.write_text("\n".join(whole) + "\n", encoding="utf-8")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"subject": subject}, "w")

    def _check(self, line: str, subject: dict[str, Any]) -> None:
        try:
            found = json.loads(line)["subject"]
        except (ValueError, TypeError, KeyError):
            raise CalibrationError(f"{self.path}, row 1: not a file of measurements; remove it to start anew") from None
        for key in sorted({*subject, *found}):
            if found.get(key) != subject.get(key):
                raise CalibrationError(
                    f"{self.path}: holds measurements with {key} = {found.get(key)}, asked for {subject.get(key)}; "
                    "remove it to start anew, or calibrate as before to go on"
                )

    def add(self, kind: PassKind, passed: PassTimes) -> None:
        """Keep a repeat of `kind`."""
        line: dict[str, Any] = {"kind": kind.key, "parts": [name for name, _ in passed.parts]}
        line |= {"seconds": [round(value, 10) for _, value in passed.parts], "routing": passed.routing}
        self._write(line)
        self._take(line)

    def add_number(self, name: str, value: float) -> None:
        """Keep a single result."""
        self._write({"number": name, "value": value})
        self.numbers[name] = value

    def repeats(self, kind: PassKind) -> int:
        """How often `kind` was measured."""
        found = self.samples.get(kind.key)
        return 0 if found is None else found.repeats

    def _take(self, line: dict[str, Any]) -> None:
        if "number" in line:
            self.numbers[line["number"]] = line["value"]
            return
        one = Samples(tuple(line["parts"]), np.atleast_2d(line["seconds"]), np.array([line["routing"]]))
        known = self.samples.get(line["kind"])
        self.samples[line["kind"]] = one if known is None else known.joined(one)

    def _write(self, line: dict[str, Any], mode: str = "a") -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
