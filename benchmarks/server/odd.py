"""Requests that no server should take: malformed, oversized, slow and half-closed ones, as bytes on a socket."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

GOOD: dict[str, Any] = {"model": "m", "prompt": "abc", "max_tokens": 2, "temperature": 0}
DRIP_S = 0.05  #: between two of the bytes of who is slow
PATIENCE_S = 60.0  #: in which the server has to answer, or to close the connection
DROPPED = "dropped"


@dataclass(frozen=True)
class Odd:
    """One request.

    Attributes:
        kind: what is wrong with it, for reports.
        parts: its bytes, which are sent one after the other; then nothing more comes.
        pause: seconds between two parts.
        half: whether its client then closes its direction of the connection.
        whole: whether it is a good one until then, which may be answered.
    """

    kind: str
    parts: list[bytes]
    pause: float = 0.0
    half: bool = False
    whole: bool = False


def request(body: bytes, length: int | None = None, headers: str = "") -> bytes:
    """A POST of `body`, which says that it has `length` bytes."""
    said = len(body) if length is None else length
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {said}\r\n"
    return f"{head}Connection: close\r\n{headers}\r\n".encode() + body


def malformed(rng: random.Random) -> Odd:
    """A body that is no request."""
    text = json.dumps(GOOD)
    name, value = rng.choice(
        [
            ("prompt", None),
            ("prompt", [[["a"]]]),
            ("max_tokens", -1),
            ("max_tokens", 1.5),
            ("temperature", "x"),
            ("n", 0),
            ("stop", {}),
            ("seed", 10**400),
            ("logit_bias", [1]),
            ("priority", True),
            ("unknown", 1),
            ("model", "no such"),
            ("stream_options", {}),
            ("user", "\ud800"),
        ]
    )
    body = rng.choice(
        [
            b"",
            b"{",
            rng.randbytes(rng.randint(1, 200)),
            b"[" * 5000,
            json.dumps([GOOD]).encode(),
            text[: rng.randrange(len(text))].encode(),
            json.dumps(GOOD | {name: value}).encode(),
            json.dumps(GOOD | {name: value}).encode(),
        ]
    )
    return Odd("malformed", [request(body)])


def oversized(rng: random.Random) -> Odd:
    """More than the server takes: a body, what it says of its length, a prompt, a header."""
    mebibyte = b"a" * (1 << 20)
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    parts = rng.choice(
        [
            [request(b"{", length=1 << 40)],
            [chunked, *[b"100000\r\n" + mebibyte + b"\r\n"] * 10],
            [request(json.dumps(GOOD | {"prompt": "a" * 200_000}).encode())],
            [request(json.dumps(GOOD | {"prompt": [1] * 100_000}).encode())],
            [request(b"{}", headers=f"X-Long: {'a' * 200_000}\r\n")],
        ]
    )
    return Odd("oversized", parts)


def slow(rng: random.Random) -> Odd:
    """A head or a body whose bytes drip, and then stay away."""
    whole = request(json.dumps(GOOD).encode())
    begins = whole.index(b"\r\n\r\n") + 4
    stop = rng.randrange(1, begins - 1) if rng.random() < 0.5 else rng.randrange(begins, len(whole))
    first = max(0, stop - rng.randint(1, 20))
    return Odd("slow", [whole[:first], *(whole[at : at + 1] for at in range(first, stop))], DRIP_S)


def half_closed(rng: random.Random) -> Odd:
    """A request in whose middle, or at whose end, the client says that nothing more comes."""
    whole = request(json.dumps(GOOD | {"max_tokens": 200, "stream": True, "ignore_eos": True}).encode())
    if rng.random() < 0.5:
        return Odd("whole, then half-closed", [whole], half=True, whole=True)
    return Odd("half-closed", [whole[: rng.randrange(len(whole))]], half=True)


KINDS: tuple[Callable[[random.Random], Odd], ...] = (malformed, oversized, slow, half_closed)


def odd_requests(count: int, seed: int) -> Iterator[Odd]:
    """So many of them: half malformed, the rest of the other kinds."""
    rng = random.Random(seed)
    for _ in range(count):
        yield rng.choices(KINDS, (3, 1, 1, 1))[0](rng)


async def outcome(url: str, odd: Odd) -> str:
    """What became of it: a status of 4xx or DROPPED; in capitals what should not be."""
    at = httpx.URL(url)
    reader, writer = await asyncio.open_connection(at.host, at.port)
    answer = asyncio.create_task(reader.read())
    try:
        with suppress(ConnectionError):  # it was answered, or dropped, before all was sent
            for part in odd.parts:
                if answer.done():
                    break
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(odd.pause)
            if odd.half:
                writer.write_eof()
        told = await asyncio.wait_for(answer, PATIENCE_S)
    except ConnectionError:
        return DROPPED
    except TimeoutError:
        return "NEITHER ANSWERED NOR DROPPED"
    finally:
        answer.cancel()
        writer.close()
    if not told:
        return DROPPED
    status = told.split(b" ", 2)[1].decode(errors="replace")
    return status if status.startswith("4") or (odd.whole and status == "200") else f"STATUS {status}"
