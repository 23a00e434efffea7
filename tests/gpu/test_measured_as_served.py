"""Calibration as on a GPU: replayed passes by moments that each replay sets anew, the host by its own clock."""

import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qllm.executor.calibration import engine_overhead, profiler, stopwatch
from qllm.executor.calibration.calibrate import CalibrationWarning, Extent, calibrate
from qllm.executor.calibration.engine_overhead import LoopSeconds
from qllm.executor.calibration.fit import host_seconds, launch_points, query_block_seconds
from qllm.executor.calibration.grid import PassKind, pass_kinds
from qllm.executor.calibration.profiler import Profiler
from qllm.executor.calibration.store import MeasurementStore, Samples
from qllm.executor.calibration.timed_runner import TimedRunner
from qllm.executor.engine import hook_clock
from qllm.executor.errors import CalibrationError
from qllm.executor.gpu.launch import launch
from qllm.executor.graphs.buckets import Bucket
from qllm.executor.model.loading import LoadedModel, prepare_model
from qllm.executor.model.runner import run_to_end
from qllm.executor.model.split import Split
from qllm.executor.testing import tiny_model
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.timings import Timings
from tests.gpu.plain import Plain, plain_kernels
from tests.gpu.tape import Tape, TapeRecorder
from tests.gpu.worlds import unpacked

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(f"ignore::{CalibrationWarning.__module__}.CalibrationWarning"),
]
assert plain_kernels  # a fixture of this module
KERNEL, PIECE, COPY = 1e-3, 1e-5, 2e-5  # seconds: of a kernel, of the host to launch a piece, to begin a pass
LAYER = ("attention", "post", "experts", "pre")


class Device:
    """A host and a device with clocks of their own: each kernel takes KERNEL, and begins when the one before has ended.

    It is the timer, too.
    """

    def __init__(self):
        self.host, self.busy_until, self.begin = 0.0, 0.0, COPY
        self.eager = 0.0  # seconds of the host for each kernel that it launches one by one
        self.replaying = False

    def work(self, seconds: float) -> None:
        self.host += 0 if self.replaying else self.eager
        self.busy_until = max(self.busy_until, self.host) + seconds

    def read(self) -> list[float]:
        moment = [-1.0]

        def record() -> None:
            moment[0] = max(self.busy_until, self.host)

        launch(Event(record), (1,))
        return moment

    def intervals(self, moments) -> list[float]:
        self.host = max(self.host, self.busy_until)
        return [after[0] - before[0] for before, after in itertools.pairwise(moments)]


class Event(Plain):
    """Recorded as a kernel is; takes no time."""

    def __getitem__(self, grid):
        return self._function


@pytest.fixture
def device(monkeypatch, plain_kernels) -> Device:
    device = Device()
    begin, replay, getitem = TimedRunner.begin, Tape.replay, Plain.__getitem__

    def slow_begin(self, *args, **settings):
        device.host += device.begin
        return begin(self, *args, **settings)

    def slow_replay(self):
        device.host += PIECE
        device.replaying = True
        replay(self)
        device.replaying = False

    def timed_kernel(self, grid):
        def run():
            device.work(KERNEL)
            getitem(self, grid)()

        return run

    monkeypatch.setattr(TimedRunner, "begin", slow_begin)
    monkeypatch.setattr(Tape, "replay", slow_replay)
    monkeypatch.setattr(Plain, "__getitem__", timed_kernel)
    monkeypatch.setattr(hook_clock, "timer_of", lambda _: device)
    monkeypatch.setattr(stopwatch, "hold", lambda _: device.work(0.1))
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: device.host))
    monkeypatch.setattr(profiler, "TimedRunner", as_on_a_gpu)
    return device


def as_on_a_gpu(*args, **settings):
    return TimedRunner(*args, **settings, kernels=True, recorder=TapeRecorder)


@pytest.fixture(scope="module")
def model():
    return unpacked(num_hidden_layers=2)


@contextmanager
def profiled(model):
    made = Profiler(model, 64, 3)
    with torch.inference_mode(), made.timed() as watch:
        yield lambda *kind, **more: made.sample(PassKind(*kind, **more), watch)


def test_the_parts_of_a_replayed_pass_are_those_of_the_device_and_the_host_is_one_more(model, device):
    with profiled(model) as sample:
        found = [sample(1, 16, 0) for _ in range(2)]  # in the first one the pass is recorded
        device.begin = 5.0
        found.append(sample(1, 16, 0))
    for passed in found:
        assert [name for name, _ in passed.parts] == ["begin", "lead", *LAYER, *LAYER[:3], "tail", "sample"]
    quick, slow = (dict(passed.parts) for passed in found[1:])
    assert quick.pop("begin") == pytest.approx(COPY + PIECE)
    assert slow.pop("begin") == pytest.approx(5.0 + PIECE)
    assert slow == pytest.approx(quick)
    assert quick["lead"] == pytest.approx(0.0, abs=1e-9)  # nothing but PyTorch's operators, which take no time here
    # KV and tiles; sorting, gathering, two products with a gate between them, combining
    assert quick["attention"] == pytest.approx(2 * KERNEL)
    assert quick["experts"] == pytest.approx(4 * KERNEL)


