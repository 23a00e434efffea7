"""The server under many clients, of whom some leave, beside requests that are none.

    python benchmarks/server/soak.py [--minutes 2] [--streams 200] [--leaving 0.2] [--odd 1000]
        [--out docs/results/server_soak.json]

`qllm serve` on the small random MoE in a process of its own; clients stream greedy completions over loopback. Each
answer must be the one that the server gave when it was asked alone: nothing lost, nothing doubled; where the client
left, so far. Meanwhile and afterwards others send what no server should take (odd.py): malformed, oversized, slow and
half-closed requests. Each must be answered with a 4xx or dropped, and a good one that follows it must be answered
rightly. There is room for all of them, so a 429 is as wrong as a 500. At the end nothing may run, wait or hold KV; the
server must end with exit code 0; and its memory may have grown by GROWTH_MB at most since the half of the time.

Printed: outcomes, requests/s, memory, what is wrong. Exit code 1 where anything is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from processes import end_children_on_sigterm
from results_file import add_out, save, this_machine

from benchmarks.server.odd import DROPPED, Odd, odd_requests, outcome
from benchmarks.server.serving import Server

PROMPTS = 24
NEW_TOKENS = (1, 24)
GAUGES = ("num_requests_running", "num_requests_waiting", "num_requests_suspended", "kv_cache_usage_perc")
ODD_CLIENTS = 48  #: that send odd requests at a time
BODY_TIMEOUT_S = 15.0  #: of the server: for who is slow; on a busy machine these clients are, too
KV_BLOCKS = 1024  #: so few that all of their memory was touched before the half of the time
PATIENCE_S = 600.0  #: for an answer: BE gets what LS leaves
GROWTH_MB = 64.0  #: by which the server's resident memory may grow after the half of the time
EMPTY_WITHIN_S = 10.0  #: from the last answer until nothing is held
FINE = {"complete", "left", DROPPED}


@dataclass
class Found:
    """What was seen.

    Attributes:
        outcomes: how many of each (what was sent, what became of it).
        memory: (seconds since the start, resident MB of the server).
        seconds: that all of it took; `streaming`: of these, that there were streams.
        left: what is held at the end, by gauge.
        code: exit code of the server.
        broken: errors in the server's log.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    memory: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    streaming: float = 0.0
    left: Mapping[str, float] = field(default_factory=dict)
    code: int | None = 0
    broken: int = 0

    def growth(self) -> tuple[float, float]:
        """Resident MB: the most in the first half of the streaming, and the most after it."""
        half = self.streaming / 2
        return (
            max((size for at, size in self.memory if at <= half), default=0.0),
            max((size for at, size in self.memory if at > half), default=0.0),
        )

    def wrong(self) -> list[str]:
        """What should not have been, a line each."""
        lines = [
            f"{count} of {what!r}: {how}"
            for (what, how), count in sorted(self.outcomes.items())
            if how not in FINE and not (how[0] in "24" and what in ODD_KINDS)
        ]
        lines += [f"{name} is {value:g} at the end" for name, value in self.left.items() if value]
        warm, end = self.growth()
        if end > warm + GROWTH_MB:
            lines.append(f"memory grew from {warm:.0f} to {end:.0f} MB; allowed: {GROWTH_MB:g} MB more")
        if self.code != 0:
            lines.append(f"the server ended with exit code {self.code}")
        if self.broken:
            lines.append(f"{self.broken} errors in the server's log")
        return lines


ODD_KINDS = {"malformed", "oversized", "slow", "half-closed", "whole, then half-closed"}  #: odd.py judges a status


def body(number: int, **more: object) -> dict[str, object]:
    """A request for the completion of prompt `number`."""
    rng = random.Random(number)
    prompt = "".join(rng.choices("abcdefgh ", k=rng.randint(1, 300)))
    tokens = rng.randint(*NEW_TOKENS)
    return {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} | more


async def stream(client: httpx.AsyncClient, number: int, leave: int | None, right: Mapping[int, str]) -> str:
    """The outcome of one stream, which is left after `leave` chunks, if it is."""
    text, chunks = "", 0
    tier = "flex" if number % 3 else "default"
    try:
        async with client.stream(
            "POST", "/v1/completions", json=body(number, stream=True, service_tier=tier)
        ) as answer:
            if answer.status_code != 200:
                return f"STATUS {answer.status_code}"
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return "complete" if text == right[number] else "WRONG TOKENS"
                if line.startswith("data: "):
                    told = json.loads(line[6:])
                    if "error" in told:
                        return "ENDED WITH AN ERROR"
                    text += told["choices"][0]["text"] if told["choices"] else ""
                    chunks += 1
                    if leave is not None and chunks >= leave:
                        return "left" if right[number].startswith(text) else "WRONG TOKENS"
    except httpx.HTTPError as error:
        return f"NO ANSWER ({type(error).__name__})"
    return "CUT OFF"


