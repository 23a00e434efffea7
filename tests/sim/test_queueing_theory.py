"""Queueing theory as an oracle: where a formula exists, the simulator agrees with it.

With one output token and `max_seqs` 1 a request is one prefill pass: a server with one customer at a time. All experts
are chosen by every token, so that the service time follows from the prompt alone.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qllm.scheduler import Limits, Policy, make_policy
from qllm.sim import isolated_ttft
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings
from tests.worlds import run

STEPS = PassCostModel(
    affine_timings(layers=40, experts=8, top_k=8, head=(1e-6, 0.0), dense_pre=(1e-6, 1e-7), dense_post=(1e-6, 1e-7)),
    max_step=50e-6,
)
LIMITS = Limits(max_seqs=1)


def service(prompt: int) -> float:
    """Seconds of one pass: the lone request's TTFT."""
    return float(isolated_ttft(np.array([prompt]), limits=LIMITS, steps=STEPS)[0])


def poisson(rates: dict[str, float], prompts: dict[str, list[int]], n: int, seed: int) -> RequestTrace:
    rng = np.random.default_rng(seed)
    total = sum(rates.values())
    cls = rng.choice(len(rates), n, p=[r / total for r in rates.values()])
    length = np.array([rng.choice(prompts[list(rates)[c]]) for c in cls])
    return RequestTrace(np.cumsum(rng.exponential(1 / total, n)), length, np.ones(n, dtype=int), cls, tuple(rates))


def means(rates, prompts, policy: Policy, cls: int, replications: int = 12, n: int = 4000) -> np.ndarray:
    """Mean turnaround (seconds) of a class in each replication, the first tenth of the requests left out."""
    out = []
    for seed in range(replications):
        trace = poisson(rates, prompts, n, seed)
        result = run(trace, policy, LIMITS, STEPS)
        mine = (trace.cls == cls) & (np.arange(n) >= n // 10)
        out.append((result.finish - result.arrival)[mine].mean())
    return np.array(out)


def assert_agrees(sample: np.ndarray, expected: float, slack: float = 0.0) -> None:
    """`expected` lies in the 99.9 % confidence interval of the mean of `sample`, which is narrow enough to say so."""
    half = stats.t.ppf(0.9995, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample))
    assert half < 0.15 * expected, "too few replications to tell"
    assert abs(sample.mean() - expected) <= half + slack, f"{sample.mean()} against {expected} +- {half}"


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_mean_waiting_is_that_of_m_d_1(load):
    """Waiting = rho S / (2 (1 - rho)), Pollaczek-Khinchine with constant service."""
    s = service(100)
    sample = means({"ls": load / s}, {"ls": [100]}, make_policy("fcfs"), 0) - s
    assert_agrees(sample, load * s / (2 * (1 - load)))


def test_two_classes_with_preemption_are_m_g_1_preemptive_resume():
    """Mean turnaround in M/G/1 with preemptive resume (Conway, Maxwell and Miller).

    T1 = S1 + R1 / (1 - rho1); T2 = S2 / (1 - rho1) + (R1 + R2) / ((1 - rho1)(1 - rho1 - rho2)),
    with Ri = lambda_i E[Si^2] / 2. An LS request waits for at most one step more.
    """
    prompts = {"ls": [20, 60], "be": [50, 400]}
    s = {c: np.array([service(p) for p in lengths]) for c, lengths in prompts.items()}
    rho = {"ls": 0.3, "be": 0.4}
    rates = {c: rho[c] / s[c].mean() for c in s}
    residual = {c: rates[c] * (s[c] ** 2).mean() / 2 for c in s}
    policy = make_policy("qllm", fill_tokens=0)
    longest = 800e-6  # an expert with 400 tokens and what comes before it
    t1 = s["ls"].mean() + residual["ls"] / (1 - rho["ls"])
    assert_agrees(means(rates, prompts, policy, 0), t1, slack=longest)
    t2 = s["be"].mean() / (1 - rho["ls"]) + sum(residual.values()) / ((1 - rho["ls"]) * (1 - sum(rho.values())))
    assert_agrees(means(rates, prompts, policy, 1), t2, slack=longest)
    without = means(rates, prompts, make_policy("priority"), 0, replications=4)
    assert without.mean() > t1 + 2 * longest, "without preemption LS waits for BE passes"
