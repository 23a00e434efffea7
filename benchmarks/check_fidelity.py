"""Print how the simulator stands to theory, its fast device to the step-by-step one, and the engine to the simulator.

    python benchmarks/check_fidelity.py [--quick]

Step times are made-up straight lines (theory, engine) or shipped timing traces (devices): nothing here is measured on
a GPU. The engine part needs the extra `executor` and is left out without it. How step times compare with measured ones:
tools/check_timings_held_out.py, tools/check_hf_iteration.py.
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy import stats

from qllm import load_config
from qllm.config.from_config import cost_model, load_timings, popularity, scheduler_limits
from qllm.config.workload import request_trace
from qllm.experiment.run import Run, runs
from qllm.scheduler import POLICIES, Limits, Policy, make_policy
from qllm.sim import RunResult, isolated_ttft, simulate
from qllm.sim.routing import RecordedRouting
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings

CONFIGS = Path(__file__).parents[1] / "configs"
PRIORITIES = {"ls": 0, "be": 1}
COLUMNS = ("first_launch", "first_token", "finish", "queueing", "running", "suspended", "preemptions", "evictions")

# Every token goes to every expert, so that a pass's time follows from its tokens alone.
SERVER = PassCostModel(
    affine_timings(layers=40, experts=8, top_k=8, head=(1e-6, 0.0), dense_pre=(1e-6, 1e-7), dense_post=(1e-6, 1e-7)),
    max_step=50e-6,
)
ONE = Limits(max_seqs=1)


def service(prompt: int) -> float:
    """Seconds of one request of one output token, alone."""
    return float(isolated_ttft(np.array([prompt]), limits=ONE, steps=SERVER)[0])


def poisson(rates: dict[str, float], prompts: dict[str, list[int]], n: int, seed: int) -> RequestTrace:
    rng = np.random.default_rng(seed)
    total = sum(rates.values())
    cls = rng.choice(len(rates), n, p=[r / total for r in rates.values()])
    length = np.array([rng.choice(prompts[list(rates)[c]]) for c in cls])
    return RequestTrace(np.cumsum(rng.exponential(1 / total, n)), length, np.ones(n, dtype=int), cls, tuple(rates))


def turnaround(rates, prompts, policy: Policy, cls: int, replications: int, n: int) -> tuple[float, float]:
    """(mean, half of its 95 % confidence interval), seconds; the first tenth of each replication is left out."""
    means = []
    for seed in range(replications):
        trace = poisson(rates, prompts, n, seed)
        result = simulate(trace, priorities=PRIORITIES, policy=policy, limits=ONE, steps=SERVER)
        mine = (trace.cls == cls) & (np.arange(n) >= n // 10)
        means.append((result.finish - result.arrival)[mine].mean())
    half = stats.t.ppf(0.975, replications - 1) * np.std(means, ddof=1) / np.sqrt(replications)
    return float(np.mean(means)), float(half)


def theory(replications: int, n: int) -> None:
    """M/D/1 (Pollaczek-Khinchine) and preemptive-resume M/G/1 with two classes (Conway, Maxwell and Miller)."""
    print(f"Theory: mean turnaround in ms, {replications} replications of {n} requests, 95 % interval\n")
    print("| queue | load | class | theory | simulated |\n|---|---|---|---|---|")
    s = service(100)
    for load in (0.3, 0.5, 0.7, 0.9):
        mean, half = turnaround({"ls": load / s}, {"ls": [100]}, make_policy("fcfs"), 0, replications, n)
        print(f"| M/D/1 | {load} | all | {1e3 * (s + waiting(load, s)):.2f} | {1e3 * mean:.2f} +- {1e3 * half:.2f} |")
    prompts = {"ls": [20, 60], "be": [50, 400]}
    times = {c: np.array([service(p) for p in lengths]) for c, lengths in prompts.items()}
    for rho in ({"ls": 0.2, "be": 0.3}, {"ls": 0.3, "be": 0.4}, {"ls": 0.3, "be": 0.55}):
        rates = {c: rho[c] / times[c].mean() for c in times}
        residual = {c: rates[c] * (times[c] ** 2).mean() / 2 for c in times}
        free, both = 1 - rho["ls"], 1 - sum(rho.values())
        expected = {
            "ls": times["ls"].mean() + residual["ls"] / free,
            "be": times["be"].mean() / free + sum(residual.values()) / (free * both),
        }
        for cls, name in enumerate(("ls", "be")):
            mean, half = turnaround(rates, prompts, make_policy("qllm", fill_tokens=0), cls, replications, n)
            load = f"{rho['ls']} + {rho['be']}"
            shown = f"{1e3 * mean:.2f} +- {1e3 * half:.2f}"
            print(f"| M/G/1, preemptive resume | {load} | {name} | {1e3 * expected[name]:.2f} | {shown} |")


def waiting(load: float, s: float) -> float:
    """Mean waiting in M/D/1, seconds."""
    return load * s / (2 * (1 - load))


def devices(requests: int) -> None:
    """The fast device against the step-by-step one, on the configurations that ship."""
    print("\nFast against step-by-step device: the last sweep point of each configuration, first seed\n")
    print("| configuration | policy | passes | suspensions | schedules | fast s | step by step s |")
    print("|---|---|---|---|---|---|---|")
    for name in ("paper", "long_prefill"):
        config = load_config(CONFIGS / f"{name}.yaml", [f"requests={requests}", "seeds=1"])
        last = config.points()[-1]
        for run in (run for run in runs(config) if run.point == last):
            fast, fast_s = timed(run, False)
            slow, slow_s = timed(run, True)
            same = "identical" if equal(fast, slow) else "DIFFERENT"
            stops = sum(one.suspended for one in fast.slices or [])
            print(f"| {name} | {run.title} | {fast.passes} | {stops} | {same} | {fast_s:.2f} | {slow_s:.2f} |")


def timed(run: Run, step_by_step: bool) -> tuple[RunResult, float]:
    config = run.config
    start = time.perf_counter()
    result = simulate(
        request_trace(config, run.seed),
        priorities=config.priorities,
        policy=config.policies[run.policy].build(),
        limits=scheduler_limits(config, load_timings(config.timings)),
        steps=cost_model(config),
        popularity=popularity(config),
        seed=run.seed,
        timeline=True,
        step_by_step=step_by_step,
    )
    return result, time.perf_counter() - start


def equal(a: RunResult, b: RunResult) -> bool:
    """Whether two runs have the same timeline and the same times for each request, to the last bit."""
    columns = all(np.array_equal(getattr(a, c), getattr(b, c), equal_nan=True) for c in COLUMNS)
    return a.slices == b.slices and columns


def engine(requests: int) -> None:
    """The engine on the virtual clock against the simulator, fed the routing that the engine recorded."""
    import torch

    from qllm.executor import Engine, VirtualClock, replay
    from qllm.executor.model.loading import prepare_model
    from qllm.executor.testing import tiny_model

    torch.set_num_threads(1)
    print("\nEngine (virtual clock, a tiny random Qwen3-MoE, float32, CPU) against the simulator\n")
    print("| policy | requests | passes | suspensions | KV evictions | schedules |\n|---|---|---|---|---|---|")
    timings = affine_timings(layers=3, experts=8, top_k=2, host_s=1e-4, suspend_s=1e-5, resume_s=7e-6)
    steps = PassCostModel(timings, max_step=1e-4)
    limits = Limits(max_seqs=6, max_batched_tokens=64, kv_blocks=40, block_size=4)
    model = prepare_model(tiny_model("qwen3_moe", num_hidden_layers=3))
    rng = np.random.default_rng(8)
    gaps = rng.exponential(0.01, requests) * rng.integers(0, 2, requests)
    lengths = rng.integers(1, 60, requests), rng.integers(1, 12, requests)
    trace = RequestTrace(np.cumsum(gaps), *lengths, rng.integers(0, 2, requests), ("ls", "be"))
    for name in POLICIES:
        with Engine(model, policy=name, limits=limits, clock=VirtualClock(steps)) as running:
            real = replay(running, trace, priorities=PRIORITIES, seed=3)
        policy = make_policy(name)
        recorded = RecordedRouting(real.routing or [])
        simulated = simulate(
            trace,
            priorities=PRIORITIES,
            policy=policy,
            limits=limits,
            steps=steps,
            routing=recorded,
            timeline=True,
        )
        same = "identical" if equal(real, simulated) else "DIFFERENT"
        stops = sum(one.suspended for one in real.slices or [])
        print(f"| {name} | {requests} | {real.passes} | {stops} | {real.evictions.sum()} | {same} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests: seconds, wide intervals")
    quick = parser.parse_args().quick
    theory(*((4, 800) if quick else (12, 4000)))
    devices(15 if quick else 100)
    if find_spec("torch") is None:
        print("\nThe engine needs torch: pip install -e '.[executor]'")
    else:
        engine(20 if quick else 100)


if __name__ == "__main__":
    main()
