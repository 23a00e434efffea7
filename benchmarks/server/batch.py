"""Interactive requests beside a batch, and a batch whose server is killed.

    python benchmarks/server/batch.py [--policy slack] [--lines 2000] [--seconds 120] [--rounds 2] [--rate 1]
        [--out docs/results/batch.json]
    python benchmarks/server/batch.py --rounds 0 --tiny [--out docs/results/server_kill.json]

`qllm serve` on the checkpoint of `tools/make_moe.py`, with a chat template. Interactive requests are LS: prompts of
32-128 tokens, 16 tokens out, Poisson. A batch is two: half of the lines to completions, half to chats, with prompts of
64-256 tokens and 16-50 out.

1. Each round sends the same requests twice: to the idle server, then while a batch runs. At the end of the round the
   batch is cancelled. Printed: TTFT from the moment that the schedule says, TPOT, lines answered per second, and the
   ratio of the TTFTs, of the percentiles and request by request. The column "others" holds the cores that other
   processes kept busy meanwhile.
2. A batch runs; once half of it is answered the server is killed (SIGKILL) and started again on the same folder. In
   the end each line must have exactly one answer, of the length that it asked for.

`--tiny` serves a tiny model, for the second part, where no number depends on speed.

Exit code 1 where a line is lost or answered twice or wrongly, where a request fails, or where a batch ends before its
round does (give it more lines).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mixed_load import percentile
from processes import Cores, end_children_on_sigterm
from results_file import add_out, save, this_machine
from serving import Server, chat_checkpoint

from qllm.executor.testing import CHECKPOINT_VOCAB

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
NEW_TOKENS = 16  #: of an interactive request
OPEN = {"validating", "in_progress", "finalizing", "cancelling"}  #: the statuses of a batch that has not ended
PATIENCE_S = 1800.0  #: in which a batch has to come to its end


@dataclass(frozen=True)
class Timed:
    """One interactive request: when its tokens came, in seconds from the moment that the schedule says."""

    ttft: float
    tpot: float


@dataclass(frozen=True)
class Window:
    """Interactive requests in a stretch of time, and the lines of batches that were answered meanwhile."""

    name: str
    requests: list[Timed]
    lines: int
    seconds: float
    other_cores: float  #: that processes but the server and this one kept busy

    def row(self) -> dict[str, Any]:
        """Percentiles in milliseconds, and lines per second."""
        row: dict[str, Any] = {"window": self.name, "requests": len(self.requests)}
        for name in ("ttft", "tpot"):
            values = [1000 * getattr(request, name) for request in self.requests]
            row |= {f"{name}_p{q}_ms": percentile(values, q) for q in (50, 90, 99)}
        return row | {"lines_per_s": self.lines / self.seconds, "other_cores": self.other_cores}


def words(rng: random.Random, low: int, high: int) -> str:
    """A prompt of that many tokens: the checkpoint's tokenizer splits at spaces."""
    return " ".join(f"t{rng.randrange(2, CHECKPOINT_VOCAB)}" for _ in range(rng.randint(low, high)))


def schedule(seed: int, rate: float, seconds: float) -> list[tuple[float, str]]:
    """(seconds, prompt) of the interactive requests."""
    rng, at = random.Random(seed), 0.0
    found: list[tuple[float, str]] = []
    while (at := at + rng.expovariate(rate)) < seconds:
        found.append((at, words(rng, 32, 128)))
    return found


