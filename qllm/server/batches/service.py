"""Batches as a part of the app: the store, and the worker that runs while the server does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from qllm.config.yaml_lines import ConfigError
from qllm.server.batches.background import BackgroundStore
from qllm.server.batches.settings import BatchSettings
from qllm.server.batches.store import StoreError
from qllm.server.batches.worker import Answer, Worker


class Batches:
    """Files and batches in a folder. Between `start` and `stop` their lines are answered.

    Args:
        folder: where they are kept.
        settings: the limits.
        now: seconds of the epoch.

    Raises:
        ConfigError: the folder cannot be used, or another server uses it.
    """

    def __init__(self, folder: str, settings: BatchSettings | None = None, now: Callable[[], float] = time.time):
        self.settings = settings or BatchSettings()
        try:
            self.store = BackgroundStore(folder)
        except StoreError as error:
            raise ConfigError(f"batches.folder: {error}") from None
        self.now = now
        self._worker: Worker | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, answer: Answer) -> None:
        """Go on with what is not at its end; called once, in the event loop. `answer` answers a line."""
        settings = self.settings
        self._worker = Worker(
            self.store,
            answer,
            in_flight=settings.in_flight,
            max_lines=settings.max_lines,
            longest_wait=settings.longest_wait,
            now=self.now,
        )
        self._task = asyncio.create_task(self._worker.run(), name="qllm-batches")

    def notify(self) -> None:
        """A batch is new, or was cancelled."""
        if self._worker is not None:
            self._worker.notify()

    async def stop(self) -> None:
        """Take up no more lines, leave those in flight for the next start, and let go of the folder."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await asyncio.to_thread(self.store.close)
