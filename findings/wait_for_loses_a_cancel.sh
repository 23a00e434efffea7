#!/usr/bin/env bash
# asyncio.wait_for of Python 3.11 loses a cancel that comes together with what it waits for.
#
# One would guess: a task that is cancelled while it waits with a time limit raises CancelledError there. So a worker
# that sleeps until there is news, or a second has passed, ends when its server cancels it.
# What happens: where the event is set and the task is cancelled before it runs again, wait_for returns as if nothing
# had been cancelled. The worker goes on, and whoever awaits its end waits for ever. asyncio.timeout does not do that.
# Versions: CPython 3.11.7; asyncio belongs to it, nothing is installed. 3.12 builds wait_for on asyncio.timeout.
# Reported: https://github.com/python/cpython/issues/86296 (closed with 3.12; 3.11 keeps it).
# Run: 2026-11-29.
set -euo pipefail

python=$(command -v python3.11 || command -v python3)
"$python" - <<'PY'
import asyncio
import sys


async def with_wait_for(news):
    while True:
        news.clear()
        try:
            await asyncio.wait_for(news.wait(), 1.0)
        except TimeoutError:
            pass


async def with_timeout(news):
    while True:
        news.clear()
        try:
            async with asyncio.timeout(1.0):
                await news.wait()
        except TimeoutError:
            pass


async def ends(worker):
    news = asyncio.Event()
    task = asyncio.create_task(worker(news))
    await asyncio.sleep(0.05)
    news.set()
    task.cancel()
    ended, _ = await asyncio.wait([task], timeout=3)
    task.cancel()
    await asyncio.wait([task], timeout=3)
    return bool(ended)


found = {worker.__name__: asyncio.run(ends(worker)) for worker in (with_wait_for, with_timeout)}
for name, ended in found.items():
    print(f"Python {sys.version.split()[0]}, cancelled just as its event is set, {name}: {'ended' if ended else 'goes on'}")
as_found = found == {"with_wait_for": False, "with_timeout": True}
print("as described" if as_found else "CHANGED")
sys.exit(not as_found)
PY
