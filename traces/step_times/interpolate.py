"""Monotone interpolation of measured step times, in one dimension and on rectangular grids.

Times cannot fall when work grows, but measurements are noisy: take the closest non-decreasing fit (isotonic regression,
pool adjacent violators), then straight lines. Beyond the range the last segment goes on, below it the first value
holds; both warn, once.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_MAX_TABLE = 1 << 18  # tokens held in a table, 2 MB; curves measured further than this are interpolated point by point


class ExtrapolationWarning(UserWarning):
    """A step time was asked for outside the measured range; the message names step and range."""


def isotonic(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The non-decreasing sequence closest to `values` in least squares (pool adjacent violators), float64[n]."""
    means: list[float] = []
    sizes: list[int] = []
    for value in np.asarray(values, dtype=float).tolist():
        mean, size = value, 1
        while means and means[-1] > mean:
            previous, count = means.pop(), sizes.pop()
            mean, size = (previous * count + mean * size) / (count + size), count + size
        means.append(mean)
        sizes.append(size)
    return np.repeat(means, sizes)


def isotonic_grid(values: np.ndarray, sweeps: int = 20) -> np.ndarray:
    """`values` made non-decreasing along both axes, float64[x, y]: pooled in turn, a running maximum after `sweeps`."""
    grid = np.array(values, dtype=float)
    for _ in range(sweeps):
        if (np.diff(grid, axis=0) >= 0).all() and (np.diff(grid, axis=1) >= 0).all():
            return grid
        grid = np.apply_along_axis(isotonic, 0, grid)
        grid = np.apply_along_axis(isotonic, 1, grid)
    return np.maximum.accumulate(np.maximum.accumulate(grid, axis=0), axis=1)


