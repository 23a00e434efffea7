"""The store behind a thread of its own, so that asyncio never waits for the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from qllm.server.batches.store import Store

P = ParamSpec("P")
T = TypeVar("T")


class BackgroundStore:
    """Calls the store's methods in one thread, in the order of the calls. Raises StoreError."""

    def __init__(self, folder: str | Path):
        self._store = Store(folder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qllm-batches")

    async def call(self, method: Callable[Concatenate[Store, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`method` of the store with these arguments. Raises what it raises."""
        future = self._thread.submit(method, self._store, *args, **kwargs)
        # What was begun is done, also where nobody waits for it any more.
        return await asyncio.shield(asyncio.wrap_future(future))

    def close(self) -> None:
        """End the thread once what was called is done, and let go of the folder."""
        self._thread.shutdown(wait=True)
        self._store.close()
