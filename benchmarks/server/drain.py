"""SIGTERM under load: how each request ends.

    python benchmarks/server/drain.py [--requests 100] [--model FOLDER] [--scenarios patient short second]
        [--out docs/results/server_drain.json]

`qllm serve` on the small random MoE (or on the checkpoint `--model`), and so many requests at once, each on a
connection of its own: whole answers and streams, some of them read late; completions and chats; LS and BE; one answer
or three; one in four so long that it does not end by itself. Once some have ended the server gets SIGTERM, and further
requests follow for as long as it listens. Scenarios:

    patient   no long ones, and time enough: all that was accepted has to be complete
    short     `drain_seconds` of 2: what is long ends with an error
    second    `drain_seconds` of 3600, and a second SIGTERM after a second

Each request that was accepted has to end with its whole answer, or with an error in OpenAI's format: status 503, or an
event and [DONE] where a stream had begun. What comes after SIGTERM has to be answered with 503, or finds that nobody
listens, or is reset at the end; a request that has sent half of its body gets 503 in the end. The exit code has to be
0. Printed: how each kind of request ended, and the seconds from the last answer to the end. Exit code 1 where that does
not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from processes import end_children_on_sigterm
from results_file import add_out, save, this_machine
from serving import Server

LONG = 15_000  #: tokens that no drain here waits for
LATE_S = 0.5  #: between two chunks, for who reads late
GRACE_S = 15.0  #: from the end of the drain to the end of the process
COMPLETE, REFUSED, EVENT, GONE = "complete", "status 503", "an error event", "nobody listens"
RESET = "reset"  #: the kernel had taken the connection, and the server ended before it did
HALF, LATER = "half a body", "after SIGTERM"
ERROR_KEYS = {"message", "type", "param", "code"}


class Scenario(NamedTuple):
    """How the server is ended."""

    drain_seconds: float
    long: bool  #: whether some answers are longer than the drain
    signals: int


SCENARIOS = {
    "patient": Scenario(600.0, long=False, signals=1),
    "short": Scenario(2.0, long=True, signals=1),
    "second": Scenario(3600.0, long=True, signals=2),
}


class Asked(NamedTuple):
    """One request."""

    kind: str
    path: str
    body: dict[str, Any]
    late: bool  #: whether it is read late

    @property
    def tokens(self) -> int:
        """Tokens of its whole answer."""
        return int(self.body["max_tokens"]) * int(self.body["n"])


def requests(count: int, long: bool, seed: int) -> list[Asked]:
    """The load, in a random order."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        text = "".join(rng.choices("abcdefgh ", k=rng.randint(1, 400)))
        stream, chat, flex = (bool(number & bit) for bit in (1, 2, 4))
        n = 3 if number % 5 == 0 else 1
        endless = long and number % 4 == rng.randrange(4)
        late = stream and rng.random() < 0.2
        tokens = LONG if endless else rng.randint(8, 64)
        body = {"max_tokens": tokens, "n": n, "ignore_eos": True, "stream": stream, "temperature": 1, "seed": number}
        body["service_tier"] = "flex" if flex else "default"
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        kind = "late stream" if late else "stream" if stream else "whole"
        kind += f", {'BE' if flex else 'LS'}{', long' if endless else ''}"
        found.append(Asked(kind, "/v1/chat/completions" if chat else "/v1/completions", body, late))
    rng.shuffle(found)
    return found


async def outcome(client: httpx.AsyncClient, asked: Asked) -> str:
    """How a request ended; in capitals where no request should."""
    try:
        async with client.stream("POST", asked.path, json=asked.body) as response:
            if response.status_code != 200:
                return _refused(response.status_code, await response.aread())
            if not asked.body["stream"]:
                return COMPLETE if _tokens(await response.aread()) == asked.tokens else "NOT COMPLETE"
            return await _streamed(response, asked)
    except httpx.ConnectError:
        return GONE
    except httpx.ReadError:
        return RESET
    except httpx.HTTPError as error:
        return f"NO ANSWER ({type(error).__name__})"


async def _streamed(response: httpx.Response, asked: Asked) -> str:
    """How a stream that had begun ended."""
    finished, error, last = 0, None, ""
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        last = line[6:]
        if last == "[DONE]":
            continue
        data = json.loads(last)
        error = data.get("error", error)
        finished += sum(choice["finish_reason"] is not None for choice in data.get("choices", []))
        if asked.late:
            await asyncio.sleep(LATE_S * random.random())
    if last != "[DONE]":
        return "CUT OFF"
    if error is not None:
        return EVENT if set(error) == ERROR_KEYS else "AN ERROR THAT IS NOT OPENAI'S"
    return COMPLETE if finished == asked.body["n"] else "NOT COMPLETE"


def _refused(status: int, content: bytes) -> str:
    try:
        error = json.loads(content)["error"]
        fine = status == 503 and set(error) == ERROR_KEYS
    except (ValueError, TypeError, KeyError):
        fine = False
    return REFUSED if fine else f"STATUS {status}"


def _tokens(content: bytes) -> int:
    return int(json.loads(content)["usage"]["completion_tokens"])


