"""Calibration of a tiny model: the passes are real, the clock may be a counter."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qllm.executor.calibration import engine_overhead
from qllm.executor.calibration.calibrate import CalibrationWarning, Extent, calibrate
from qllm.executor.calibration.engine_overhead import LoopSeconds, loop_seconds, wake_seconds
from qllm.executor.calibration.environment import device_name
from qllm.executor.calibration.fit import dense_points, query_block_seconds
from qllm.executor.calibration.grid import PassKind, mixed_lengths, pass_kinds
from qllm.executor.calibration.profiler import OFTEN, ROUNDS, Profiler, spread
from qllm.executor.calibration.routing import count_routing, write_popularity
from qllm.executor.calibration.stopwatch import PassTimes
from qllm.executor.calibration.store import Samples
from qllm.executor.engine import hook_clock
from qllm.executor.engine.clock import RealClock
from qllm.executor.engine.hook_clock import timed
from qllm.executor.errors import CalibrationError, LoadError
from qllm.executor.model.info import model_facts
from qllm.executor.model.loading import LoadedModel, load, prepare_model, with_layers
from qllm.executor.testing import tiny_config, tiny_model
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.popularity import load_popularity
from qllm.traces.step_times.testing import affine_timings
from qllm.traces.step_times.timings import TimingError, Timings

pytestmark = pytest.mark.filterwarnings(f"ignore::{CalibrationWarning.__module__}.CalibrationWarning")
EXTENT = Extent(max_tokens=16, max_context=32, max_batch=3)


@pytest.fixture(scope="module", autouse=True)
def short_pauses():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_overhead, "PAUSES", 3)
        patch.setattr(engine_overhead, "PAUSE_S", 0.02)
        yield


@pytest.fixture(scope="module")
def subject(one_thread) -> LoadedModel:
    return LoadedModel("tiny", prepare_model(tiny_model("qwen3_moe", num_hidden_layers=2)), 2, 1000, "random")


@pytest.fixture(scope="module")
def trace(subject, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("calibrated") / "tiny.csv"
    calibrate(subject, path, EXTENT)
    return path


@pytest.fixture
def counting(monkeypatch) -> None:
    """Every reading of the clock inside a pass comes one millisecond after the last."""
    readings = iter(range(1_000_000_000))
    monkeypatch.setattr(hook_clock, "time", SimpleNamespace(perf_counter=lambda: next(readings) * 1e-3))


def test_the_written_trace_covers_the_extent_and_loads(subject, trace):
    loaded = Timings.load(trace)
    assert loaded.source == "measured"
    assert (loaded.layers, loaded.experts, loaded.top_k, loaded.hidden) == (2, 8, 2, 64)
    assert loaded.device == device_name(subject.model.device)
    assert loaded.range("dense_pre") == (1, 16)
    assert loaded.range("attention_prefill") == ((1, 0), (16, 32))
    assert loaded.range("attention_decode") == ((1, 0), (3, 32))
    assert loaded.range("expert")[1] >= 16
    assert loaded.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, width, float32
    assert loaded.max_context == subject.model.config.max_position_embeddings
    assert loaded.repeats >= 2
    assert all(point.spread_s is not None for point in loaded.points if point.step == "dense_pre")
    assert loaded.host_bandwidth > 0
    assert 0 < loaded.engine_between_s < loaded.engine_loop_s < loaded.host_s
    assert not list(trace.parent.glob("*.measured"))


@pytest.mark.usefixtures("counting")
def test_the_steps_sum_to_the_whole_pass(subject, tmp_path, monkeypatch):
    """With a clock that counts readings, a pass of L layers takes 4 L + 2 intervals, whatever its size; what the
    engine's loop takes comes on top."""
    monkeypatch.setattr("qllm.executor.calibration.calibrate.loop_seconds", lambda *_: LoopSeconds(5e-3, 1e-3))
    steps = PassCostModel(calibrate(subject, tmp_path / "tiny.csv", EXTENT))
    for prefill, batch, context in (([(None, 16, 0)], 0, 0), ([(None, 8, 32)], 0, 0), ([], 3, 30)):
        tokens = sum(new for _, new, _ in prefill) + batch
        cost = steps.cost(prefill, batch, context, batch or 1)
        counts = np.full((2, 8), math.ceil(tokens * 2 / 8))
        total = steps.total(cost, steps.experts_of_pass(cost, counts))
        assert total == pytest.approx((4 * 2 + 2 + 5) * 1e-3, rel=0.02)


