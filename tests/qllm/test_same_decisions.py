"""The promise of the project: the engine on the virtual clock and the simulator take the same decisions.

Given the same trace, the same timings and the routing that the engine recorded, they report the same times to the last
bit.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import qllm.executor.model.experts  # noqa: E402
from qllm.executor import Engine, VirtualClock, replay  # noqa: E402
from qllm.executor.model.loading import prepare_model  # noqa: E402
from qllm.executor.testing import tiny_model  # noqa: E402
from qllm.scheduler import POLICIES, Limits, Policy, make_policy  # noqa: E402
from qllm.sim import RecordedRouting, simulate  # noqa: E402
from qllm.traces.requests.trace import RequestTrace  # noqa: E402
from qllm.traces.results import RunResult, Status  # noqa: E402
from qllm.traces.step_times.cost_model import PassCostModel  # noqa: E402
from qllm.traces.step_times.testing import affine_timings  # noqa: E402
from qllm.validation.attribution import after_rest  # noqa: E402
from tests.worlds import Stack  # noqa: E402

PRIORITIES = {"ls": 0, "be": 1, "bulk": 2}
COLUMNS = ("arrival", "first_launch", "first_token", "finish", "queueing", "running", "suspended")
COUNTS = ("preemptions", "evictions", "status")
LAYERS, EXPERTS = 3, 8


@pytest.fixture(scope="module")
def model(one_thread):
    return prepare_model(tiny_model("qwen3_moe", num_hidden_layers=LAYERS))


@pytest.fixture
def partners(monkeypatch):
    """For each launch, how many other passes had rows in it."""
    seen: list[int] = []
    original = qllm.executor.model.experts.run_tile

    def spy(module, tile, queues, others=()):
        seen.append(sum(any(map(q.can_merge, tile)) for q in others))
        original(module, tile, queues, others)

    monkeypatch.setattr(qllm.executor.model.experts, "run_tile", spy)
    return seen


def workload(seed: int, n: int = 40, gap: float = 0.002) -> RequestTrace:
    """Bursts of three classes, some requests at the same instant; the last can never fit."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(gap, n) * rng.integers(0, 2, n)
    prompts = rng.integers(1, 60, n)
    prompts[-1] = 170
    outputs, classes = rng.integers(1, 12, n), rng.integers(0, 3, n)
    wants = {"max_ttft_s": rng.choice([0.005, 0.05, np.inf], n), "tenants": tuple(rng.choice(["a", "b"], n).tolist())}
    return RequestTrace(np.cumsum(gaps), prompts, outputs, classes, tuple(PRIORITIES), **wants)


def step_model(max_step: float = 1e-4, expert_mode: str = "fused", layers: int = LAYERS, **costs) -> PassCostModel:
    header = {"host_s": 1e-4, "suspend_s": 1e-5, "resume_s": 7e-6, "wake_s": 3e-4, "kv_bytes_per_token": 1 << 20}
    timings = affine_timings(layers=layers, experts=EXPERTS, top_k=2, **header | costs)
    return PassCostModel(timings, max_step=max_step, expert_mode=expert_mode)


def both(model, trace, policy: Policy, limits: Limits, steps: PassCostModel) -> tuple[RunResult, RunResult]:
    with Engine(model, policy=policy, limits=limits, clock=VirtualClock(steps)) as engine:
        real = replay(engine, trace, priorities=PRIORITIES, seed=3)
    assert real.routing is not None
    simulated = simulate(
        trace,
        priorities=PRIORITIES,
        policy=policy,
        limits=limits,
        steps=steps,
        routing=RecordedRouting(real.routing),
        timeline=True,
    )
    return real, simulated


def assert_same(real: RunResult, simulated: RunResult) -> None:
    assert real.slices == simulated.slices
    for column in (*COLUMNS, *COUNTS):
        np.testing.assert_array_equal(getattr(real, column), getattr(simulated, column), err_msg=column)
    assert (real.makespan, real.passes) == (simulated.makespan, simulated.passes)
    assert real.kv_peak == simulated.kv_peak > 0
    assert real.reasons == simulated.reasons


@pytest.mark.parametrize("name", ["fcfs", "qllm"])
def test_after_each_pause_both_wake_up(model, name):
    trace = workload(seed=5, n=16, gap=0.1)
    results = [
        both(model, trace, make_policy(name), Limits(kv_blocks=40, block_size=4), step_model(wake_s=wake_s))
        for wake_s in (0.0, 0.01)
    ]
    for real, simulated in results:
        assert_same(real, simulated)
    (real, _), (woken, _) = results
    pauses = after_rest(real)
    assert len(pauses) > 4
    longer = sum(s.end - s.start for s in woken.slices or []) - sum(s.end - s.start for s in real.slices or [])
    assert longer == pytest.approx(0.01 * len(pauses), rel=0.02)


@pytest.mark.parametrize("name", ["fcfs", "qllm", "hybrid"])
def test_after_prompts_decodes_take_longer_in_both(model, name):
    trace, limits = workload(seed=8), Limits(max_seqs=4, max_batched_tokens=64, kv_blocks=40, block_size=4)
    spent = []
    for after_prefill in (None, (2e-4, 1e-5)):
        real, simulated = both(model, trace, make_policy(name), limits, step_model(after_prefill=after_prefill))
        assert_same(real, simulated)
        spent.append(sum(s.end - s.start for s in real.slices or []))
    assert spent[1] > spent[0] + 5 * 2e-4


