"""Arrival processes: when the next request comes. Times in seconds, rates in requests per second.

Each function draws at rate 1 and then scales, so the same generator state at another rate gives the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qllm.traces.requests.trace import TraceError, check_keys, check_positive


def poisson(rng: np.random.Generator, requests: int, *, rate: float) -> np.ndarray:
    """Poisson process: independent exponential gaps of mean 1 / rate. Returns float64[requests], sorted."""
    return np.cumsum(rng.standard_exponential(requests)) / rate


def gamma(rng: np.random.Generator, requests: int, *, rate: float, cv: float) -> np.ndarray:
    """Renewal process with Gamma gaps of mean 1 / rate and coefficient of variation `cv` (1 is Poisson), 0.001 to 100.

    The Gamma distribution's shape is 1 / cv**2. Returns float64[requests], sorted.
    """
    check_positive("cv", cv)
    if not 1e-3 <= cv <= 100:  # beyond, the shape leaves what float64 draws well
        raise TraceError(f"cv: {cv!r} must lie between 0.001 and 100")
    return np.cumsum(rng.standard_gamma(cv**-2, requests)) * (cv**2 / rate)


def onoff(
    rng: np.random.Generator, requests: int, *, rate: float, on_s: float, off_s: float, burst: float | None = None
) -> np.ndarray:
    """Poisson arrivals whose rate alternates: `on_s` seconds at `burst` * rate, then `off_s` seconds at what keeps
    the mean over one cycle at `rate`. The first cycle begins at time 0, with its on phase.

    `burst` lies between 1 (plain Poisson) and (on_s + off_s) / on_s (nothing arrives in the off phase), which is the
    default. The phases keep their length in seconds at every rate, so here only the underlying unit-rate draws are
    common to two rates. Returns float64[requests], sorted: the unit-rate process through the inverse of the
    cumulative rate (time change of a Poisson process).
    """
    check_positive("on_s", on_s)
    check_positive("off_s", off_s)
    cycle = on_s + off_s
    highest = cycle / on_s
    burst = highest if burst is None else burst
    check_positive("burst", burst)
    if not 1 <= burst <= highest * (1 + 1e-9):
        raise TraceError(f"burst: {burst!r} must lie between 1 and (on_s + off_s) / on_s = {highest:g}")
    on_rate = burst * rate
    off_rate = max(0.0, rate * (cycle - burst * on_s) / off_s)
    cycles, rest = np.divmod(np.cumsum(rng.standard_exponential(requests)), rate * cycle)
    in_on = np.minimum(rest, on_rate * on_s) / on_rate
    in_off = np.maximum(rest - on_rate * on_s, 0.0) / off_rate if off_rate > 1e-9 * rate else 0.0
    # Rounding at a cycle's seam may swap neighbours by an ulp.
    return np.maximum.accumulate(cycles * cycle + np.minimum(in_on + in_off, cycle))


# Process -> its function, the settings that it needs, and those that it may have.
PROCESSES: dict[str, tuple[Callable[..., np.ndarray], tuple[str, ...], tuple[str, ...]]] = {
    "poisson": (poisson, (), ()),
    "gamma": (gamma, ("cv",), ()),
    "onoff": (onoff, ("on_s", "off_s"), ("burst",)),
}


def draw_arrivals(rng: np.random.Generator, requests: int, spec: Mapping[str, Any], *, rate: float) -> np.ndarray:
    """Arrivals by {"process": NAME, and that function's settings}; TraceError names the key and what is allowed."""
    check_positive("rate", rate)
    process = spec.get("process") if isinstance(spec, Mapping) else spec
    if process not in PROCESSES:
        raise TraceError(f"arrival.process: {process!r} must be one of {', '.join(PROCESSES)}")
    draw, required, optional = PROCESSES[process]
    check_keys("arrival", spec, ("process", *required), optional)
    settings = {key: value for key, value in spec.items() if key != "process"}
    try:
        return draw(rng, requests, rate=rate, **settings)
    except TraceError as error:
        raise TraceError(f"arrival.{error}") from None
