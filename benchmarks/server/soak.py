"""The server under many clients, of whom some leave, and under bodies that are none.

    python benchmarks/server/soak.py [--minutes 2] [--streams 200] [--leaving 0.2] [--malformed 1000]

`qllm serve` on the small random MoE in a process of its own; clients stream greedy completions over loopback. Each
answer that is read to its end must be the one that the server gave when it was asked alone: nothing lost, nothing
doubled. Then malformed requests: each must be answered with a 4xx, and the next good one with 200. At the end nothing
may run, wait or hold KV. Printed: answers by outcome, requests/s, memory of the server before and after. Exit code 1
where anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from processes import free_port

PROMPTS = 24
NEW_TOKENS = (1, 24)
GAUGES = ("num_requests_running", "num_requests_waiting", "num_requests_suspended", "kv_cache_usage_perc")


def body(number: int, **more: object) -> dict[str, object]:
    """A request for the completion of prompt `number`."""
    rng = random.Random(number)
    prompt = "".join(rng.choices("abcdefgh ", k=rng.randint(1, 300)))
    tokens = rng.randint(*NEW_TOKENS)
    return {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} | more


def malformed(rng: random.Random) -> tuple[bytes, dict[str, str]]:
    """A body that no server should take, and its headers."""
    kind = {"content-type": "application/json"}
    good = body(0)
    odd = rng.choice([None, -1, 1.5, "x", [], {}, True, 10**400, "\ud800", [[["a"]]], {"a": 1}])
    name = rng.choice(["prompt", "max_tokens", "temperature", "n", "stop", "seed", "logit_bias", "priority"])
    text = json.dumps(good | {name: odd})
    return rng.choice(
        [
            (b"", kind),
            (b"{", kind),
            (rng.randbytes(rng.randint(1, 200)), kind),
            (b"[" * 5000, kind),
            (json.dumps([good]).encode(), kind),
            (json.dumps(good | {"unknown": 1}).encode(), kind),
            (json.dumps(good | {"max_tokens": -1}).encode(), kind),
            (json.dumps(good | {"model": "no such"}).encode(), kind),
            (json.dumps(good | {"prompt": "a" * 200_000}).encode(), kind),
            (text[: rng.randrange(len(text))].encode(errors="replace"), kind),
        ]
    )


async def stream(client: httpx.AsyncClient, number: int, leave: int | None, right: dict[int, str]) -> str:
    """The outcome of one stream, which is left after `leave` chunks, if it is."""
    text, chunks = "", 0
    tier = "flex" if number % 3 else "default"
    async with client.stream("POST", "/v1/completions", json=body(number, stream=True, service_tier=tier)) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return f"status {answer.status_code}"
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return "complete" if text == right[number] else "WRONG"
            if line.startswith("data: "):
                choices = json.loads(line[6:]).get("choices", [])
                text += choices[0]["text"] if choices else ""
                chunks += 1
                if leave is not None and chunks >= leave:
                    return "left"
    return "CUT OFF"


async def clients(url: str, args: argparse.Namespace) -> Counter[str]:
    """Outcomes of all that the clients asked for."""
    outcomes: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        right = {}
        for number in range(PROMPTS):
            answer = await client.post("/v1/completions", json=body(number))
            right[number] = answer.json()["choices"][0]["text"]
        end = time.monotonic() + 60 * args.minutes

        async def one(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < end:
                leave = rng.randint(1, 4) if rng.random() < args.leaving else None
                outcomes[await stream(client, rng.randrange(PROMPTS), leave, right)] += 1

        await asyncio.gather(*(one(seed) for seed in range(args.streams)))
        rng = random.Random(0)
        for _ in range(args.malformed):
            content, headers = malformed(rng)
            answer = await client.post("/v1/completions", content=content, headers=headers)
            fine = 400 <= answer.status_code < 500
            outcomes["malformed: 4xx" if fine else f"MALFORMED: {answer.status_code} for {content[:60]!r}"] += 1
            if rng.random() < 0.1:
                good = await client.post("/v1/completions", json=body(1))
                outcomes[
                    "good after malformed" if good.json()["choices"][0]["text"] == right[1] else "GOOD: WRONG"
                ] += 1
    return outcomes


def gauges(url: str) -> dict[str, float]:
    """What runs, waits, is suspended and is held, summed over classes."""
    found = dict.fromkeys(GAUGES, 0.0)
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        name = line.split("{")[0].split(" ")[0].removeprefix("qllm:")
        if name in found:
            found[name] += float(line.rsplit(" ", 1)[1])
    return found


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main() -> int:
    """Run the server and its clients."""
    parser = argparse.ArgumentParser(description="The server under many clients, of whom some leave.")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--leaving", type=float, default=0.2, help="share of streams that are left before their end")
    parser.add_argument("--malformed", type=int, default=1000)
    args = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "qllm", "serve", "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        before, start = resident_mb(server.pid), time.monotonic()
        outcomes = asyncio.run(clients(url, args))
        took = time.monotonic() - start
        time.sleep(2)
        left, after = gauges(url), resident_mb(server.pid)
    finally:
        server.terminate()
        server.wait(60)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:>7}  {outcome}")
    print(
        f"{sum(outcomes.values()) / took:.1f} requests/s in {took:.0f} s; memory {before:.0f} MB, then {after:.0f} MB"
    )
    print("left at the end:", ", ".join(f"{name} {value:g}" for name, value in left.items()))
    print(f"the server ended with exit code {server.returncode}")
    wrong = [outcome for outcome in outcomes if outcome.isupper() or outcome.split(":")[0].isupper()]
    return 1 if wrong or any(left.values()) or server.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
