"""Long best-effort prompts beside short latency-sensitive ones: this engine under each policy, vLLM under its settings.

    python benchmarks/mixed_load.py [--vllm-python VENV/bin/python] [--seconds 60] [--seeds 1 2] [--policies ...]
        [--out docs/results/mixed_load.json]

The checkpoint of `tools/make_moe.py`, float32. BE: prompts of 4,096 tokens at 0.6/s, 8 output tokens; LS: 32-128
tokens at 1/s, 16 output tokens; open loop, the same times and token ids for everybody. Each row is a process of its
own; all rows run once for a seed, in an order of its own, one at a time; requests of all seeds are pooled. "Alone": LS
requests one at a time on the idle engine, before the load. Times count from the moment that the schedule says.

This engine is measured in its process, from submission to token; vLLM through its OpenAI server, by the client that
`--client` names. The rows of vLLM are left out where either is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from processes import Cores, EngineFailed, Process, end_children_on_sigterm, why_no_vllm
from results_file import add_out, save, this_machine

from qllm.executor.testing import CHECKPOINT_VOCAB, make_checkpoint

LS = {"cls": "LS", "prio": 0, "rate": 1.0, "prompt": (32, 128), "out": 16}
BE = {"cls": "BE", "prio": 1, "rate": 0.6, "prompt": (4096, 4096), "out": 8}
PAPER = {"fill_tokens": 0, "resume": "prefill"}
OURS: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "priority": {},
    "chunked": {},
    "layer": PAPER,
    "qllm": PAPER,
    "hybrid": {},
    "slack": {},
}
VLLM: dict[str, list[str]] = {
    "vllm-fcfs": ["--scheduling-policy", "fcfs"],
    "vllm-priority": ["--scheduling-policy", "priority"],
    "vllm-priority-256": ["--scheduling-policy", "priority", "--long-prefill-token-threshold", "256"],
}
VLLM_TOKENS = "2048"  # --max-num-batched-tokens
PORT = 8911
START_UP = 300.0  # seconds that vLLM's server may take

Requests = list[dict[str, Any]]


def one(cls: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    n = rng.randint(*cls["prompt"])
    out = rng.randint(cls["out"], cls["out"])
    prompt = [rng.randrange(2, CHECKPOINT_VOCAB) for _ in range(n)]
    return {"cls": cls["cls"], "prio": cls["prio"], "nout": out, "prompt": prompt, "nprompt": n}


def arrivals(cls: dict[str, Any], seed: int, seconds: float) -> Requests:
    """round(rate * seconds) requests at sorted uniform times: a Poisson process given its count. The draws, in number
    and order, are those of the client that loads vLLM; `check_same_load` compares."""
    times = random.Random(f"{seed}-{cls['cls']}-times")
    contents = random.Random(f"{seed}-{cls['cls']}-contents")
    at = sorted(times.uniform(0, seconds) for _ in range(round(cls["rate"] * seconds)))
    return [one(cls, contents) | {"sched": t} for t in at]


def check_same_load(load: Requests, measured: Requests) -> None:
    sent, meant = ([(r["cls"], round(r["sched"], 5), r["nprompt"]) for r in rs] for rs in (measured, load))
    if sent != meant:
        raise SystemExit("the client drew another load than this script: compare `arrivals` in both")


def run_ours(row: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run of this engine: requests of the load with their times, those alone, cores of others."""
    load = sorted(arrivals(LS, seed, args.seconds) + arrivals(BE, seed, args.seconds), key=lambda r: r["sched"])
    rng = random.Random(f"{seed}-isolated")
    question = {
        "policy": row,
        "settings": OURS[row],
        "max_step": args.max_step,
        "warmup": [one(cls, rng) for cls in (LS, BE, LS, BE)],
        "isolated": [one(LS, rng) for _ in range(args.isolated)],
        "load": load,
    }
    worker = str(Path(__file__).with_name("mixed_load_worker.py"))
    command = [sys.executable, worker, str(args.model), str(args.threads)]
    with Process(command, args.logs / f"{row}.log", {"OMP_NUM_THREADS": str(args.threads)}, pipes=True) as process:
        cores = Cores(process.pid)
        answer = process.ask(question)
        others = cores.used()[1]
    for r, times in zip(load, answer["load"], strict=True):
        r |= times
        del r["prompt"]
        r["ok"] = r["tokens"] == r["nout"]
    return {"requests": load, "alone": [r["first"] for r in answer["isolated"]], "other_cores": others}


