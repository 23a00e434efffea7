"""The server under requests that schemathesis draws from its OpenAPI document.

    python -m venv FOLDER && FOLDER/bin/pip install schemathesis==4.32.5
    python benchmarks/server/fuzz.py --schemathesis FOLDER/bin/schemathesis [--examples 500] [--minutes 10]
        [--out docs/results/server_fuzz.json]

`qllm serve` on the small random MoE in a process of its own, with batches. Each route is sent requests that fit its
description and requests that do not. No answer may be a 5xx, or be of a status, a content type or a shape that the
document does not tell; a body that breaks the document may not be taken. Then a completion must be answered, and
nothing may run, wait or hold KV. Exit code 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from results_file import add_out, save, this_machine

from benchmarks.server.serving import Server
from benchmarks.server.soak import held_at_the_end

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


def answers(events: Path) -> Counter[str]:
    """How many answers had which status, by schemathesis's own report."""
    return Counter(re.findall(r'"status_code":(\d+)', events.read_text(encoding="utf-8")))


def main() -> int:
    """Run the server and schemathesis."""
    parser = argparse.ArgumentParser(description="The server under requests that its OpenAPI document describes.")
    parser.add_argument("--schemathesis", required=True, help="its command, from an environment of its own")
    parser.add_argument("--examples", type=int, default=500, help="of each kind, for each operation")
    parser.add_argument("--minutes", type=float, help="after which the fuzzing ends; default: at its last example")
    parser.add_argument("--seed", type=int, default=1)
    add_out(parser, "server_fuzz")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"engine": {"kv_blocks": 16}, "batches": {"folder": f"{folder}/batches"}}
        with Server(None, Path(folder), settings) as server:
            command = [args.schemathesis, "run", f"{server.url}/openapi.json", "--checks", ",".join(CHECKS)]
            command += ["--max-examples", str(args.examples), "--seed", str(args.seed)]
            command += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "60", "--no-color"]
            if args.minutes is not None:
                command += ["--max-time", str(round(60 * args.minutes))]
            command += ["--report", "ndjson", "--report-ndjson-path", f"{folder}/events"]
            found = subprocess.run(command, cwd=folder, check=False).returncode
            statuses = answers(Path(folder, "events"))
            good = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 4}, timeout=60)
            left = held_at_the_end(server.url)
    print("answers:", ", ".join(f"{n} x {status}" for status, n in sorted(statuses.items())))
    print("a good request after them:", good.status_code)
    print("left at the end:", ", ".join(f"{name} {value:g}" for name, value in left.items()))
    if args.out is not None:
        rows = [{"status": status, "count": n} for status, n in sorted(statuses.items())]
        facts = {"schemathesis exit code": found, "good request after it": good.status_code} | left
        save(args.out, source=f"measured on {this_machine()}", tables={"answers": rows, "facts": [facts]})
    return 1 if found or good.status_code != 200 or any(left.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