def test_where_operators_are_launched_one_by_one_the_device_waits_for_a_slow_host(model, device):
    with profiled(model) as sample:
        sample(1, 16, 0, 4)
        device.begin, device.eager = 5.0, 2 * KERNEL
        parts = dict(sample(1, 16, 0, 4).parts)
    assert "begin" not in parts
    assert parts["lead"] == pytest.approx(5.0)
    assert parts["attention"] == pytest.approx(4 * KERNEL)


def test_marks_belong_to_the_bucket_that_they_were_recorded_with(model, device):
    with profiled(model) as sample:
        for kind in ((1, 16, 0), (1, 40, 0), (3, 1, 8), (1, 1, 8)):
            sample(*kind)
            first = sample(*kind)
            for other in ((1, 16, 0), (2, 1, 4)):
                sample(*other)
            again = sample(*kind)
            assert [name for name, _ in again.parts] == [name for name, _ in first.parts]
            assert [s for _, s in again.parts] == pytest.approx([s for _, s in first.parts])


def test_routing_is_that_of_eager_passes_and_forced_experts_are_replayed(model, device, monkeypatch):
    kinds = [(1, 16, 0), (1, 40, 0), (3, 1, 8), (1, 16, 0, 4)]
    with profiled(model) as sample:
        replayed = [sample(*kind).routing for kind in kinds]
        forced = sample(1, 16, 0, forced_experts=2)
        assert sample(1, 16, 0).routing not in (forced.routing, replayed[0])  # other tokens
    assert forced.parts[0][0] == "begin"
    assert forced.routing == ((16, 16, 0, 0, 0, 0, 0, 0),) * 2
    assert replayed[3] == replayed[0]
    monkeypatch.setattr(profiler, "TimedRunner", TimedRunner)
    with profiled(model) as sample:
        assert [sample(*kind).routing for kind in kinds] == replayed


def test_what_is_recorded_without_a_clock_has_none_in_it(model, device):
    made = Profiler(model, 64, 3)
    with torch.inference_mode(), made.timed() as watch:
        made.sample(PassKind(1, 16, 0), watch)
        timed = made.runner.recorded
    with torch.inference_mode():
        made.switch_seconds()
    assert made.runner.recorded is not timed
    assert Bucket(1, 0) in made.runner.recorded
    assert watch.marks[-1][0] == "end"  # of the pass before


EXTENT = Extent(max_tokens=64, max_context=32, max_batch=3)


def test_a_calibration_through_replayed_passes_adds_up_to_the_whole_pass(model, device, tmp_path, monkeypatch):
    """Whatever the host takes for a pass is in its `host_s`, once; the steps are the device's."""
    monkeypatch.setattr(profiler, "ROUNDS", (2, 2))
    monkeypatch.setattr(profiler, "OFTEN", 1)
    monkeypatch.setattr("qllm.executor.calibration.calibrate.loop_seconds", lambda *_: LoopSeconds(7e-3, 1e-3))
    monkeypatch.setattr("qllm.executor.calibration.calibrate.wake_seconds", lambda _: 0.0)
    monkeypatch.setattr(Profiler, "bandwidth", lambda _: 1e9)
    device.begin = 5e-3
    path = tmp_path / "tiny.csv"
    calibrate(LoadedModel("tiny", model, 2, 1000, "random"), path, EXTENT)
    timings = Timings.load(path)
    kinds = pass_kinds(**vars(EXTENT), kv_tokens=10**9, experts=8, top_k=2)
    eager = [kind for kind in kinds if kind.query_blocks > 1 or kind.experts_per_group < 8]
    assert timings.conditions["kinds"] == len(kinds)
    assert timings.conditions["kinds_replayed"] == len(kinds) - len(eager)
    assert timings.host_s == pytest.approx(5e-3 + PIECE + 7e-3, abs=KERNEL)
    assert 0 < timings.attention_prefill(16, 0) < 3 * KERNEL
    with profiled(model) as sample:
        sample(1, 16, 0)
        whole = sample(1, 16, 0)
    steps = PassCostModel(timings)
    cost = steps.cost([(None, 16, 0)], 0, 0, 1)
    counts = torch.tensor(whole.routing).numpy()
    total = steps.total(cost, steps.experts_of_pass(cost, counts))
    assert total == pytest.approx(whole.seconds + 7e-3, rel=0.1)