def test_the_loop_takes_more_than_what_lies_between_passes(subject):
    loop = loop_seconds(subject.model, 2)
    assert 0 < loop.between < loop.all


def test_a_pass_that_is_slow_after_a_pause_is_found_out(subject, monkeypatch):
    class Sleepy(RealClock):
        woken = False

        def idle(self, until):
            self.woken = False
            return super().idle(until)

        def execution(self, *args):
            if not self.woken:
                time.sleep(0.1)
            self.woken = True
            return super().execution(*args)

    monkeypatch.setattr(engine_overhead, "RealClock", Sleepy)
    assert wake_seconds(subject.model) > 0.05


def test_times_are_those_of_the_mean_pass():
    """One repeat of eight is disturbed; and one stood still for a minute, which is no one's everyday."""
    often = Samples(("lead",), np.array([[1.0]] * 7 + [[1.8]]), ())
    once = Samples(("lead",), np.array([[1.0]] * 7 + [[60.0]]), ())
    few = Samples(("lead",), np.array([[1.0], [2.0]]), ())
    parts = Samples(("lead", "tail"), np.array([[1.0, 3.0]] * 7 + [[1.8, 5.4]]), ())
    assert (often.total(), once.total(), few.total()) == pytest.approx((1.1, 1.25, 1.5))
    assert parts.means == pytest.approx([1.1, 3.3])


def samples_that_take(monkeypatch, seconds: Callable[[PassKind, int], float]) -> list[PassKind]:
    """Each interval of the n-th repeat of a kind takes seconds(kind, n). Returns the kinds, as they are measured."""
    sampled: list[PassKind] = []
    sample = Profiler.sample

    def sample_in(self, kind: PassKind, watch) -> PassTimes:
        sampled.append(kind)
        each = seconds(kind, sampled.count(kind))
        passed = sample(self, kind, watch)
        return PassTimes(tuple((name, each) for name, _ in passed.parts), passed.routing)

    monkeypatch.setattr(Profiler, "sample", sample_in)
    return sampled


def test_a_kind_of_pass_that_was_slow_is_not_sampled_more_often(subject, tmp_path, monkeypatch):
    """Else it would end up faster than it is: slow repeats would be outnumbered, and fast ones would not."""
    slow = range(2, 2 + OFTEN)  # in the first round; the one before it warms up
    sampled = samples_that_take(monkeypatch, lambda kind, n: 9e-3 if kind == PassKind(1, 4, 0) and n in slow else 1e-3)
    calibrate(subject, tmp_path / "tiny.csv", EXTENT)
    assert {sampled.count(kind) for kind in sampled} == {1 + (ROUNDS[0] + 1) * OFTEN}


def test_steady_passes_are_sampled_as_little_as_possible(subject, tmp_path, monkeypatch):
    sampled = samples_that_take(monkeypatch, lambda kind, n: 1e-3)
    calibrate(subject, tmp_path / "tiny.csv", EXTENT)
    assert {sampled.count(kind) for kind in sampled} == {1 + ROUNDS[0] * OFTEN}


def test_a_long_pass_is_sampled_less_often(subject, tmp_path, monkeypatch):
    sampled = samples_that_take(monkeypatch, lambda kind, n: 1.0 if kind == PassKind(1, 16, 0) else 1e-3)
    calibrate(subject, tmp_path / "tiny.csv", EXTENT)
    assert sampled.count(PassKind(1, 16, 0)) == 1 + ROUNDS[0]
    assert sampled.count(PassKind(1, 1, 0)) == 1 + ROUNDS[0] * OFTEN


@given(st.lists(st.integers(1, OFTEN), min_size=1, max_size=40))
def test_a_round_spreads_the_repeats_of_a_kind(times):
    """No stretch of a round longer than two shares of a kind is without one."""
    often = {PassKind(1, 1 + place, 0): many for place, many in enumerate(times)}
    order = spread(often)
    for kind, many in often.items():
        at = [place for place, (sampled, _) in enumerate(order) if sampled == kind]
        assert [turn for sampled, turn in order if sampled == kind] == list(range(many))
        gaps = np.diff([0, *at, len(order)])
        assert gaps.max() <= 2 * len(order) / many + len(times)


def test_a_pass_and_what_is_compared_with_it_are_sampled_one_after_another():
    """What they differ by is small; the machine's speed must not change in between."""
    grid = pass_kinds(max_tokens=1024, max_context=1024, max_batch=16, kv_tokens=10**9, experts=32, top_k=4)
    order = spread({kind: 1 if kind.tokens > 100 else 3 for kind in grid})
    at = {repeat: place for place, repeat in enumerate(order)}
    compared = [(kind, turn) for kind, turn in order if kind != kind.baseline and kind.baseline in grid]
    assert len(compared) > 10
    family = Counter(kind.baseline for kind in grid)
    assert all(abs(at[kind, turn] - at[kind.baseline, turn]) < family[kind.baseline] for kind, turn in compared)


