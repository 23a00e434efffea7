"""Answers the lines of batches, a few at a time, for as long as the server lives."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from qllm.server.batches.background import BackgroundStore
from qllm.server.batches.store import Store
from qllm.server.batches.validation import Line

#: Gives the HTTP status and the body for a request to that path, such as /v1/chat/completions.
Answer = Callable[[str, dict[str, Any]], Awaitable[tuple[int, dict[str, Any]]]]

OVERLOAD = (429, 503)  #: the server has no room, or ends: the line is tried again
FIRST_WAIT = 0.1  #: seconds before that; each further try of the line waits twice as long
LOOK_S = 1.0  #: seconds between two looks at the clock, for batches that expire

log = logging.getLogger(__name__)


class Worker:
    """Runs batches, the oldest first.

    Args:
        store: of the batches; only this worker runs them.
        answer: answers a line.
        in_flight: lines that are answered at the same time.
        max_lines: of a batch.
        longest_wait: seconds between two tries of a line that found the server full.
        now: seconds of the epoch.
    """

    def __init__(
        self,
        store: BackgroundStore,
        answer: Answer,
        *,
        in_flight: int = 16,
        max_lines: int = 50_000,
        longest_wait: float = 30.0,
        now: Callable[[], float] = time.time,
    ):
        self._store = store
        self._answer = answer
        self._in_flight = in_flight
        self._max_lines = max_lines
        self._longest_wait = longest_wait
        self._now = now
        self._news = asyncio.Event()  # a batch came or was cancelled, or a line was answered
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}  # by batch and number of the line
        self._taken: dict[str, int] = {}  # the last line that was taken up, by batch

    def notify(self) -> None:
        """Have a look at the batches now: one is new, or was cancelled."""
        self._news.set()

    async def run(self) -> None:
        """Answer lines until cancelled; those in flight are run again by the next worker."""
        try:
            while True:
                self._news.clear()
                try:
                    await self._turn()
                except Exception as error:  # the disk is full, say: it may have room again
                    log.error("batches: %s", type(error).__name__)
                with suppress(TimeoutError):  # asyncio.wait_for of Python 3.11 would lose a cancel that comes with news
                    async with asyncio.timeout(LOOK_S):
                        await self._news.wait()
        finally:
            await self._drop(None)

    async def _turn(self) -> None:
        """Bring every batch on as far as it goes now."""
        for batch in await self._store.call(Store.open_batches):
            id, status = batch["id"], batch["status"]
            if status == "validating" and self._now() < batch["expires_at"]:
                await self._store.call(Store.validate, id, self._now(), self._max_lines)
                batch = await self._store.call(Store.batch, id)
                status = batch["status"]
            ends_as = self._end(batch)
            if ends_as is not None:
                await self._finish(id, ends_as)
            elif status == "in_progress":
                await self._take(batch)

    def _end(self, batch: dict[str, Any]) -> str | None:
        """What the batch becomes now; None: nothing."""
        counts = batch["request_counts"]
        if batch["status"] == "cancelling":
            return "cancelled"
        if batch["status"] == "finalizing":  # the process ended before its files were written
            return "finalizing"
        if batch["status"] == "failed":
            return None
        if batch["status"] == "in_progress" and counts["completed"] + counts["failed"] == counts["total"]:
            return "completed"
        return "expired" if self._now() >= batch["expires_at"] else None

    async def _finish(self, id: str, ends_as: str) -> None:
        await self._drop(id)
        if ends_as != "finalizing":
            await self._store.call(Store.finalize, id, ends_as, self._now())
        await self._store.call(Store.write_files, id, self._now())
        self._taken.pop(id, None)
        log.info("%s: %s", id, await self._store.call(Store.ends_as, id))

    async def _drop(self, id: str | None) -> None:
        """Stop answering the lines of a batch, or all."""
        tasks = [task for (batch, _), task in self._tasks.items() if id is None or batch == id]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self, batch: dict[str, Any]) -> None:
        """Take up as many lines as there is room for."""
        id = batch["id"]
        room = self._in_flight - len(self._tasks)
        if room <= 0:
            return
        for line in await self._store.call(Store.pending, id, self._taken.get(id, 0), room):
            self._taken[id] = line.number
            key = id, line.number
            task = asyncio.create_task(self._run(batch, line), name=f"{id} {line.number}")
            self._tasks[key] = task
            task.add_done_callback(partial(self._done, key))

    def _done(self, key: tuple[str, int], _: asyncio.Task[None]) -> None:
        del self._tasks[key]
        self._news.set()

    async def _run(self, batch: dict[str, Any], line: Line) -> None:
        """Answer one line, however often it takes."""
        wait = FIRST_WAIT
        while True:
            error = None
            try:
                status, body = await self._answer(batch["endpoint"], json.loads(line.body))
            except Exception as broken:
                log.error("%s, line %d: %s", batch["id"], line.number, type(broken).__name__)
                status, error = 500, f"The server broke: {type(broken).__name__}."
            if status not in OVERLOAD:
                break
            await asyncio.sleep(wait)
            wait = min(2 * wait, self._longest_wait)
        kept = None if error is not None else body
        while True:
            try:
                await self._store.call(Store.answer, batch["id"], line.number, status, kept, error)
                return
            except Exception as broken:  # the answer is not lost while the disk has no room
                log.error("%s, line %d: %s", batch["id"], line.number, type(broken).__name__)
                await asyncio.sleep(self._longest_wait)
