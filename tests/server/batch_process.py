"""Runs batches with an answer that is made up, until it is killed: python -m tests.server.batch_process FOLDER."""

import asyncio
import os
import sys

from qllm.server.batches.background import BackgroundStore
from qllm.server.batches.worker import Worker


async def main(folder: str) -> None:
    async def answer(path: str, body: dict) -> tuple[int, dict]:
        await asyncio.sleep(0.002 * (body["i"] % 3))
        print(body["i"], flush=True)
        return (400 if body["i"] % 10 == 0 else 200), {"i": body["i"], "process": os.getpid()}

    await Worker(BackgroundStore(folder), answer, in_flight=8).run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
