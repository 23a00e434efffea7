"""Request traces: who asks when, for how many prompt and output tokens, in which class."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from qllm.traces.prefixes import Prefixes
from qllm.traces.sessions import Sessions
from qllm.traces.wants import (
    BOUNDS,
    NOTHING,
    TAGS,
    TENANT,
    WANTS,
    describe_wants,
    first_odd,
    is_tags,
    is_tenant,
)

SINGLE_CLASS = ("all",)  # the class of every request in a trace that names none


class TraceError(ValueError):
    """A request trace, or the recipe of one, is wrong; the message names file and line (or key) and what is allowed."""


class TraceWarning(UserWarning):
    """What of a trace was not used: rows that the caller asked to leave out, how many and why; hash_ids."""


@dataclass(frozen=True, eq=False)
class RequestTrace:
    """The columns of one request trace, one element a request, sorted by arrival. They are copied and made read-only.

    Attributes:
        arrival: Seconds from the start of the trace, float64[n]; finite, >= 0, non-decreasing.
        prompt_tokens: int64[n], >= 1.
        output_tokens: int64[n], >= 1.
        cls: Index into `classes`, int64[n].
        classes: Names, distinct and printable; one may have no request.
        max_ttft_s: Seconds within which the first token is wanted, float64[n] > 0, inf where there is no bound; None:
            no request has one.
        max_tpot_s: The same from token to token, on average.
        tenants: Whose each request is: printable text of up to 256 characters, "" where nobody says; None: nobody says
            of any.
        tags: What else a policy may go by, name -> text, of each request; None: no request has any.
        prefixes: Which prompts begin alike; None: nobody says.
        sessions: Which requests follow which, and arrive later than `arrival` says; None: none does.
        source: What the trace was read from, ready for JSON: format, unit of the arrivals, what is not used. Empty for
            one that was not read. Two traces may be equal without it.

    Raises:
        TraceError: A column breaks these rules.
    """

    arrival: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    cls: np.ndarray
    classes: tuple[str, ...] = SINGLE_CLASS
    source: Mapping[str, Any] = field(default_factory=dict)
    max_ttft_s: np.ndarray | None = None
    max_tpot_s: np.ndarray | None = None
    tenants: tuple[str, ...] | None = None
    tags: tuple[Mapping[str, str], ...] | None = None
    prefixes: Prefixes | None = None
    sessions: Sessions | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", check_classes(self.classes))
        arrival = _column("arrival", self.arrival, np.float64)
        n = len(arrival)
        if n and not (np.isfinite(arrival).all() and arrival[0] >= 0 and (np.diff(arrival) >= 0).all()):
            raise TraceError("arrival: must be finite, >= 0 and sorted (seconds)")
        object.__setattr__(self, "arrival", arrival)
        for name, low, high in (
            ("prompt_tokens", 1, None),
            ("output_tokens", 1, None),
            ("cls", 0, len(self.classes) - 1),
        ):
            column = _column(name, getattr(self, name), np.int64)
            if len(column) != n:
                raise TraceError(f"{name}: has {len(column)} elements, arrival has {n}")
            bad = (column < low) if high is None else (column < low) | (column > high)
            if bad.any():
                i = int(np.argmax(bad))
                allowed = f">= {low}" if high is None else f"{low} to {high}"
                raise TraceError(f"{name}: request {i} has {column[i]}, must be {allowed}")
            object.__setattr__(self, name, column)
        self._check_wants(n)
        if self.prefixes is not None:
            ends = self.prefixes.counts * self.prefixes.block_tokens
            if len(ends) != n or (ends > self.prompt_tokens + self.output_tokens).any():
                raise TraceError(f"prefixes: must be those of {n} requests, none longer than its prompt and output")
        if self.sessions is not None and len(self.sessions) != n:
            raise TraceError(f"sessions: are of {len(self.sessions)} requests, arrival has {n} elements")
        if self.sessions is not None and (self.sessions.follows < 0).all():
            object.__setattr__(self, "sessions", None)

    def _check_wants(self, n: int) -> None:
        """The columns of `WANTS`; one that says nothing of any request is None, as if it had not been given."""
        for name in BOUNDS:
            given = getattr(self, name)
            if given is not None:
                bound = _column(name, given, np.float64)
                if len(bound) != n or not (bound > 0).all():
                    raise TraceError(f"{name}: must hold {n} numbers > 0 (seconds), one a request; inf: no bound")
                object.__setattr__(self, name, None if np.isinf(bound).all() else bound)
        for name, fits, allowed in (("tenants", is_tenant, TENANT), ("tags", is_tags, TAGS)):
            given = getattr(self, name)
            if given is None:
                continue
            column = tuple(given)
            if isinstance(given, str) or len(column) != n:
                raise TraceError(f"{name}: has {len(column)} elements, arrival has {n}")
            odd = first_odd(column, fits)
            if odd is not None:
                raise TraceError(f"{name}: request {odd} has {column[odd]!r:.80}, must be {allowed}")
            if name == "tags":
                copies = {id(tags): dict(tags) for tags in column}  # requests that share theirs go on so
                column = tuple(copies[id(tags)] for tags in column)
            object.__setattr__(self, name, column if any(column) else None)

    def __len__(self) -> int:
        return len(self.arrival)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RequestTrace):
            return NotImplemented
        mine, others = self._columns(), other._columns()
        return (self.classes, mine.keys()) == (other.classes, others.keys()) and all(
            np.array_equal(column, others[name]) if isinstance(column, np.ndarray) else column == others[name]
            for name, column in mine.items()
        )

    def _columns(self) -> dict[str, Any]:
        """What there is of each request: arrays, and tuples."""
        named = ((one.name, getattr(self, one.name)) for one in fields(self) if one.name not in ("classes", "source"))
        return {name: column for name, column in named if column is not None}

    @property
    def has_wants(self) -> bool:
        """Whether any request has a bound, a tenant or a tag."""
        return any(getattr(self, name) is not None for name in WANTS.values())

    def wants(self, i: int) -> dict[str, Any]:
        """Keyword arguments of `qllm.scheduler.Request` for request `i`: its bounds, tenant and tags, if any."""
        found: dict[str, Any] = {}
        for argument, name in WANTS.items():
            column = getattr(self, name)
            if column is not None:
                value = column[i]
                found[argument] = float(value) if name in BOUNDS else value
        if "tags" in found:
            found["tags"] = MappingProxyType(found["tags"])  # one mapping may be that of many requests
        return found

    def wanted(self) -> dict[str, list[Any]]:
        """The bounds, tenants and tags that there are, by column of a file: an element a request, None for nothing."""
        found: dict[str, list[Any]] = {}
        for name, attribute in WANTS.items():
            column = getattr(self, attribute)
            if column is not None:
                values = column.tolist() if isinstance(column, np.ndarray) else column
                found[name] = [None if value == NOTHING[name] else value for value in values]
        return found

    @property
    def rate(self) -> float | None:
        """Mean arrival rate in requests per second, (n - 1) / (last - first); None where all arrive at one instant."""
        span = float(self.arrival[-1] - self.arrival[0]) if len(self) else 0.0
        rate = (len(self) - 1) / span if span > 0 else math.inf
        return rate if rate < math.inf else None

    def scaled(self, factor: float) -> RequestTrace:
        """The same requests at `factor` times the arrival rate: arrival times divided by `factor` (> 0)."""
        check_positive("factor", factor)
        return replace(self, arrival=self.arrival / factor)

    def at_rate(self, rate: float) -> RequestTrace:
        """The same requests at `rate` per second on average. TraceError where all arrive at one instant (a batch)."""
        check_positive("rate", rate)
        if self.rate is None:
            raise TraceError(
                f"rate: {self._at_once()}: there are no arrival times to scale; leave rate out (a batch), or give the "
                "trace arrivals (qllm trace make --from FILE --arrival poisson --rate RATE, assign_arrivals)"
            )
        return self.scaled(rate / self.rate)

    def spread(self) -> RequestTrace:
        """The same requests, those of one instant spread evenly over the gap to the next.

        For arrivals that were rounded, as Mooncake's to 3 s. The gap is at most `gap_s` of `describe`. Order, first and
        last arrival stay; for the last, all gaps shrink alike to make room for the requests that shared its instant.

        Raises:
            TraceError: Several requests, and all arrive at one instant.
        """
        instants, start, sizes = np.unique(self.arrival, return_index=True, return_counts=True)
        if len(instants) == len(self):
            return self
        gap = _usual_gap(instants)
        if gap is None:
            raise TraceError(
                f"spread: {self._at_once()}: there is no gap to spread them over; give the trace arrivals "
                "(qllm trace make --from FILE --arrival poisson --rate RATE, assign_arrivals)"
            )
        room = np.append(np.minimum(np.diff(instants), gap), gap)
        place = (np.arange(len(self)) - np.repeat(start, sizes)) / np.repeat(sizes, sizes)
        offset = self.arrival - instants[0] + place * np.repeat(room, sizes)
        span = instants[-1] - instants[0]
        moved = instants[0] + np.maximum.accumulate(offset) * (span / offset[-1])
        moved = np.minimum(moved, instants[-1])
        moved[-1] = instants[-1]
        return replace(self, arrival=moved)

    def _at_once(self) -> str:
        n = len(self)
        return f"all {n} requests of this trace arrive at one instant" if n > 1 else f"this trace holds {n} request"

    def head(self, n: int) -> RequestTrace:
        """The first `n` requests; TraceError where the trace holds fewer, so that no experiment shrinks unseen."""
        if not 0 <= n <= len(self):
            raise TraceError(f"head: {n} requests asked for, the trace holds {len(self)}")
        return replace(self, **{name: column[:n] for name, column in self._columns().items()})

    def describe(self) -> dict[str, Any]:
        """Statistics, ready for JSON; `arrival_cv` is the coefficient of variation of the gaps between arrivals.

        `coinciding` says how many requests share their instant with another (`requests`), at how many of the trace's
        `instants` (`shared_instants`), and the gap from one instant to the next (`gap_s`: a tenth are shorter). Bounds,
        tenants and tags stand there where requests have some, with the number of these requests.
        """
        gaps = np.diff(self.arrival)
        if len(gaps) and gaps.max() > 0:
            gaps = gaps / gaps.max()  # no square overflows
        gap_mean = float(gaps.mean()) if len(gaps) else 0.0
        instants, sizes = np.unique(self.arrival, return_counts=True)
        return {
            **self.source,
            "requests": len(self),
            "duration_s": float(self.arrival[-1] - self.arrival[0]) if len(self) else 0.0,
            "rate_rps": self.rate,
            "arrival_cv": float(gaps.std() / gap_mean) if gap_mean > 0 else None,
            "coinciding": {
                "requests": int(sizes[sizes > 1].sum()),
                "shared_instants": int((sizes > 1).sum()),
                "instants": len(instants),
                "gap_s": _usual_gap(instants),
            },
            "prompt_tokens": _statistics(self.prompt_tokens),
            "output_tokens": _statistics(self.output_tokens),
            **describe_wants(self),
            **({} if self.sessions is None else {"sessions": self.sessions.describe()}),
            "classes": {
                name: {
                    "requests": int(mask.sum()),
                    "share": float(mask.mean()) if len(self) else None,
                    "prompt_tokens": _statistics(self.prompt_tokens[mask]),
                    "output_tokens": _statistics(self.output_tokens[mask]),
                }
                for name, mask in ((name, self.cls == i) for i, name in enumerate(self.classes))
            },
        }


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """`classes` as a tuple; TraceError unless they are distinct printable names without blanks at their ends."""
    if not isinstance(classes, (list, tuple)):
        raise TraceError(f"classes: {classes!r} must be a list of names")
    for name in classes:
        if not (isinstance(name, str) and name and name.isprintable() and name == name.strip()):
            raise TraceError(f"class {name!r}: a class name is printable text without blanks at its ends")
    if not classes or len(set(classes)) != len(classes):
        raise TraceError(f"classes {tuple(classes)!r}: at least one class, each named once")
    return tuple(classes)


def check_positive(name: str, value: Any) -> None:
    """TraceError unless `value` is a finite number > 0."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.integer, np.floating))
        or not 0 < value <= sys.float_info.max
    ):
        raise TraceError(f"{name}: {value!r:.80} must be a number > 0")


def _column(name: str, values: Any, dtype: type) -> np.ndarray:
    """A read-only one-dimensional copy of `values`; floats are not cut down to integers."""
    given = np.asarray(values)
    if given.ndim != 1 or (given.size and not np.can_cast(given.dtype, dtype, casting="same_kind")):
        raise TraceError(f"{name}: must be one-dimensional, of type {np.dtype(dtype).name}, not {given.dtype}")
    column: np.ndarray = given.astype(dtype)
    column.setflags(write=False)
    return column


def _usual_gap(instants: np.ndarray) -> float | None:
    """Seconds from one instant to the next; a tenth may be shorter, as rounding is not always to the same step."""
    return float(np.quantile(np.diff(instants), 0.1, method="lower")) if len(instants) > 1 else None


def _statistics(tokens: np.ndarray) -> dict[str, float] | None:
    if not len(tokens):
        return None
    quantiles = dict(zip(("p50", "p90", "p99"), np.quantile(tokens, [0.5, 0.9, 0.99]).tolist(), strict=True))
    return {"mean": float(tokens.mean()), "min": int(tokens.min()), **quantiles, "max": int(tokens.max())}