async def load(server: Server, scenario: Scenario, args: argparse.Namespace) -> Counter[tuple[str, str]]:
    """Send it all, and the signals in its middle; how many requests of each kind ended how."""
    ended: Counter[tuple[str, str]] = Counter()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:

        async def one(asked: Asked, kind: str | None = None) -> None:
            ended[kind or asked.kind, await outcome(client, asked)] += 1

        sent = requests(args.requests, scenario.long, args.seed)

        async def one_half() -> None:
            ended[HALF, await half(server.url)] += 1

        tasks = [asyncio.create_task(one(asked)) for asked in sent]
        tasks.append(asyncio.create_task(one_half()))
        wanted = sum(int(asked.body["n"]) for asked in sent)
        while await accepted(client) < wanted or ended.total() < args.requests // 10:
            await asyncio.sleep(0.01)
        later = [Asked(LATER, "/v1/completions", {"prompt": "a", "max_tokens": 1, "n": 1, "stream": False}, False)]
        for number in range(scenario.signals):
            await asyncio.sleep(number)
            server.signal(signal.SIGTERM)
            await asyncio.sleep(0.3)  # the server looks ten times a second
            tasks += [asyncio.create_task(one(asked)) for asked in later * 10]
        while server.popen.poll() is None and not all(task.done() for task in tasks):
            tasks += [asyncio.create_task(one(asked)) for asked in later]
            await asyncio.sleep(0.1)
        await asyncio.gather(*tasks)
    return ended


async def half(url: str) -> str:
    """How a request ends whose body never comes whole."""
    at = httpx.URL(url)
    reader, writer = await asyncio.open_connection(at.host, at.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    try:
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
        return _refused(int(head.split(b" ")[1]), content)
    except (OSError, IndexError):
        return "NO ANSWER"
    finally:
        writer.close()


async def accepted(client: httpx.AsyncClient) -> int:
    """Answers that the server began or has ended."""
    total = 0.0
    for line in (await client.get("/metrics")).text.splitlines():
        name = line.split("{")[0].removeprefix("qllm:")
        if name in ("requests_total", "num_requests_running", "num_requests_waiting", "num_requests_suspended"):
            total += float(line.rsplit(" ", 1)[1])
    return int(total)


def run(name: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """One scenario, its table printed; its rows, and whether all ended as it should."""
    scenario = SCENARIOS[name]
    queue = {"max_waiting": 10 * args.requests, "max_waiting_tokens": 10_000_000}
    settings = {
        "drain_seconds": scenario.drain_seconds,
        "body_timeout": 3600,  # half a body waits for the end, not for its timeout
        "engine": {"kv_blocks": 8192},
        "classes": {"ls": {"priority": 0, **queue}, "be": {"priority": 1, **queue}},
    }
    folder = args.work / name
    shutil.rmtree(folder, ignore_errors=True)
    with Server(args.model, folder, settings) as server:
        ended = asyncio.run(load(server, scenario, args))
        start, code = time.monotonic(), None
        with suppress(subprocess.TimeoutExpired):
            code = server.wait(GRACE_S)
        waited = time.monotonic() - start
    print(f"\n{name}: drain_seconds {scenario.drain_seconds:g}, {scenario.signals} x SIGTERM")
    wrong = report(ended)
    if not scenario.long and any(kind not in (HALF, LATER) and how != COMPLETE for kind, how in ended):
        wrong.append("not all that was accepted is complete")
    if code != 0:
        wrong.append(f"exit code {code}")
    print(f"exit code {code}, {waited:.1f} s after the last answer")
    for line in wrong:
        print(f"WRONG: {line}")
    rows = [{"scenario": name, "sent": kind, "outcome": how, "count": n} for (kind, how), n in sorted(ended.items())]
    return rows, not wrong


def report(ended: Counter[tuple[str, str]]) -> list[str]:
    """Print how many requests of each kind ended how; what should not have been."""
    beside = (HALF, LATER)
    kinds = sorted({kind for kind, _ in ended}, key=lambda kind: (kind in beside, kind))
    ways = sorted({how for _, how in ended})
    print(f"{'':22}", *(f"{how:>16}" for how in ways))
    for kind in kinds:
        print(f"{kind:22}", *(f"{ended[kind, how] or '':>16}" for how in ways))
    print(
        f"{'accepted, all':22}",
        *(f"{sum(ended[kind, how] for kind in kinds if kind not in beside):>16}" for how in ways),
    )
    fine = {HALF: {REFUSED}, LATER: {REFUSED, GONE, RESET}}
    usual = {COMPLETE, REFUSED, EVENT}
    return [f"{n} of {kind!r}: {how}" for (kind, how), n in ended.items() if how not in fine.get(kind, usual)]


def main() -> int:
    """All scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100, help="that are under way at the signal, about")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint with a chat template")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("out/drain"), help="folder of the servers' logs")
    add_out(parser, "server_drain")
    args = parser.parse_args()
    end_children_on_sigterm()
    found = {name: run(name, args) for name in args.scenarios}
    if args.out is not None:
        outcomes = [row for rows, _ in found.values() for row in rows]
        scenarios = [{"scenario": name, "as it should": fine} for name, (_, fine) in found.items()]
        tables = {"outcomes": outcomes, "scenarios": scenarios}
        save(args.out, source=f"measured on {this_machine()}", tables=tables)
    return 0 if all(fine for _, fine in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