def batch_lines(seed: int, count: int) -> dict[str, list[dict[str, Any]]]:
    """The lines of a batch, by endpoint."""
    rng = random.Random(seed)
    lines: dict[str, list[dict[str, Any]]] = {COMPLETIONS: [], CHATS: []}
    for number in range(count):
        prompt, url = words(rng, 64, 256), (COMPLETIONS, CHATS)[number % 2]
        asked = {"prompt": prompt} if url == COMPLETIONS else {"messages": [{"role": "user", "content": prompt}]}
        body = {**asked, "max_tokens": rng.randint(16, 50), "temperature": 0, "ignore_eos": True}
        lines[url].append({"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body})
    return lines


class Batches:
    """A batch of that many lines: one of the API's for each endpoint."""

    def __init__(self, client: httpx.Client, seed: int, count: int):
        self.lines = batch_lines(seed, count)
        self.ids: list[str] = []
        for url, lines in self.lines.items():
            content = "".join(f"{json.dumps(line)}\n" for line in lines)
            file = told(client.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"}))
            asked = {"input_file_id": file["id"], "endpoint": url, "completion_window": "24h"}
            self.ids.append(told(client.post("/v1/batches", json=asked))["id"])

    def states(self, client: httpx.Client) -> list[dict[str, Any]]:
        """Both as the API shows them."""
        return [told(client.get(f"/v1/batches/{id}")) for id in self.ids]

    def answered(self, client: httpx.Client) -> int:
        """Lines that have an answer."""
        counts = [state["request_counts"] for state in self.states(client)]
        return sum(count["completed"] + count["failed"] for count in counts)

    def wait_until(self, client: httpx.Client, answered: int) -> None:
        """Return once so many lines are answered."""
        end = time.monotonic() + PATIENCE_S
        while self.answered(client) < answered:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.answered(client)} lines were answered within {PATIENCE_S:g} s")
            time.sleep(0.5)

    def wait_for_end(self, client: httpx.Client) -> set[str]:
        """Return how both ended, once they have."""
        end = time.monotonic() + PATIENCE_S
        while (statuses := {state["status"] for state in self.states(client)}) & OPEN:
            if time.monotonic() > end:
                raise TimeoutError(f"the batch is {statuses} after {PATIENCE_S:g} s")
            time.sleep(0.5)
        return statuses

    def cancel(self, client: httpx.Client) -> None:
        """End what has not ended; returns once it has."""
        for id in self.ids:
            client.post(f"/v1/batches/{id}/cancel")  # status 409 where it has
        self.wait_for_end(client)


def told(response: httpx.Response) -> dict[str, Any]:
    """The JSON of an answer. Raises httpx.HTTPStatusError."""
    response.raise_for_status()
    found: dict[str, Any] = response.json()
    return found


async def interactive(url: str, asked: Sequence[tuple[float, str]], seconds: float) -> list[Timed]:
    """Send requests by their schedule; in their order, when their tokens came. Raises where one fails."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        start = time.perf_counter()

        async def one(at: float, prompt: str) -> Timed:
            await asyncio.sleep(start + at - time.perf_counter())
            body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
            times: list[float] = []
            async with client.stream("POST", COMPLETIONS, json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["finish_reason"] is None:
                        times.append(time.perf_counter() - start - at)
            if len(times) != NEW_TOKENS:
                raise RuntimeError(f"an interactive request got {len(times)} tokens of {NEW_TOKENS}")
            return Timed(times[0], (times[-1] - times[0]) / (NEW_TOKENS - 1))

        found = await asyncio.gather(*(one(at, prompt) for at, prompt in asked))
        await asyncio.sleep(max(0.0, start + seconds - time.perf_counter()))
        return found


def window(
    name: str, server: Server, asked: Sequence[tuple[float, str]], seconds: float, answered: Callable[[], int] = int
) -> Window:
    """Send requests for so many seconds. `answered` says how many lines of a batch are; by default 0."""
    before, start, cores = answered(), time.perf_counter(), Cores(server.pid)
    times = asyncio.run(interactive(server.url, asked, seconds))
    lines, took = answered() - before, time.perf_counter() - start
    return Window(name, times, lines, took, cores.used()[1])


def measure(server: Server, args: argparse.Namespace) -> tuple[list[Window], list[str]]:
    """Windows in turn, idle and beside a batch; and what went wrong."""
    windows: list[Window] = []
    wrong: list[str] = []
    with httpx.Client(base_url=server.url, timeout=120) as client:
        asyncio.run(interactive(server.url, schedule(99, 4.0, 3.0), 3.0))  # warms up
        for number in range(1, args.rounds + 1):
            asked = schedule(args.seed + number, args.rate, args.seconds)
            windows.append(window(f"idle {number}", server, asked, args.seconds))
            batch = Batches(client, args.seed + number, args.lines)
            batch.wait_until(client, 1)
            answered = partial(batch.answered, client)
            windows.append(window(f"beside {number}", server, asked, args.seconds, answered))
            if answered() == args.lines:
                wrong.append(f"the batch of round {number} ended before the round did: give it more --lines")
            batch.cancel(client)
    return windows, wrong


def report(windows: Sequence[Window]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Print the table and the ratios; return them."""
    rows = [window.row() for window in windows]
    pooled: dict[str, list[Timed]] = {}
    for kind in ("idle", "beside"):
        mine = [window for window in windows if window.name.startswith(kind)]
        pooled[kind] = [request for window in mine for request in window.requests]
        lines, seconds = sum(window.lines for window in mine), sum(window.seconds for window in mine)
        others = sum(window.other_cores * window.seconds for window in mine) / seconds
        rows.append(Window(f"{kind}, all", pooled[kind], lines, seconds, others).row())
    names = [name for name in rows[0] if name.endswith("_ms")]
    heads = [name.removesuffix("_ms") for name in names]
    print(f"{'':12} {'requests':>8}", *(f"{head:>9}" for head in heads), f"{'lines/s':>8} {'others':>7}")
    for row in rows:
        cells = [f"{row[name]:>9.1f}" for name in names]
        speed, others = row["lines_per_s"], row["other_cores"]
        print(f"{row['window']:12} {row['requests']:>8}", *cells, f"{speed:>8.2f} {others:>7.2f}")
    idle, beside = rows[-2:]
    ratios = {head: beside[name] / idle[name] for head, name in zip(heads, names, strict=True)}
    print(f"{'ratio':12} {'':>8}", *(f"{ratio:>9.2f}" for ratio in ratios.values()))
    each = [b.ttft / a.ttft for a, b in zip(pooled["idle"], pooled["beside"], strict=True)]
    by_request = {f"p{q}": percentile(each, q) for q in (50, 90, 99)}
    print("TTFT beside by idle, request by request:", ", ".join(f"{q} {ratio:.2f}" for q, ratio in by_request.items()))
    return rows, ratios | {f"each_{q}": ratio for q, ratio in by_request.items()}


def killed(model: Path, folder: Path, settings: dict[str, Any], args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """A batch whose server is killed in its middle: counts, and how many lines are not as they should be."""
    with Server(model, folder, settings) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        start = time.monotonic()
        batch = Batches(client, args.seed, args.lines)
        batch.wait_until(client, args.lines // 2)
        before = batch.answered(client)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(60)
    with Server(model, folder, settings) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        kept = batch.answered(client)
        statuses = batch.wait_for_end(client)
        took = time.monotonic() - start
        states = batch.states(client)
        files = [state[f"{kind}_file_id"] for kind in ("output", "error") for state in states]
        texts = [client.get(f"/v1/files/{file}/content").raise_for_status().text for file in files if file is not None]
    answers = [json.loads(line) for text in texts for line in text.splitlines()]
    times = Counter(answer["custom_id"] for answer in answers)
    asked = {line["custom_id"]: line["body"]["max_tokens"] for lines in batch.lines.values() for line in lines}
    got = {answer["custom_id"]: _tokens(answer) for answer in answers}
    counts = {
        "lines": args.lines,
        "answers": len(answers),
        "lost": sum(id not in times for id in asked),
        "more than once": sum(count > 1 for count in times.values()),
        "unknown": sum(id not in asked for id in times),
        "not as asked": sum(id in got and got[id] != tokens for id, tokens in asked.items()),
        "counted by the API": sum(state["request_counts"]["completed"] for state in states),
        "answered before the kill": before,
        "seconds": took,
    }
    bad = sum(int(counts[name]) for name in ("lost", "more than once", "unknown", "not as asked"))
    if counts["counted by the API"] != args.lines or kept < before or statuses != {"completed"}:
        print(f"{before} answers before the kill, {kept} after it; in the end the batch was {', '.join(statuses)}")
        bad += 1
    return counts, bad


def _tokens(answer: dict[str, Any]) -> int | None:
    """How many tokens an answer has; None: it is none."""
    response = answer["response"]
    if response is None or response["status_code"] != 200:
        return None
    tokens: int = response["body"]["usage"]["completion_tokens"]
    return tokens


def main() -> int:
    """Measure, then kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="where the checkpoint is, or is made; default: out/moe, out/tiny")
    parser.add_argument("--tiny", action="store_true", help="make a tiny one")
    parser.add_argument("--policy", default="slack")
    parser.add_argument("--lines", type=int, default=2000, help="of a batch")
    parser.add_argument("--in-flight", type=int, default=16, help="lines that are answered at the same time")
    parser.add_argument("--seconds", type=float, default=120.0, help="of a window")
    parser.add_argument("--rounds", type=int, default=2, help="of an idle window and one beside a batch; 0: only kill")
    parser.add_argument("--rate", type=float, default=1.0, help="interactive requests per second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-kill", action="store_true", help="leave the second part out")
    parser.add_argument("--work", type=Path, default=Path("out/batch"), help="folder of the server's state and log")
    add_out(parser, "batch")
    args = parser.parse_args()
    end_children_on_sigterm()
    made = args.model or Path("out/tiny" if args.tiny else "out/moe")
    model = chat_checkpoint(args.work / made.name, made, tiny=args.tiny)
    state = args.work / "state"
    shutil.rmtree(state, ignore_errors=True)
    settings = {"policy": args.policy, "batches": {"folder": str(state.resolve()), "in_flight": args.in_flight}}
    tables: dict[str, Any] = {}
    wrong: list[str] = []
    if args.rounds:
        with Server(model, args.work, settings) as server:
            windows, wrong = measure(server, args)
        tables["windows"], ratios = report(windows)
        tables["ratios"] = [ratios]
    if not args.no_kill:
        counts, bad = killed(model, args.work, settings, args)
        print("killed in the middle:", ", ".join(f"{name} {value:.0f}" for name, value in counts.items()))
        tables["killed"] = [counts]
        wrong += [f"{bad} things are not as they should be after the kill"] if bad else []
    for line in wrong:
        print(f"WRONG: {line}")
    if args.out is not None:
        save(args.out, source=f"measured on {this_machine()}", tables=tables)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