def _line(xs: np.ndarray, ys: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Piecewise-linear through (xs, ys): flat below xs[0], the last segment's slope above xs[-1]."""
    line: np.ndarray = np.interp(x, xs, ys)
    if len(xs) > 1:
        slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
        line = line + slope * np.maximum(x - xs[-1], 0.0)
    return line


def by_tokens(tokens: np.ndarray, seconds: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Seconds of `x` tokens (any shape), which are `seconds` at the increasing sizes `tokens`; nothing for none."""
    return np.where(x > 0, _line(tokens, seconds, x), 0.0)


class Curve:
    """Seconds by tokens or rows (integers are cached): 0 at 0, non-decreasing unless it need not rise."""

    def __init__(self, step: str, tokens: Sequence[int], seconds: Sequence[float], rises: bool = True) -> None:
        self.step = step
        self.xs = np.asarray(tokens, dtype=float)
        self.ys = isotonic(seconds) if rises else np.asarray(seconds, dtype=float)
        self.lo, self.hi = int(tokens[0]), int(tokens[-1])
        self.array_table = self._evaluate(np.arange(min(self.hi, _MAX_TABLE) + 1, dtype=float))
        self._table: list[float] = self.array_table.tolist()
        # Between 0 and the smallest measured size nothing is known, so the look-up is left to the path that warns.
        self._first = self.lo if self.lo > 1 else 0
        self._size = len(self._table)
        self._warned = False

    def _evaluate(self, x: np.ndarray) -> np.ndarray:
        return by_tokens(self.xs, self.ys, x)

    def __call__(self, tokens: Any) -> Any:
        """Seconds: float for a number, float64 array of the same shape for an array. ValueError if negative."""
        if type(tokens) is int and self._first <= tokens < self._size:
            return self._table[tokens]
        x = np.asarray(tokens)
        if x.size == 0:
            return np.zeros(x.shape)
        low, high = x.min(), x.max()
        if low < 0:
            raise ValueError(f"{self.step}: a number of tokens must be at least 0, got {low}")
        if high > self.hi or (low < self.lo and ((x > 0) & (x < self.lo)).any()):
            self._warn(low, high)
        in_table = x.dtype.kind in "iu" and high < self._size
        seconds = self.array_table[x] if in_table else self._evaluate(x.astype(float))
        return float(seconds) if x.ndim == 0 else seconds

    def table(self, limit: int) -> np.ndarray:
        """Seconds for 0..limit tokens, float64[limit + 1], extrapolated (with the warning) where needed."""
        seconds: np.ndarray = self(np.arange(limit + 1))
        return seconds

    def _warn(self, low: float, high: float) -> None:
        if not self._warned:
            self._warned = True
            asked = f"{high}" if high > self.hi else f"{low}"
            warnings.warn(
                f"{self.step}: {asked} tokens asked for, measured from {self.lo} to {self.hi}; extrapolated",
                ExtrapolationWarning,
                stacklevel=3,
            )


class Grid:
    """Seconds by x (new tokens or sequences) and y (a context length): bilinear, non-decreasing, 0 at x = 0."""

    def __init__(self, step: str, xs: Sequence[int], ys: Sequence[int], seconds: np.ndarray) -> None:
        self.step = step
        self.xs = np.asarray(xs, dtype=float)
        self.ys = np.asarray(ys, dtype=float)
        self.grid = isotonic_grid(seconds)
        self.lo, self.hi = (int(xs[0]), int(ys[0])), (int(xs[-1]), int(ys[-1]))
        self._cuts: list[float] = self.ys.tolist()
        self._last = max(len(self._cuts) - 2, 0)
        self._y_lo, self._y_hi = self._cuts[0], self._cuts[-1]
        self._sizes: list[float] = self.xs.tolist()
        self._lists: list[list[float]] = self.grid.tolist()
        self._none = [0.0] * len(self._cuts)
        self._warned = False

    def __call__(self, x: Any, y: Any) -> Any:
        """Seconds: float for two numbers, else a float64 array of the broadcast shape. ValueError if negative."""
        if type(x) is not int or isinstance(y, np.ndarray):
            if isinstance(x, np.ndarray) or isinstance(y, np.ndarray) or int(x) != x:
                return self._array(np.asarray(x, dtype=float), np.asarray(y, dtype=float))
            x = int(x)
        low, high, share = self._beside(x)
        if y > self._y_hi or y < self._y_lo or (x > 0 and not self.lo[0] <= x <= self.hi[0]):
            self._warn(x, y)
            y = max(y, self._y_lo)
        at, cuts = bisect_right(self._cuts, y) - 1, self._cuts
        if at > self._last:
            at = self._last
        value = low[at] + (high[at] - low[at]) * share
        if len(cuts) == 1:
            return value
        following = low[at + 1] + (high[at + 1] - low[at + 1]) * share
        return value + (following - value) / (cuts[at + 1] - cuts[at]) * (y - cuts[at])

    def line(self, x: int) -> Callable[[float], float]:
        """Seconds by y at one x, as a call of the grid gives them, for those who ask often."""
        (left, right, share), cuts = self._beside(x), self._cuts
        values = [low + (high - low) * share for low, high in zip(left, right, strict=True)]
        slopes = [(values[j + 1] - values[j]) / (cuts[j + 1] - cuts[j]) for j in range(len(cuts) - 1)]
        first, last = self._y_lo, self._y_hi

        def at(y: float) -> float:
            if not first <= y < last:
                return float(self(x, y))
            i = bisect_right(cuts, y) - 1
            return values[i] + slopes[i] * (y - cuts[i])

        return at

    def _beside(self, x: int) -> tuple[list[float], list[float], float]:
        """Between which two measured rows over y the line at `x` lies, and how far it is from the first, of 1."""
        if x < 0:
            raise ValueError(f"{self.step}: a number of tokens must be at least 0, got {x}")
        xs, rows = self._sizes, self._lists
        if x == 0:
            return self._none, self._none, 0.0
        i = min(bisect_left(xs, x), len(xs) - 1)
        if i == 0:
            return rows[0], rows[0], 0.0
        return rows[i - 1], rows[i], (x - xs[i - 1]) / (xs[i] - xs[i - 1])

    def _columns(self, x: np.ndarray) -> np.ndarray:
        """Values at every grid context, [len(x), len(ys)]."""
        if (x < 0).any():
            raise ValueError(f"{self.step}: a number of tokens must be at least 0, got {x.min():g}")
        columns = np.stack([_line(self.xs, column, x) for column in self.grid.T], axis=-1)
        return np.where(x[:, None] > 0, columns, 0.0)

    def _array(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = np.broadcast_arrays(x, y)
        flat_x, flat_y = x.ravel(), y.ravel()
        if not flat_x.size:
            return np.zeros(x.shape)
        work = flat_x > 0
        outside = work & ((flat_x < self.lo[0]) | (flat_x > self.hi[0]) | (flat_y < self.lo[1]) | (flat_y > self.hi[1]))
        if outside.any():
            first = int(outside.argmax())
            self._warn(flat_x[first], flat_y[first])
        columns = self._columns(flat_x)
        if len(self.ys) == 1:
            return columns[:, 0].reshape(x.shape)
        flat_y = np.maximum(flat_y, self._y_lo)
        at = np.clip(np.searchsorted(self.ys, flat_y, side="right") - 1, 0, self._last)
        rows = np.arange(len(flat_x))
        left, right = columns[rows, at], columns[rows, at + 1]
        share = (flat_y - self.ys[at]) / (self.ys[at + 1] - self.ys[at])
        seconds: np.ndarray = left + share * (right - left)
        return seconds.reshape(x.shape)

    def _warn(self, x: float, y: float) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.step}: ({x:g}, {y:g}) asked for, measured from {self.lo} to {self.hi}; extrapolated",
                ExtrapolationWarning,
                stacklevel=3,
            )