def test_repeats_make_a_mean_more_certain():
    once = Samples(("lead",), 1 + 0.1 * np.random.default_rng(0).standard_normal((5, 1)), ())
    assert once.joined(once).uncertainty() == pytest.approx(once.uncertainty() / 2**0.5)


def test_parts_sum_to_the_median_pass_though_disturbances_hit_another_interval_each_time():
    seconds = np.ones((4, 4)) + 2 * np.eye(4)  # each pass takes 6, the median of each interval is 1
    measured = Samples(("lead", "attention", "experts", "tail"), seconds, ())
    assert measured.total() == pytest.approx(6)
    assert measured.total("attention") == pytest.approx(1.5)


def test_an_interrupted_calibration_goes_on(subject, tmp_path, monkeypatch):
    out = tmp_path / "tiny.csv"

    def stop(done: int, planned: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(subject, out, EXTENT, stop)
    kept = out.with_name("tiny.csv.measured")
    first = [json.loads(line)["kind"] for line in kept.read_text().splitlines()[1:]]
    assert len(first) == 10
    kept.write_text(kept.read_text() + '{"kind": "1,2,0')  # the power failed in the middle of a line
    sampled = samples_that_take(monkeypatch, lambda kind, n: 1e-3)
    calibrate(subject, out, EXTENT)
    assert out.exists()
    assert not kept.exists()
    grid = pass_kinds(**vars(EXTENT), kv_tokens=10**9, experts=8, top_k=2)
    assert set(sampled[: len(grid)]) == set(grid)  # a new process warms up
    found = Counter(first) + Counter(kind.key for kind in sampled[len(grid) :])
    assert found == {kind.key: ROUNDS[0] * OFTEN for kind in grid}  # nothing is measured anew


def test_measurements_of_something_else_are_not_gone_on_with(subject, tmp_path):
    out = tmp_path / "tiny.csv"
    with pytest.raises(KeyboardInterrupt):
        calibrate(subject, out, EXTENT, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(
        CalibrationError, match=r"tiny.csv.measured: holds measurements with max_batch = 3, asked for 4"
    ):
        calibrate(subject, out, Extent(16, 32, 4))


def test_an_extent_beyond_the_model_is_refused(subject, tmp_path):
    with pytest.raises(CalibrationError, match=r"--max-tokens 256 over --max-context 32 .* 256 positions"):
        calibrate(subject, tmp_path / "tiny.csv", Extent(256, 32, 3))
    with pytest.raises(CalibrationError, match="--max-batch is 1, must be at least 2"):
        Extent(16, 32, 1)


@pytest.mark.usefixtures("counting")
def test_parts_splits_and_forced_experts_of_a_pass(subject):
    profiler = Profiler(subject.model, 64, 3)
    with torch.inference_mode(), timed(subject.model) as watch:
        whole = profiler.sample(PassKind(1, 16, 0), watch)
        single = profiler.sample(PassKind(1, 16, 0, 1), watch)
        forced = profiler.sample(PassKind(1, 16, 0, forced_experts=2), watch)
    layer = ["attention", "post", "experts", "pre"]
    assert [name for name, _ in whole.parts] == ["lead", *layer, *layer[:3], "tail", "sample"]
    assert single.routing == whole.routing
    assert forced.routing == ((16, 16, 0, 0, 0, 0, 0, 0),) * 2
    assert subject.model.config._attn_implementation == "qllm"  # as before


def test_each_repeat_has_other_tokens_and_a_split_one_the_same(subject):
    profiler, kind = Profiler(subject.model, 64, 3), PassKind(1, 16, 0)
    with torch.inference_mode(), timed(subject.model) as watch:
        first, second = (profiler.sample(kind, watch).routing for _ in range(2))
        split = [profiler.sample(kind._replace(experts_per_group=2), watch).routing for _ in range(2)]
    assert first != second
    assert split == [first, second]


@pytest.mark.usefixtures("counting")
def test_a_further_group_costs_what_split_passes_take_longer(subject, tmp_path, monkeypatch):
    """By the clock that counts readings they take as long; here a layer's experts take 1 ms more one by one."""
    sample = Profiler.sample

    def sample_in(self, kind: PassKind, watch) -> PassTimes:
        passed = sample(self, kind, watch)
        parts = [(name, s + 1e-3 * (name == "experts" and kind.experts_per_group == 1)) for name, s in passed.parts]
        return PassTimes(tuple(parts), passed.routing)

    monkeypatch.setattr(Profiler, "sample", sample_in)
    monkeypatch.setattr(
        "qllm.executor.calibration.calibrate.pass_kinds",
        lambda **_: [*few, *(c._replace(experts_per_group=1) for c in few[:2])],
    )
    few = [
        PassKind(1, 1, 0),
        PassKind(1, 16, 0),
        PassKind(2, 1, 0),
        PassKind(1, 1, 8),
        PassKind(1, 16, 8),
        PassKind(2, 1, 8),
    ]
    timings = calibrate(subject, tmp_path / "tiny.csv", EXTENT)
    assert 0.99e-3 / 2 <= timings.launch(1) <= 1.01e-3  # two experts, of which the first of all may be one
    assert 0.99e-3 / 7 <= timings.launch(16) < 1e-3 / 4


@pytest.mark.usefixtures("counting")
def test_a_pass_that_is_slow_after_a_prompt_is_found_out(subject, tmp_path, monkeypatch):
    sample = Profiler.sample

    def sample_in(self, kind: PassKind, watch) -> PassTimes:
        passed = sample(self, kind, watch)
        extra = 1e-3 * kind.sequences * bool(kind.preceding_prompt)
        return PassTimes((("lead", passed.parts[0][1] + extra), *passed.parts[1:]), passed.routing)

    monkeypatch.setattr(Profiler, "sample", sample_in)
    timings = calibrate(subject, tmp_path / "tiny.csv", EXTENT)
    assert [timings.after_prefill(n) for n in (1, 2, 3)] == pytest.approx([1e-3, 2e-3, 3e-3], rel=0.01)
    assert timings.dense_pre(1) < 3e-3  # nothing of it


def test_what_splitting_an_attention_costs_is_its_own_number(tmp_path):
    def attention(seconds: float) -> Samples:
        return Samples(("attention",), np.full((3, 1), seconds), ())

    by_kind = {
        PassKind(1, 64, 0): attention(0.8),
        PassKind(1, 64, 0, query_blocks=8): attention(0.96),
        PassKind(1, 8, 0): attention(0.1),
    }
    found = query_block_seconds(by_kind, layers=2)
    assert found == pytest.approx(0.01)
    # a long pass that by chance was a twentieth faster split than whole
    long = {PassKind(1, 512, 0): attention(80.0), PassKind(1, 512, 0, query_blocks=8): attention(76.0)}
    assert query_block_seconds(by_kind | long, layers=2) == pytest.approx(0.01, rel=0.01)
    timings = affine_timings(layers=2, prefill=(1.0, 0.0, 0.0), query_block_s=found)
    timings.save(tmp_path / "t.csv")
    for known in (timings, Timings.load(tmp_path / "t.csv")):
        cost = PassCostModel(known, max_step=0.25).cost([(None, 64, 0)], 0, 0, 1)
        assert (cost.query_blocks, cost.query_block_s) == (4, pytest.approx(0.25 + 0.01))
    told_nothing = PassCostModel(affine_timings(layers=2, prefill=(1.0, 0.0, 0.0), launch_s=0.02), max_step=0.25)
    assert told_nothing.cost([(None, 64, 0)], 0, 0, 1).query_block_s == pytest.approx(0.27)


@given(st.integers(1, 9000), st.integers(0, 9000), st.integers(1, 64))
def test_whatever_the_limits_each_kind_of_pass_has_what_it_is_compared_with(tokens, context, batch):
    sizes = {"max_tokens": tokens, "max_context": context, "max_batch": batch}
    grid = pass_kinds(**sizes, kv_tokens=10**9, experts=32, top_k=4)
    assert len(set(grid)) == len(grid)
    for kind in grid:
        if kind.query_blocks > 1:
            assert kind.baseline in grid
        if kind.sequences == 1:
            assert PassKind(1, kind.new, 0) in grid


def test_the_grid_leaves_out_what_does_not_fit():
    grid = pass_kinds(max_tokens=16, max_context=128, max_batch=8, kv_tokens=300, experts=8, top_k=2)
    assert PassKind(2, 1, 128) in grid
    assert PassKind(4, 1, 128) not in grid
    assert max(kind.kv_tokens for kind in grid) <= 300


def test_corners_that_did_not_fit_are_modelled(subject, tmp_path, monkeypatch):
    monkeypatch.setattr("qllm.executor.calibration.calibrate.memory_bytes", lambda _: (1, 10**9))
    timings = calibrate(subject, tmp_path / "tiny.csv", EXTENT)
    corner = [p for p in timings.points if p[:3] == ("attention_decode", 3, 32)]
    assert [point.source for point in corner] == ["modelled"]


def test_a_folder_with_a_configuration_alone_gets_random_weights(tmp_path):
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    found = load(str(tmp_path), random_weights=True)
    assert found.weights.startswith("random")
    assert found.layers == 4
    assert found.weights_bytes == 4 * found.model.num_parameters()


def test_a_model_that_does_not_fit_is_measured_by_a_few_layers(tmp_path, monkeypatch):
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    monkeypatch.setattr("qllm.executor.model.loading.memory_bytes", lambda _: (1, 10**9))
    found = load(str(tmp_path), random_weights=True)
    assert model_facts(found.model)["layers"] == 2
    assert found.layers == 4
    monkeypatch.undo()
    timings = calibrate(found, tmp_path / "t.csv", EXTENT)
    assert timings.layers == 4
    assert timings.kv_bytes_per_token == 2 * model_facts(found.model)["kv_bytes_per_token"]
    assert timings.sequence_bytes == 0
    assert "2 layers with random weights" in timings.modelled["layers"]


def test_what_lies_outside_of_layers_is_not_multiplied_by_those_that_are_assumed():
    def passed(lead: float) -> Samples:
        names = ("lead", "attention", "post", "experts", "pre", "attention", "post", "experts", "tail", "sample")
        return Samples(names, np.array([[lead] + [1.0] * 9] * 3), np.ones((3, 2, 4), dtype=int))

    measured = {PassKind(1, 1, 0): passed(1.0), PassKind(1, 8, 0): passed(5.0)}
    for assumed, each in ((2, 3.0), (4, 2.0)):
        pre = {p.tokens: p.seconds for p in dense_points(measured, 2, 0.0, assumed) if p.step == "dense_pre"}
        assert pre == pytest.approx({1: 1.0, 8: each})
        assert assumed * pre[8] == pytest.approx(assumed * 1.0 + 4.0)


def test_leading_dense_layers_are_left_out_of_a_few_layers():
    short = with_layers(tiny_config("deepseek_v3"), 2)
    assert (short.num_hidden_layers, short.first_k_dense_replace) == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "abacus"}, "--device abacus"),
        ({"dtype": "int3"}, "--dtype int3: unknown; allowed: auto, float32"),
        ({"name_or_path": "/nowhere/to/be/found"}, "--model /nowhere/to/be/found"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, arguments, message):
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    given = {"name_or_path": str(tmp_path), **arguments}
    with pytest.raises(LoadError, match=message):
        load(given.pop("name_or_path"), **given)


