"""Who comes first within a level. A key is given once, at arrival: requests age alike, so their order stays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from qllm.scheduler.request import Request

#: Seconds of waiting that a token of the prompt counts for, in the order "shortest": a request of 10,000 tokens more is
#: overtaken by those that come up to 5 s after it, and by no others.
WAIT_PER_TOKEN_S = 5e-4


class Order:
    """A key for each request, in seconds or what counts like them; who has the lowest goes first."""

    def __init__(self, weights: Mapping[str, float]):
        """`weights`: of tenants, for those that go by them."""
        self._weights = weights

    def key(self, r: Request, *, urgent: bool) -> float:
        """Return the key of `r`, which has just come. By default: first come, first served."""
        return r.arrival

    def launched(self, r: Request) -> None:
        """Note that `r` was launched for the first time."""


class EarliestDeadline(Order):
    """By the moment at which the first token is wanted; who wants it at no moment comes last."""

    def key(self, r: Request, *, urgent: bool) -> float:
        return r.arrival + r.max_ttft_s


class Shortest(Order):
    """Short prompts first, with ageing; latency-sensitive requests by arrival."""

    def key(self, r: Request, *, urgent: bool) -> float:
        return r.arrival if urgent else r.arrival + WAIT_PER_TOKEN_S * r.prompt_tokens


class Fair(Order):
    """Each tenant gets tokens in proportion to its weight, whatever the others ask for.

    Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): a request's tag is the virtual time, or the moment
    in virtual time at which its tenant's last request is served, whichever is later. Virtual time is the tag of the
    request that was launched last.
    """

    def __init__(self, weights: Mapping[str, float]):
        super().__init__(weights)
        self._now: defaultdict[int, float] = defaultdict(float)  # level -> virtual time
        self._ends: defaultdict[tuple[int, str], float] = defaultdict(float)  # of each tenant's last request

    def key(self, r: Request, *, urgent: bool) -> float:
        tag = max(self._now[r.level], self._ends[r.level, r.tenant])
        self._ends[r.level, r.tenant] = tag + (r.prompt_tokens + r.max_tokens) / self._weights.get(r.tenant, 1.0)
        return tag

    def launched(self, r: Request) -> None:
        self._now[r.level] = max(self._now[r.level], r.order[0])


#: the orders by the name that a configuration uses
ORDERS: dict[str, type[Order]] = {
    "arrival": Order,
    "deadline": EarliestDeadline,
    "shortest": Shortest,
    "fair": Fair,
}
