"""Arrival times in seconds, rates in requests per second: drawn at rate 1, then scaled, so rates share their draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from qllm.traces.requests.trace import TraceError, check_positive

if TYPE_CHECKING:
    from qllm.traces.requests.recipe import GeneratedArrival


def poisson(rng: np.random.Generator, requests: int, *, rate: float) -> np.ndarray:
    """Poisson process: independent exponential gaps of mean 1 / rate. Returns float64[requests], sorted."""
    return np.cumsum(rng.standard_exponential(requests)) / rate


def gamma(rng: np.random.Generator, requests: int, *, rate: float, cv: float) -> np.ndarray:
    """Renewal process of Gamma gaps with coefficient of variation `cv` (1: Poisson). float64[requests], sorted."""
    return np.cumsum(rng.standard_gamma(cv**-2, requests)) * (cv**2 / rate)


def onoff(
    rng: np.random.Generator, requests: int, *, rate: float, on_s: float, off_s: float, burst: float | None = None
) -> np.ndarray:
    """Poisson arrivals, alternating: `on_s` seconds at `burst` * rate, then `off_s` seconds at what keeps the mean.

    The first cycle begins at time 0, on. `burst` lies between 1 (plain Poisson) and (on_s + off_s) / on_s (nothing
    arrives in the off phase; the default). Phases keep their seconds at every rate, so only the unit-rate draws are
    common to two rates. float64[requests], sorted: the unit-rate process through the inverse of the cumulative rate.
    """
    cycle = on_s + off_s
    burst = cycle / on_s if burst is None else burst
    on_rate = burst * rate
    off_rate = max(0.0, rate * (cycle - burst * on_s) / off_s)
    cycles, rest = np.divmod(np.cumsum(rng.standard_exponential(requests)), rate * cycle)
    in_on = np.minimum(rest, on_rate * on_s) / on_rate
    in_off = np.maximum(rest - on_rate * on_s, 0.0) / off_rate if off_rate > 1e-9 * rate else 0.0
    # Rounding at a cycle's seam may swap neighbours by an ulp.
    return np.maximum.accumulate(cycles * cycle + np.minimum(in_on + in_off, cycle))


def phases(rng: np.random.Generator, requests: int, *, rate: float, phases: list[dict[str, float]]) -> np.ndarray:
    """Poisson arrivals whose rate changes: phases (`seconds`, `rate` in proportion), over and over from time 0.

    Their mean rate over a round is `rate`. float64[requests], sorted: the unit-rate process through the inverse of the
    cumulative rate, as in `onoff`.
    """
    seconds = np.array([phase["seconds"] for phase in phases])
    shares = np.array([phase["rate"] for phase in phases]) * seconds
    cycle = seconds.sum()
    ends, counts = np.cumsum(seconds), np.cumsum(shares / shares.sum()) * rate * cycle
    busy = shares > 0  # where nobody comes time passes and nothing is counted
    starts, before = ends - seconds, np.append(0.0, counts[:-1])
    cycles, rest = np.divmod(np.cumsum(rng.standard_exponential(requests)), rate * cycle)
    at = np.minimum(np.searchsorted(counts[busy], rest, side="left"), busy.sum() - 1)
    share = (rest - before[busy][at]) / (counts[busy] - before[busy])[at]
    within = starts[busy][at] + np.clip(share, 0, 1) * seconds[busy][at]
    return np.maximum.accumulate(cycles * cycle + within)


PROCESSES: dict[str, Callable[..., np.ndarray]] = {"poisson": poisson, "gamma": gamma, "onoff": onoff, "phases": phases}


def draw_arrivals(rng: np.random.Generator, requests: int, arrival: GeneratedArrival, *, rate: float) -> np.ndarray:
    """Arrivals by that process. TraceError where `rate` is not above 0."""
    check_positive("rate", rate)
    settings = arrival.model_dump(exclude={"process"})
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        found = PROCESSES[arrival.process](rng, requests, rate=rate, **settings)
    if not np.isfinite(found).all():
        raise TraceError(f"rate: at {rate!r} requests per second the arrivals lie beyond what float64 holds")
    return found
