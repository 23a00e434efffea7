"""Arrival processes: when the next request comes. Times in seconds, rates in requests per second.

Each function draws at rate 1 and then scales, so the same generator state at another rate gives the same draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from qllm.traces.requests.trace import check_positive

if TYPE_CHECKING:
    from qllm.traces.requests.recipe import GeneratedArrival


def poisson(rng: np.random.Generator, requests: int, *, rate: float) -> np.ndarray:
    """Poisson process: independent exponential gaps of mean 1 / rate. Returns float64[requests], sorted."""
    return np.cumsum(rng.standard_exponential(requests)) / rate


def gamma(rng: np.random.Generator, requests: int, *, rate: float, cv: float) -> np.ndarray:
    """Renewal process with Gamma gaps of mean 1 / rate and coefficient of variation `cv` (1 is Poisson), 0.001 to 100.

    The Gamma distribution's shape is 1 / cv**2. Returns float64[requests], sorted.
    """
    return np.cumsum(rng.standard_gamma(cv**-2, requests)) * (cv**2 / rate)


def onoff(
    rng: np.random.Generator, requests: int, *, rate: float, on_s: float, off_s: float, burst: float | None = None
) -> np.ndarray:
    """Poisson arrivals at an alternating rate: `on_s` seconds at `burst` * rate, then `off_s` seconds at less.

    In the off phase the rate is what keeps the mean over one cycle at `rate`. The first cycle begins at time 0, with
    its on phase.

    `burst` lies between 1 (plain Poisson) and (on_s + off_s) / on_s (nothing arrives in the off phase), which is the
    default. The phases keep their length in seconds at every rate, so here only the underlying unit-rate draws are
    common to two rates. Returns float64[requests], sorted: the unit-rate process through the inverse of the
    cumulative rate (time change of a Poisson process).
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


PROCESSES: dict[str, Callable[..., np.ndarray]] = {"poisson": poisson, "gamma": gamma, "onoff": onoff}


def draw_arrivals(rng: np.random.Generator, requests: int, arrival: GeneratedArrival, *, rate: float) -> np.ndarray:
    """Arrivals by that process. TraceError where `rate` is not above 0."""
    check_positive("rate", rate)
    settings = arrival.model_dump(exclude={"process"})
    return PROCESSES[arrival.process](rng, requests, rate=rate, **settings)
