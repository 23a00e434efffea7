"""Small worlds for the tests of scheduler and simulator: workloads, policies and timings drawn by hypothesis."""

from __future__ import annotations

from itertools import accumulate, chain

import numpy as np
from hypothesis import strategies as st

from qllm.scheduler import Limits, Policy, make_policy
from qllm.sim import RunResult, simulate
from qllm.traces.prefixes import Prefixes
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings

PRIORITIES = {"ls": 0, "be": 1, "bulk": 2}


class Stack(Policy):
    """Whatever arrives preempts what runs, so several passes wait at the same experts, and merge."""

    granularity = "expert"
    merge = True

    def preempts(self, s, running, now):
        return len(s.suspended_passes) < 3 and s.can_prefill(s.waiting.level())


policies = st.one_of(
    st.sampled_from(["fcfs", "priority"]).map(make_policy),
    st.integers(1, 64).map(lambda n: make_policy("chunked", budget=n)),
    st.builds(
        make_policy,
        st.sampled_from(["qllm", "layer", "hybrid"]),
        max_suspended_s=st.sampled_from([None, 0.0, 0.01, 1.0]),
    ),
    st.builds(make_policy, st.just("hybrid"), budget=st.sampled_from([16, 2048]), merge=st.just(True)),
    st.builds(Stack),
    st.builds(
        make_policy,
        st.just("slack"),
        ttft_stretch=st.sampled_from([1.0, 1.5]),
        tpot_stretch=st.sampled_from([1.0, 1.3, 10.0]),
        be_share=st.sampled_from([0.0, 0.1, 0.5]),
        budget=st.sampled_from([16, 2048]),
        order=st.sampled_from(["arrival", "shortest", "fair"]),
        max_suspended_s=st.sampled_from([None, None, 0.01]),
        max_wait_s=st.sampled_from([None, None, 0.02]),
    ),
    st.builds(
        make_policy,
        st.just("qllm"),
        fill_tokens=st.sampled_from([None, 0, 16]),
        resume=st.sampled_from(["prefill", "idle"]),
        merge=st.just(True),
    ),
    st.builds(
        make_policy,
        st.sampled_from(["qllm", "layer"]),
        fill_tokens=st.sampled_from([None, 0, 16]),
        resume=st.sampled_from(["prefill", "idle"]),
        max_suspended_s=st.sampled_from([None, 0.01]),
    ),
)


@st.composite
def prefixes_of(draw: st.DrawFn, tokens: np.ndarray) -> Prefixes:
    """What contexts of so many tokens begin with; often the same, and the numbers alone do not tell a beginning."""
    block = draw(st.sampled_from([1, 2, 4, 6, 8]))
    rows = [draw(st.lists(st.sampled_from([7, 7, 7, 3]), max_size=n // block)) for n in tokens.tolist()]
    return Prefixes(np.array([*chain(*rows)], dtype=np.int64), np.array([len(row) for row in rows]), block)


@st.composite
def traces(draw: st.DrawFn, most: int = 25) -> RequestTrace:
    """Up to `most` requests of three classes, some arriving together; in every other trace prompts begin alike."""
    n = draw(st.integers(1, most))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.0, 1e-4, 0.001, 0.0031, 0.02]), min_size=n, max_size=n))
    prompts = draw(st.lists(st.sampled_from([1, 3, 8, 20, 33]), min_size=n, max_size=n))
    outputs = draw(st.lists(st.sampled_from([1, 2, 7, 20]), min_size=n, max_size=n))
    cls = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    columns = np.cumsum(gaps), np.array(prompts), np.array(outputs), np.array(cls)
    alike = draw(prefixes_of(columns[1] + columns[2])) if draw(st.booleans()) else None
    return RequestTrace(*columns, tuple(PRIORITIES), prefixes=alike)


def keys_of(path: list[int]) -> tuple[int, ...]:
    """Keys of the units along a path through the tree of all prompts, each a number for the whole path to its end."""
    return tuple(accumulate(path, lambda key, branch: 3 * key + branch, initial=1))[1:]


#: what prompts begin with, for prefix caches: paths that often begin alike
prefixes = st.lists(st.sampled_from([1, 1, 1, 2]), max_size=12).map(keys_of)


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    """Tight ones, so that batches fill up and KV blocks run out; the longest request (33 + 20 tokens) fits alone."""
    blocks = draw(st.sampled_from([14, 20, 40, 400]))
    seqs = draw(st.sampled_from([1, 2, 3, 8]))
    return Limits(
        max_seqs=seqs,
        max_batched_tokens=max(seqs, draw(st.sampled_from([8, 24, 64]))),
        kv_blocks=blocks,
        block_size=4,
        urgent_blocks=draw(st.sampled_from([0, 0, 4])),
        max_suspended_tokens=draw(st.sampled_from([None, None, 30])),
        evict=draw(st.sampled_from(["recompute", "offload"])),
        max_resident=draw(st.sampled_from([None, None, 1, 3])),
    )


@st.composite
def step_models(draw: st.DrawFn) -> PassCostModel:
    """Affine timings with few layers; costs of preemption and of the host, both expert modes, several splits.

    Up to 6 or up to 52 tokens are merged at an expert.
    """
    timings = affine_timings(
        layers=draw(st.sampled_from([1, 2, 5])),
        experts=draw(st.sampled_from([2, 4, 9])),
        top_k=draw(st.sampled_from([1, 2])),
        expert=(draw(st.sampled_from([4e-6, 50e-6])), 1e-6),
        host_s=draw(st.sampled_from([0.0, 2e-4])),
        suspend_s=draw(st.sampled_from([0.0, 1e-5, 1e-3])),
        resume_s=draw(st.sampled_from([0.0, 7e-6, 3e-3])),
        wake_s=draw(st.sampled_from([0.0, 2e-3])),
        launch=draw(st.sampled_from([None, (2e-5, -1e-10)])),
        after_prefill=draw(st.sampled_from([None, (1e-3, 2e-4)])),
    )
    max_step = draw(st.sampled_from([1e-5, 1e-4, 3e-4, float("inf")]))
    return PassCostModel(timings, max_step=max_step, expert_mode=draw(st.sampled_from(["fused", "separate"])))


def run(trace: RequestTrace, policy: Policy, limits: Limits, steps: PassCostModel, **more) -> RunResult:
    more.setdefault("prefix_cache", trace.prefixes is not None)
    return simulate(trace, priorities=PRIORITIES, policy=policy, limits=limits, steps=steps, **more)
