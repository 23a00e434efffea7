"""A pool of clients: what it is, and what requests drawn from it have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qllm.traces.requests.clients.settings import Clients

Stream = Callable[..., np.random.Generator]  #: the generator of one purpose, named by words


@dataclass(frozen=True, eq=False)
class Distribution:
    """Token counts and how often they occur.

    Attributes:
        tokens: int64[k], >= 1.
        cumulative: float64[k]: the share of the requests with one of the counts up to here; it ends with 1.
    """

    tokens: np.ndarray
    cumulative: np.ndarray

    def at(self, share: np.ndarray) -> np.ndarray:
        """The counts at these shares, float64[n] in [0, 1). A count that never occurs is not among them."""
        found = np.searchsorted(self.cumulative, share, side="right")
        counts: np.ndarray = self.tokens[np.minimum(found, len(self.tokens) - 1)]
        return counts


@dataclass(frozen=True, eq=False)
class ClientPool:
    """Clients (c of them), and what they do in each window of time (w of them).

    Attributes:
        names: Of the clients; they are the tenants of their requests.
        seconds: How long each window lasts, float64[w]. After the last the first begins again. One that lasts inf is
            the only one.
        rates: Requests per second, in proportion to each other, float64[c, w], >= 0; not all are 0.
        gamma: Whether the gaps are Gamma, or else Weibull, bool[c, w].
        shapes: The shape of that distribution, float64[c, w].
        lengths: Prompt and output tokens of each client in each window, None in one without requests; None: the pool
            knows of no lengths.
        factors: What each client's prompt and output tokens are multiplied by, float64[c, 2]; None: by nothing.
    """

    names: tuple[str, ...]
    seconds: np.ndarray
    rates: np.ndarray
    gamma: np.ndarray
    shapes: np.ndarray
    lengths: tuple[tuple[tuple[Distribution, Distribution] | None, ...], ...] | None = None
    factors: np.ndarray | None = None

    @property
    def mean_rate(self) -> float:
        """Of all clients, over all windows."""
        total = self.rates.sum(axis=0)
        endless = np.isinf(self.seconds[-1])
        return float(total[0] if endless else (total * self.seconds).sum() / self.seconds.sum())


@dataclass(frozen=True, eq=False)
class Drawn:
    """The requests of a pool, by arrival.

    Attributes:
        pool: Whose they are.
        arrival: Seconds, float64[n].
        client: int64[n], an index into the pool's clients.
        window: int64[n], an index into its windows.
    """

    pool: ClientPool
    arrival: np.ndarray
    client: np.ndarray
    window: np.ndarray

    @property
    def tenants(self) -> tuple[str, ...]:
        """The name of each request's client."""
        return tuple(map(self.pool.names.__getitem__, self.client.tolist()))

    def lengths(self, rng: np.random.Generator, column: int) -> np.ndarray:
        """Prompt (column 0) or output tokens (1) from the distributions of each one's client and window, int64[n]."""
        assert self.pool.lengths is not None  # or else the recipe names lengths
        share = rng.random(len(self.arrival))
        tokens = np.empty(len(share), dtype=np.int64)
        group = self.client * len(self.pool.seconds) + self.window
        order = np.argsort(group, kind="stable")
        starts = np.flatnonzero(np.diff(group[order], prepend=-1))
        for mine in np.split(order, starts[1:]):
            pair = self.pool.lengths[self.client[mine[0]]][self.window[mine[0]]]
            assert pair is not None  # this window has a request
            tokens[mine] = pair[column].at(share[mine])
        return tokens

    def stretched(self, tokens: np.ndarray, column: int) -> np.ndarray:
        """A class's tokens times the factor of each one's client, rounded, at least 1."""
        if self.pool.factors is None:
            return tokens
        found: np.ndarray = np.rint(np.clip(tokens * self.pool.factors[self.client, column], 1, 2**53)).astype(np.int64)
        return found


def zipf_pool(settings: Clients, stream: Stream) -> ClientPool:
    """Clients whose rates are as 1 / k**skew, from the busiest on; `stream` draws what their lengths are like."""
    number = np.arange(1, settings.clients + 1)
    rates = number**-settings.skew
    rates /= rates.sum()
    factors = None
    if settings.length_sigma:
        factors = np.exp(settings.length_sigma * stream("clients", "lengths").standard_normal((len(number), 2)))
        factors /= rates @ factors  # over all requests the mean is 1
    one = (len(number), 1)
    return ClientPool(
        tuple(f"client-{k}" for k in number),
        np.array([np.inf]),
        rates[:, None],
        np.ones(one, dtype=bool),
        np.full(one, settings.cv**-2),
        factors=factors,
    )