def samples(parts: dict[str, float], routing=((4, 4),)) -> Samples:
    seconds = np.array([[*parts.values()]] * 3)
    return Samples(tuple(parts), seconds, np.array([routing] * 3))


def test_a_split_pass_is_compared_with_a_replayed_one_as_a_whole():
    """It is launched one by one, and all its parts take longer."""
    whole, split = PassKind(1, 8, 0), PassKind(1, 8, 0, experts_per_group=1)
    replayed = samples({"begin": 1.0, "lead": 1.0, "experts": 1.0})
    measured = {whole: replayed, split: samples({"lead": 4.0, "experts": 2.0})}
    assert [point.seconds for point in launch_points(measured, 1.0)] == [pytest.approx(3.0)]
    measured[whole] = samples({"lead": 2.0, "experts": 1.0})
    assert [point.seconds for point in launch_points(measured, 1.0)] == [pytest.approx(1.0)]


def test_what_splitting_an_attention_costs_is_read_from_passes_that_run_alike():
    blocks = {"query_blocks": 8}
    alike = {PassKind(1, 1024, 0): samples({"lead": 1.0, "attention": 9.0})}
    alike[PassKind(1, 1024, 0, **blocks)] = samples({"lead": 1.0, "attention": 9.8})
    mixed = {PassKind(1, 64, 0): samples({"begin": 0.5, "lead": 0.5, "attention": 1.0})}
    mixed[PassKind(1, 64, 0, **blocks)] = samples({"lead": 9.0, "attention": 2.0})
    assert query_block_seconds(alike | mixed, 1) == pytest.approx(0.1)
    assert query_block_seconds(mixed, 1) == pytest.approx(9 / 8)


def test_host_time_is_that_of_the_host_and_of_the_first_layers_way():
    one = samples({"begin": 3.0, "lead": 1.5, "pre": 1.0, "tail": 1.0})
    assert host_seconds({PassKind(1, 1, 0): one}) == pytest.approx(3.5)


def test_passes_that_were_measured_in_another_way_are_not_gone_on_with(tmp_path):
    store = MeasurementStore(tmp_path / "x", {})
    store.add(PassKind(1, 1, 0), stopwatch.PassTimes((("begin", 1.0), ("lead", 1.0)), ((1,),)))
    with pytest.raises(CalibrationError, match="another kind of passes"):
        store.add(PassKind(1, 1, 0), stopwatch.PassTimes((("lead", 1.0),), ((1,),)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    @pytest.fixture(scope="class")
    def model(self):
        return prepare_model(tiny_model("qwen3_moe", num_hidden_layers=2, max_position_embeddings=1024).cuda())

    @pytest.mark.parametrize(
        "kind", [PassKind(1, 16, 0), PassKind(3, 1, 64), PassKind(1, 600, 0), PassKind(1, 64, 0, 2)], ids=str
    )
    def test_parts_add_up_to_the_pass(self, model, kind):
        made = Profiler(model, 1024, 3)
        with torch.inference_mode(), made.timed() as watch:
            for _ in range(3):
                made.sample(kind, watch)
            told = [made.sample(kind, watch) for _ in range(20)]
            took = [self.whole_seconds(made, kind) for _ in range(20)]
        assert (told[0].parts[0][0] == "begin") == (kind.new < 600 and kind.experts_per_group > 8)
        assert all(seconds >= 0 for passed in told for _, seconds in passed.parts)
        # A pass that is cut waits at each of its parts' ends while it is timed: of a tiny one that is half of its time.
        most = 1.2 if kind.experts_per_group > 8 else 2.0
        assert 0.8 < np.median([passed.seconds for passed in told]) / np.median(took) < most

    @staticmethod
    def whole_seconds(made: Profiler, kind: PassKind) -> float:
        entries = made.sequences(kind)

        def run() -> None:
            running = made.runner.begin(entries, Split(kind.experts_per_group, kind.query_blocks))
            run_to_end(running)
            stopwatch.sample_greedily(running)

        with stopwatch.rewound(entries):
            return stopwatch.seconds_of(made.runner.device, run)

    def test_a_calibration_leaves_out_no_kind_of_pass(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr(profiler, "ACCELERATOR_S", 5.0)
        monkeypatch.setattr(engine_overhead, "PAUSES", 3)
        monkeypatch.setattr(engine_overhead, "PAUSE_S", 0.02)
        path = tmp_path / "tiny.csv"
        calibrate(LoadedModel("tiny", model, 2, 1000, "random"), path, Extent(600, 64, 3))
        timings = Timings.load(path)
        kinds = pass_kinds(max_tokens=600, max_context=64, max_batch=3, kv_tokens=10**9, experts=8, top_k=2)
        assert timings.conditions["kinds"] == len(kinds)
        assert timings.conditions["kinds_replayed"] > len(kinds) / 2
        assert 0 < timings.engine_loop_s < timings.host_s
