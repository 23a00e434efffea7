"""Draw the requests of a pool of clients.

Each client is a renewal process: gaps of one distribution (Gamma or Weibull, by its shape), at a rate that may change
from window to window. In each window it starts in equilibrium: the first request comes within a gap that was under way,
not after a whole one. So the mean number of requests in a window is its rate times its length, however bursty the gaps
are, and clients do not all begin with a burst. What the clients send is put together by arrival.
"""

from __future__ import annotations

import math

import numpy as np

from qllm.traces.requests.clients.pool import ClientPool, Drawn, Stream, zipf_pool
from qllm.traces.requests.clients.servegen import servegen_pool
from qllm.traces.requests.clients.settings import Clients, Servegen
from qllm.traces.requests.trace import TraceError, check_positive

MOST_WINDOWS = 100_000  #: of one run; of ServeGen's 10 minutes, that is two years


def draw_requests(process: Clients | Servegen, stream: Stream, requests: int, *, rate: float, lengths: bool) -> Drawn:
    """The first requests of the clients that `process` describes, by arrival.

    Args:
        process: The clients.
        stream: The generator of one purpose, which words name.
        requests: How many.
        rate: Mean of requests per second, over all windows of the clients.
        lengths: Whether the lengths of a folder's clients are to be drawn too.

    Raises:
        TraceError: A file is broken, or the arrivals are beyond what float64 holds.
    """
    check_positive("rate", rate)
    pool = zipf_pool(process, stream) if isinstance(process, Clients) else servegen_pool(process, lengths=lengths)
    return draw(pool, stream, requests, rate=rate)


def draw(pool: ClientPool, stream: Stream, requests: int, *, rate: float) -> Drawn:
    """The first `requests` requests of a pool, at `rate` per second on average.

    Each client draws from a stream of its own. A longer draw begins with the shorter one. Where one window lasts for
    ever, two rates are one sequence of requests on a stretched time axis; windows that change keep their seconds.
    """
    endless = bool(np.isinf(pool.seconds[-1]))
    rates = pool.rates * ((1.0 if endless else rate) / pool.mean_rate)
    clock = rate if endless else 1.0
    until = (requests + 6 * math.sqrt(requests)) / (rate / clock)
    while True:
        if not endless and until / pool.seconds.sum() * len(pool.seconds) > MOST_WINDOWS:
            raise TraceError(f"rate: {requests} requests at {rate!r} per second pass more than {MOST_WINDOWS} windows")
        found = [
            _of_client(stream("clients", name), pool, rates[c], c, until) if rates[c].any() else _NOBODY
            for c, name in enumerate(pool.names)
        ]
        arrival = np.concatenate([at for at, _ in found])
        if (arrival <= until).sum() >= requests:
            break
        until *= 1.5
    first = np.argsort(arrival, kind="stable")[:requests]
    if not np.isfinite(arrival[first[-1]] / clock):
        raise TraceError(f"rate: at {rate!r} requests per second the arrivals lie beyond what float64 holds")
    client = np.repeat(np.arange(len(found)), [len(at) for at, _ in found])
    window = np.concatenate([window for _, window in found])
    return Drawn(pool, arrival[first] / clock, client[first], window[first])


_NOBODY = np.empty(0), np.empty(0, dtype=np.int64)


def _of_client(
    rng: np.random.Generator, pool: ClientPool, rates: np.ndarray, c: int, until: float
) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals of client `c`, float64[n], sorted, all those up to `until` among them; and the window of each."""
    begin, i = 0.0, 0
    arrivals, windows = [_NOBODY[0]], [_NOBODY[1]]
    while begin < until:
        w = i % len(pool.seconds)
        seconds, rate = float(pool.seconds[w]), float(rates[w])
        if rate > 0:
            # A window is drawn whole, so that the next one draws the same wherever the run ends.
            counted = _renewals(rng, bool(pool.gamma[c, w]), float(pool.shapes[c, w]), rate * min(seconds, until))
            arrivals.append(np.minimum(begin + counted / rate, begin + seconds))
            windows.append(np.full(len(counted), w))
        begin, i = begin + seconds, i + 1
    return np.concatenate(arrivals), np.concatenate(windows)


def _renewals(rng: np.random.Generator, gamma: bool, shape: float, until: float) -> np.ndarray:
    """Times up to `until` of a renewal process in equilibrium whose gaps have a mean of 1: float64[n], sorted.

    The gap that is under way at 0 is as long as its length is likely: of Gamma(k) that is Gamma(k + 1), and of Weibull
    the k-th power of it is Gamma(1 + 1 / k). 0 lies anywhere in it.
    """
    mean = shape if gamma else math.gamma(1 + 1 / shape)
    under_way = rng.standard_gamma(shape + 1) if gamma else rng.standard_gamma(1 + 1 / shape) ** (1 / shape)
    gaps = np.array([rng.random() * under_way / mean])
    more = int(until + 6 * math.sqrt(until)) + 4
    while True:
        times = np.cumsum(gaps)  # over all, so that a longer draw has the same roundings
        if times[-1] > until:
            return times[: np.searchsorted(times, until, side="right")]
        drawn = rng.standard_gamma(shape, more) if gamma else rng.weibull(shape, more)
        gaps, more = np.concatenate([gaps, drawn / mean]), 2 * more