def test_routing_of_prompts_becomes_a_popularity_table(subject, tmp_path):
    counts, tokens = count_routing(subject, [[5, 6, 7], [], [8, 9]], 16)
    assert tokens == 5
    assert [int(rows.sum()) for rows in counts.values()] == [10, 10]
    write_popularity(tmp_path / "p.csv", counts, {"source": "a test"})
    table = load_popularity(tmp_path / "p.csv", 8, 2)
    assert np.allclose(table, np.array([counts[0], counts[1]]) / 10, atol=1e-6)


def test_timings_of_another_model_or_device_are_refused(subject, trace):
    timings = Timings.load(trace)
    timings.check_matches(device=device_name(subject.model.device), layers=2, experts=8)
    with pytest.raises(
        TimingError, match=r"another model or device: device is .*, used with 'A100'; layers is 2, .* 3"
    ):
        timings.check_matches(device="A100", layers=3, experts=8)


def test_sequences_that_decode_together_have_the_lengths_of_serving():
    lengths = mixed_lengths(100, 5)
    assert sum(lengths) == 500
    assert (min(lengths), max(lengths)) == (60, 140)
    assert max(mixed_lengths(100, 5, most=110)) <= 110
    assert sum(mixed_lengths(100, 5, most=110)) == 500
    assert mixed_lengths(7, 1) == [7]


def test_the_cache_that_is_measured_holds_random_values(subject):
    profiler = Profiler(subject.model, 64, 2)
    zero_slot = profiler.runner.cache.zero_slot
    for store in (*profiler.runner.cache.keys, *profiler.runner.cache.values):
        assert (store[:zero_slot] != 0).all()
        assert (store[zero_slot] == 0).all()
