"""How far long work is: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY_S = 10.0  #: seconds between two lines

Update = Callable[[int, int | None], None]  #: called with what is done, and what there is to do if that is known


@contextmanager
def progress(doing: str, total: int | None = None, shown: bool = True) -> Iterator[Update]:
    """Show on stderr how far the work inside is; yields what to call with (done, total)."""
    if not shown:
        yield lambda _done, _total: None
    elif sys.stderr.isatty():
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        with _lines(doing, total) as update:
            yield update


@contextmanager
def _lines(doing: str, total: int | None) -> Iterator[Update]:
    """A line every EVERY_S seconds, from a thread of its own: one simulation may take longer than that."""
    state, ended, began = [0, total], Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(EVERY_S):
            of = "" if state[1] is None else f" of {state[1]}"
            print(f"{doing}: {state[0]}{of} done after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    def update(done: int, total: int | None) -> None:
        state[:] = done, total

    thread = Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield update
    finally:
        ended.set()
        thread.join()