def test_every_policy_is_put_to_the_test():
    assert set(POLICIES) == {name for name, _ in SETTINGS}


SETTINGS = [
    ("fcfs", {}),
    ("priority", {}),
    ("chunked", {"budget": 16}),
    ("layer", {"fill_tokens": 0}),
    ("qllm", {}),
    ("qllm", {"fill_tokens": 0, "max_suspended_s": 1e-3}),
    ("qllm", {"fill_tokens": 16, "resume": "idle"}),
    ("hybrid", {"budget": 40}),
    ("qllm", {"merge": True}),
    ("qllm", {"fill_tokens": 16, "resume": "idle", "merge": True}),
    ("hybrid", {"budget": 40, "merge": True}),
    ("slack", {}),
    ("slack", {"tpot_stretch": 3.0, "ttft_stretch": 2.0, "be_share": 0.3, "budget": 40, "order": "shortest"}),
    ("slack", {"max_wait_s": 5e-3, "max_suspended_s": 1e-3, "order": "fair"}),
    ("slack", {"order": "deadline"}),
    ("slack", {"order": "fair", "weights": {"a": 3.0}}),
    ("slack", {"shed_s": 5e-4}),
    ("slack", {"shed_ls_s": 5e-4}),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_engine_and_simulator_decide_alike_with_memory_to_spare(model, partners, name, settings):
    limits = Limits(max_seqs=4, max_batched_tokens=64, kv_blocks=40, block_size=4)
    real, simulated = both(model, workload(8), make_policy(name, **settings), limits, step_model())
    assert_same(real, simulated)
    finished = (real.status == Status.FINISHED).sum()
    assert 10 < finished < 39 if settings.keys() & {"shed_s", "shed_ls_s"} else finished == 39
    if make_policy(name).granularity != "iteration":
        assert real.preemptions.sum() > 0
    assert any(partners) == settings.get("merge", False)


def test_engine_and_simulator_merge_several_suspended_passes_alike(partners):
    """One layer, so that all who are suspended wait at the same experts; up to 52 or 6 rows are merged."""
    model = prepare_model(tiny_model("qwen3_moe", num_hidden_layers=1))
    limits = Limits(max_seqs=4, max_batched_tokens=64, kv_blocks=80, block_size=4)
    for expert_s, max_step, mode in ((5e-5, 1e-5, "separate"), (5e-5, 1e-4, "fused"), (4e-6, 3e-5, "fused")):
        steps = step_model(max_step, mode, layers=1, expert=(expert_s, 1e-6))
        for seed in (6, 7, 8, 14):
            assert_same(*both(model, workload(seed, gap=0.004), Stack(), limits, steps))
    assert partners.count(1) > 50
    assert max(partners) >= 2


def test_nothing_of_a_pass_is_merged_before_its_time_has_come_to_the_experts(model):
    """LS stops a decode pass all along.

    The real pass has no points inside that attention, so it waits at the experts already while that of the cost model
    still stands between query blocks.
    """
    limits, steps = Limits(max_seqs=4, max_batched_tokens=64, kv_blocks=40, block_size=4), step_model(4e-6)
    lone = RequestTrace(np.zeros(1), np.array([20]), np.array([3]), np.ones(1, dtype=int), tuple(PRIORITIES))
    policy = make_policy("qllm", fill_tokens=0, merge=True)
    slices = both(model, lone, policy, limits, steps)[1].slices
    assert slices is not None
    stages = set()
    for at in np.linspace(slices[1].start, slices[1].end, 40, endpoint=False):
        trace = RequestTrace(
            np.array([0.0, at]), np.array([20, 30]), np.array([3, 1]), np.array([1, 0]), tuple(PRIORITIES)
        )
        real, simulated = both(model, trace, policy, limits, steps)
        assert_same(real, simulated)
        assert real.slices is not None
        stages.add(real.slices[1].stage)
    assert stages >= {"attention", "experts"}


@pytest.mark.parametrize("evict", ["recompute", "offload"])
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_engine_and_simulator_decide_alike_when_memory_is_short(model, name, settings, evict):
    limits = Limits(max_seqs=4, max_batched_tokens=64, kv_blocks=20, block_size=4, evict=evict, max_suspended_tokens=90)
    real, simulated = both(model, workload(2), make_policy(name, **settings), limits, step_model(5e-5))
    assert_same(real, simulated)
    assert real.evictions.sum() > 0


@pytest.mark.parametrize("max_step", [1e-5, 3e-4, float("inf")])
@pytest.mark.parametrize("expert_mode", ["fused", "separate"])
def test_engine_and_simulator_cut_passes_alike(model, max_step, expert_mode):
    limits = Limits(max_seqs=3, max_batched_tokens=32, kv_blocks=80, block_size=4, urgent_blocks=8)
    steps = step_model(max_step, expert_mode)
    assert_same(*both(model, workload(3, 24), make_policy("qllm"), limits, steps))


def test_a_second_replay_on_the_same_engine_starts_anew(model):
    trace, steps = workload(4, 10), step_model()
    limits = Limits(max_seqs=3, max_batched_tokens=64, kv_blocks=40, block_size=4)
    with Engine(model, policy="qllm", limits=limits, clock=VirtualClock(steps)) as engine:
        first, second = (replay(engine, trace, priorities=PRIORITIES) for _ in range(2))
    for column in (*COLUMNS, *COUNTS):
        np.testing.assert_array_equal(getattr(first, column), getattr(second, column), err_msg=column)
    assert first.slices == second.slices