def run_vllm(row: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The same of vLLM's server."""
    out = args.logs / f"{row}-{seed}.json"
    server = [str(args.vllm_python.absolute()), "-m", "vllm.entrypoints.openai.api_server"]
    server += ["--model", str(args.model), "--served-model-name", "m", "--dtype", "float32", "--port", str(PORT)]
    server += ["--max-model-len", "8192", "--max-num-batched-tokens", VLLM_TOKENS, "--gpu-memory-utilization", "0.3"]
    env = {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_KVCACHE_SPACE": "2"}
    with Process([*server, *VLLM[row]], args.logs / f"{row}.log", env) as process:
        wait_for(f"http://127.0.0.1:{PORT}/health", process)
        client = [sys.executable, str(args.client), "--base-url", f"http://127.0.0.1:{PORT}", "--out", str(out)]
        client += ["--ls-rate", str(LS["rate"]), "--be-rate", str(BE["rate"]), "--ls-out", str(LS["out"])]
        client += ["--be-prompt", str(BE["prompt"][0]), "--be-out", str(BE["out"]), "--vocab", str(CHECKPOINT_VOCAB)]
        client += ["--duration", str(args.seconds), "--seed", str(seed), "--isolated", str(args.isolated)]
        client += ["--server-pid", str(process.pid)]
        with Process(client, args.logs / f"{row}-client.log") as load:
            if load.popen.wait() or not out.exists():
                raise EngineFailed(f"client ended with {load.popen.returncode}, see {load.log}")
    answer = json.loads(out.read_text())
    meant = sorted(arrivals(LS, seed, args.seconds) + arrivals(BE, seed, args.seconds), key=lambda r: r["sched"])
    check_same_load(meant, answer["requests"])
    for r in answer["requests"]:
        if r["ok"]:
            r["first"] -= r["sched"]
            r["last"] -= r["sched"]
    isolated = answer["isolated_LS"]
    alone = [isolated[f"ttft_{key}_ms"] / 1e3 for key in ("p50", "p99")]
    return {"requests": answer["requests"], "alone_p50_p99": alone, "other_cores": answer["cpu"]["foreign_cores"]}


def wait_for(url: str, process: Process) -> None:
    end = time.monotonic() + START_UP
    while time.monotonic() < end:
        if process.popen.poll() is not None:
            raise EngineFailed(f"server ended with {process.popen.returncode}, see {process.log}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise EngineFailed(f"server gave no answer within {START_UP:.0f} s, see {process.log}")


def percentile(values: Iterable[float], q: float) -> float:
    """Linear interpolation between ranks; nan of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    at = (len(ordered) - 1) * q / 100
    low = int(at)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (at - low)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.fmean(values) if values else math.nan


def summarise(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of one row, seconds and requests per second; requests of all its runs pooled."""
    good = [r for run in runs for r in run["requests"] if r["ok"]]
    ls, be = ([r for r in good if r["cls"] == cls] for cls in ("LS", "BE"))
    if "alone" in runs[0]:
        alone = [t for run in runs for t in run["alone"]]
        alone_p50, alone_p99 = percentile(alone, 50), percentile(alone, 99)
    else:  # the client gives percentiles only
        alone_p50, alone_p99 = (mean(run["alone_p50_p99"][i] for run in runs) for i in (0, 1))
    makespan = sum(max((r["sched"] + r["last"] for r in run["requests"] if r["ok"]), default=math.nan) for run in runs)
    ttft = [r["first"] for r in ls]
    return {
        "ls_ttft_mean": mean(ttft),
        "ls_ttft_p50": percentile(ttft, 50),
        "ls_ttft_p99": percentile(ttft, 99),
        "alone_p50": alone_p50,
        "alone_p99": alone_p99,
        "p99_to_alone": percentile(ttft, 99) / alone_p50,
        "ls_tpot": mean((r["last"] - r["first"]) / (r["nout"] - 1) for r in ls),
        "be_tpot": mean((r["last"] - r["first"]) / (r["nout"] - 1) for r in be),
        "blocking_p99": percentile((r["first_launch"] for r in ls if "first_launch" in r), 99),
        "be_turnaround": mean(r["last"] for r in be),
        "requests_per_s": len(good) / makespan,
        "be_per_s": len(be) / makespan,
        "failed": sum(len(run["requests"]) for run in runs) - len(good),
        "other_cores": mean(run["other_cores"] for run in runs),
    }


COLUMNS: list[tuple[str, str, Callable[[float], str]]] = [
    ("ls_ttft_mean", "TTFT mean", lambda s: f"{1e3 * s:.0f}"),
    ("ls_ttft_p50", "p50", lambda s: f"{1e3 * s:.0f}"),
    ("ls_ttft_p99", "p99", lambda s: f"{1e3 * s:.0f}"),
    ("alone_p50", "alone p50", lambda s: f"{1e3 * s:.0f}"),
    ("alone_p99", "alone p99", lambda s: f"{1e3 * s:.0f}"),
    ("p99_to_alone", "p99/alone", lambda x: f"{x:.1f}x"),
    ("ls_tpot", "TPOT", lambda s: f"{1e3 * s:.0f}"),
    ("blocking_p99", "blocking p99", lambda s: "-" if math.isnan(s) else f"{1e3 * s:.1f}"),
    ("be_turnaround", "BE turnaround", lambda s: f"{s:.2f} s"),
    ("be_tpot", "BE TPOT", lambda s: f"{1e3 * s:.0f}"),
    ("requests_per_s", "req/s", lambda x: f"{x:.2f}"),
    ("be_per_s", "BE req/s", lambda x: f"{x:.2f}"),
    ("failed", "failed", lambda x: f"{x:.0f}"),
    ("other_cores", "other cores", lambda x: f"{x:.2f}"),
]


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown; milliseconds where no unit is given; TTFT, TPOT and blocking of LS."""
    lines = ["| " + " | ".join(["", *(title for _, title, _ in COLUMNS)]) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for row, m in rows.items():
        lines.append("| " + " | ".join([row, *(show(m[key]) for key, _, show in COLUMNS)]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, help="Python of an environment with vllm-cpu (see throughput.py)")
    parser.add_argument("--client", type=Path, help="load generator for vLLM's server, a Python script")
    parser.add_argument("--model", type=Path, default=Path("out/moe"), help="where the checkpoint is, or is made")
    parser.add_argument("--policies", nargs="+", choices=[*OURS, *VLLM], default=[*OURS, *VLLM])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isolated", type=int, default=30, help="LS requests sent alone first, in each run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-step", type=float, default=0.01, help="bound on a step of this engine, seconds")
    parser.add_argument("--logs", type=Path, default=Path("out/mixed_load"), help="folder of the engines' logs")
    parser.add_argument("--json", type=Path, help="write all requests and the metrics to this file")
    add_out(parser, "mixed_load")
    args = parser.parse_args()
    end_children_on_sigterm()
    make_checkpoint(args.model)
    missing = why_no_vllm(args.vllm_python)
    if not missing and (args.client is None or not args.client.exists()):
        missing = f"the client {args.client} does not exist" if args.client else "--client is not given"
    rows = list(dict.fromkeys(args.policies))
    if missing and set(rows) & set(VLLM):
        rows = [row for row in rows if row in OURS]
        print(f"vLLM: its rows are left out: {missing}\n")
    runs: dict[str, list[dict[str, Any]]] = {}
    failed: set[str] = set()
    for seed in args.seeds:
        for row in random.Random(seed).sample(rows, len(rows)):
            if row in failed:
                continue
            try:
                run = (run_ours if row in OURS else run_vllm)(row, seed, args)
            except EngineFailed as error:
                print(f"{row}: {error}; its row is left out", file=sys.stderr)
                failed.add(row)
                runs.pop(row, None)
                continue
            runs.setdefault(row, []).append(run)
            p99 = 1e3 * summarise([run])["ls_ttft_p99"]
            print(f"seed {seed}, {row}: LS TTFT p99 {p99:.0f} ms, other cores {run['other_cores']:.2f}", flush=True)
    metrics = {row: summarise(runs[row]) for row in rows if row in runs}
    print(f"\n{args.seconds:.0f} s a run, seeds {args.seeds}, max_step {1e3 * args.max_step:.0f} ms, ", end="")
    print(f"{args.threads} threads, load average {os.getloadavg()[0]:.1f}; milliseconds unless stated\n")
    print(table(metrics))
    if args.json:
        setup = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
        args.json.write_text(json.dumps({"setup": setup, "metrics": metrics, "runs": runs}, indent=1))
    if args.out:
        rows = [{"row": row, **found} for row, found in metrics.items()]
        save(args.out, source=f"measured on {this_machine()}", tables={"rows": rows})


if __name__ == "__main__":
    main()
