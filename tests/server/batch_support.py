"""For the tests of batches: inputs, a store that is opened again as after a crash, answers that are made up."""

from __future__ import annotations

import json
from typing import Any

from qllm.server.batches.store import Store

CHAT = "/v1/chat/completions"


def jsonl(lines: int, url: str = CHAT) -> bytes:
    """The input of a batch of so many lines, c1, c2 and so on."""
    body = {"model": "m", "messages": []}
    rows = ({"custom_id": f"c{i}", "method": "POST", "url": url, "body": {**body, "i": i}} for i in range(1, lines + 1))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def results(store: Store, file: str | None) -> list[dict[str, Any]]:
    """The lines of an output or error file."""
    return [] if file is None else [json.loads(line) for line in store.content(file).splitlines()]


def answered(store: Store, id: str) -> dict[str, dict[str, Any]]:
    """By custom id what a batch's files say of each line; no line stands there twice."""
    batch = store.batch(id)
    lines = results(store, batch["output_file_id"]) + results(store, batch["error_file_id"])
    by_id = {line["custom_id"]: line for line in lines}
    assert len(by_id) == len(lines)
    return by_id
