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
BAR_EVERY_S = 0.5  #: seconds after which a bar looks again


class Update:
    """What is being done and how far it is; call it with what is done, and what there is to do if that is known."""

    def __init__(self, doing: str, total: int | None = None):
        self.doing, self.total, self.began = doing, total, time.monotonic()
        self.done: Callable[[], int] = lambda: 0  #: asked from another thread
        self._changed: Callable[[bool], None] = lambda _: None

    def __call__(self, done: int, total: int | None) -> None:
        self.done, self.total = lambda: done, total
        self._changed(False)

    def phase(self, doing: str, total: int | None = None) -> None:
        """Something else begins."""
        self.doing, self.total, self.began, self.done = doing, total, time.monotonic(), lambda: 0
        self._changed(True)

    def watch(self, done: Callable[[], int]) -> None:
        """Have `done` asked, from another thread, for what is done of this phase."""
        self.done = done

    @contextmanager
    def shown(self, changed: Callable[[bool], None], every: float, tell: Callable[[], None]) -> Iterator[None]:
        """Call `tell` every so many seconds, from a thread of its own: a single step may take longer than that.

        `changed` is called at once, with whether another phase begins.
        """
        ended = Event()

        def look() -> None:
            while not ended.wait(every):
                tell()

        self._changed = changed
        thread = Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._changed = lambda _: None


@contextmanager
def progress(doing: str, total: int | None = None, shown: bool = True) -> Iterator[Update]:
    """Show on stderr how far the work inside is; yields what to call with (done, total)."""
    update = Update(doing, total)
    if not shown:
        yield update
        return
    with (_bar if sys.stderr.isatty() else _lines)(update):
        yield update


@contextmanager
def _bar(update: Update) -> Iterator[None]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(update.doing, total=update.total)

        def tell() -> None:
            bar.update(task, completed=update.done(), total=update.total)

        def changed(begins: bool) -> None:
            if begins:
                bar.reset(task, total=update.total, description=update.doing)
            else:
                tell()

        with update.shown(changed, BAR_EVERY_S, tell):
            yield


@contextmanager
def _lines(update: Update) -> Iterator[None]:
    def tell() -> None:
        of = "" if update.total is None else f" of {update.total}"
        _print(f"{update.doing}: {update.done()}{of} done after {time.monotonic() - update.began:.0f} s")

    with update.shown(lambda begins: _print(update.doing) if begins else None, EVERY_S, tell):
        yield


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
