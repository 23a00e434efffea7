"""Long work beside the engine, which needs the interpreter for every operation that it starts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

WORK_S = 0.0005  #: after which others get the interpreter; by itself Python lets them wait ten times as long
REST = 2.0  #: seconds of rest for a second of work


def with_pauses(items: Iterable[T]) -> Iterator[T]:
    """The same items. Whoever takes them sleeps now and then, so that requests are served meanwhile."""
    began = time.perf_counter()
    for item in items:
        yield item
        worked = time.perf_counter() - began
        if worked >= WORK_S:
            time.sleep(REST * worked)
            began = time.perf_counter()