async def whole(client: httpx.AsyncClient, number: int, right: Mapping[int, str]) -> str:
    """The outcome of a good request."""
    try:
        answer = await client.post("/v1/completions", json=body(number))
    except httpx.HTTPError as error:
        return f"NO ANSWER ({type(error).__name__})"
    if answer.status_code != 200:
        return f"STATUS {answer.status_code}"
    return "complete" if answer.json()["choices"][0]["text"] == right[number] else "WRONG TOKENS"


async def clients(server: Server, args: argparse.Namespace) -> Found:
    """Send it all."""
    found = Found()
    start = time.monotonic()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # an idle one may end as it is used
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, limits=limits) as client:
        right = {}
        for number in range(PROMPTS):
            answer = await client.post("/v1/completions", json=body(number))
            right[number] = answer.raise_for_status().json()["choices"][0]["text"]
        start = time.monotonic()
        end = start + 60 * args.minutes
        rest: Iterator[Odd] = odd_requests(args.odd, seed=0)

        async def streams(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < end:
                leave = rng.randint(1, 4) if rng.random() < args.leaving else None
                found.outcomes["stream", await stream(client, rng.randrange(PROMPTS), leave, right)] += 1

        async def odd_ones(seed: int) -> None:
            rng = random.Random(seed)
            for one in rest:  # shared: each takes the next one
                found.outcomes[one.kind, await outcome(server.url, one)] += 1
                found.outcomes["good after it", await whole(client, rng.randrange(PROMPTS), right)] += 1

        async def weigh() -> None:
            while True:
                found.memory.append((time.monotonic() - start, resident_mb(server.pid)))
                await asyncio.sleep(0.5)

        scales = asyncio.create_task(weigh())
        odd = asyncio.gather(*(odd_ones(seed) for seed in range(ODD_CLIENTS)))
        await asyncio.gather(*(streams(seed) for seed in range(args.streams)))
        found.streaming = time.monotonic() - start
        await odd
        found.seconds = time.monotonic() - start
        scales.cancel()
    return found


def gauges(url: str) -> dict[str, float]:
    """What runs, waits, is suspended and is held, summed over classes."""
    found = dict.fromkeys(GAUGES, 0.0)
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        name = line.split("{")[0].split(" ")[0].removeprefix("qllm:")
        if name in found:
            found[name] += float(line.rsplit(" ", 1)[1])
    return found


def held_at_the_end(url: str) -> dict[str, float]:
    """The gauges, once they are empty, or after a while."""
    end = time.monotonic() + EMPTY_WITHIN_S
    while any((left := gauges(url)).values()) and time.monotonic() < end:
        time.sleep(0.2)
    return left


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def tables(found: Found) -> dict[str, list[dict[str, Any]]]:
    """For the results file."""
    warm, end = found.growth()
    rows = [{"sent": what, "outcome": how, "count": n} for (what, how), n in sorted(found.outcomes.items())]
    facts = {"seconds": found.seconds, "warm_mb": warm, "end_mb": end, "allowed_mb": GROWTH_MB}
    return {"outcomes": rows, "facts": [facts | dict(found.left) | {"wrong": len(found.wrong())}]}


def main() -> int:
    """Run the server and its clients."""
    parser = argparse.ArgumentParser(description="The server under many clients, beside requests that are none.")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--leaving", type=float, default=0.2, help="share of streams that are left before their end")
    parser.add_argument("--odd", type=int, default=1000, help="malformed, oversized, slow and half-closed requests")
    add_out(parser, "server_soak")
    args = parser.parse_args()
    end_children_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MALLOC_ARENA_MAX"] = "1"  # the server's threads share a heap, so that what grows is a leak (glibc)
        with Server(None, Path(folder), {"body_timeout": BODY_TIMEOUT_S, "engine": {"kv_blocks": KV_BLOCKS}}) as server:
            found = asyncio.run(clients(server, args))
            found.left = held_at_the_end(server.url)
            server.signal(signal.SIGTERM)
            found.code = server.wait(60)
        found.broken = server.log.read_text(errors="replace").count("internal error")
    for (what, how), count in sorted(found.outcomes.items()):
        print(f"{count:>7}  {what}: {how}")
    warm, end = found.growth()
    print(f"{found.outcomes.total() / found.seconds:.1f} requests/s in {found.seconds:.0f} s")
    print(f"memory: at most {warm:.0f} MB until the half of the time, then {end:.0f} MB")
    print("left at the end:", ", ".join(f"{name} {value:g}" for name, value in found.left.items()))
    for line in found.wrong():
        print(f"WRONG: {line}")
    if args.out is not None:
        save(args.out, source=f"measured on {this_machine()}", tables=tables(found))
    return 1 if found.wrong() else 0


if __name__ == "__main__":
    sys.exit(main())
