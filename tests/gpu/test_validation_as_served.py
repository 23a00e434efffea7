"""Validation over replayed passes: what is recorded of a run, and that nothing waits for it meanwhile."""

import dataclasses
import threading

import numpy as np
import pytest
import torch

import qllm.executor.engine.engine as engine_module
from qllm.config.config import load_config
from qllm.executor.calibration import engine_overhead
from qllm.executor.calibration.engine_overhead import loop_seconds
from qllm.executor.engine.clock import RealClock
from qllm.executor.engine.engine import THREAD
from qllm.executor.engine.recorder import RunRecorder
from qllm.executor.engine.replay import replay
from qllm.executor.errors import EngineClosed, ExecutorError
from qllm.executor.graphs.runner import GraphRunner
from qllm.executor.model.loading import LoadedModel
from qllm.executor.model.runner import Runner, run_to_end
from qllm.experiment.engines import Engines
from qllm.experiment.run import runs
from qllm.scheduler import Limits, Scheduler, make_policy
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.testing import affine_timings
from qllm.validation.attribution import by_pass
from qllm.validation.validate import compare
from tests.gpu.plain import plain_kernels
from tests.gpu.tape import TapeRecorder
from tests.gpu.worlds import replaying, sequences, unpacked
from tests.qllm.test_validate import CONFIG

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")
assert plain_kernels  # a fixture of this module


@pytest.fixture(scope="module")
def model():
    return unpacked(num_hidden_layers=2)


@pytest.fixture
def runners(monkeypatch):
    """The runners of the engines that are made; each with the setting of graphs that it was given."""
    made = []

    def make(*args, **settings):
        given, settings["graphs"] = settings["graphs"], "use"  # all buckets take seconds
        made.append((given, GraphRunner(*args, **settings, kernels=True, recorder=TapeRecorder)))
        return made[-1][1]

    monkeypatch.setattr(engine_module, "GraphRunner", make)
    return made


def test_replayed_runs_are_compared_pass_by_pass(model, runners, tmp_path):
    sizes = {"layers": 2, "hidden": 64, "experts": 8, "top_k": 2, "kv_bytes_per_token": 512}
    affine_timings(**sizes, dtype="float32", model="tiny").save(tmp_path / "timings.csv")
    (tmp_path / "config.yaml").write_text(CONFIG)
    compared = [compare(run, LoadedModel.of("tiny", model)) for run in runs(load_config(tmp_path / "config.yaml"))]
    for one in compared:
        assert len(one.real.calls) == len(one.real.result.routing)
        for call, counts in zip(one.real.calls, one.real.result.routing, strict=True):
            assert counts.shape == (2, 8)
            assert (counts.sum(axis=1) == 2 * (call.prompt_tokens + call.n_decode)).all()
        assert one.requests()["finish_s"].notna().all()
    assert (by_pass(compared)["measured_s"] > 0).all()
    for given, runner in runners:
        assert given == "load"  # nothing is recorded in the time that is measured
        assert any(tape.replays for some in runner.recorded.values() for each in some for _, tape in each._pieces)


def test_one_engine_serves_the_runs_of_a_validation_and_records_once(model, runners, tmp_path, monkeypatch):
    """But for a policy that merges, whose passes are not replayed, or other limits; and where a run breaks."""
    loaded, clock = LoadedModel.of("tiny", model), RealClock()
    limits = Limits(max_seqs=4, max_batched_tokens=48, kv_blocks=60, block_size=4)
    others = dataclasses.replace(limits, max_seqs=2)
    merging = make_policy("qllm", merge=True)
    trace = RequestTrace(np.zeros(4), np.arange(4) * 9 + 3, np.full(4, 5), np.zeros(4, dtype=int), ("all",))

    def tokens_of(policy, limits):
        with engines.engine(policy, limits, clock, seed=0) as engine:
            result = replay(engine, trace, priorities={"all": 0})
            assert engine.scheduler.policy is policy
            assert result.passes == len(result.routing) > 0
            return [engine.submit([5, 6, 7], max_new_tokens=4, stop=()).result().tokens for _ in range(2)]

    with Engines(loaded, kept=True) as engines:
        want = tokens_of(make_policy("fcfs"), limits)
        recorded = {bucket: len(some) for bucket, some in runners[0][1].recorded.items()}
        for policy in (make_policy("layer"), make_policy("qllm")):
            assert tokens_of(policy, limits) == want
        assert len(runners) == 1
        assert {bucket: len(some) for bucket, some in runners[0][1].recorded.items()} == recorded
        for number, (policy, given) in enumerate([(merging, limits), (make_policy("fcfs"), limits), (merging, others)]):
            assert tokens_of(policy, given) == want
            assert len(runners) == 2 + number
        with pytest.raises(KeyError), engines.engine(merging, others, clock, seed=0) as engine:
            raise KeyError
        with pytest.raises(EngineClosed):
            engine.stats()
        assert tokens_of(make_policy("fcfs"), limits) == want
    assert not [thread for thread in threading.enumerate() if thread.name == THREAD]


def test_an_engine_that_serves_requests_keeps_its_scheduler(model, runners):
    limits = Limits(max_seqs=4, max_batched_tokens=48, kv_blocks=60, block_size=4)
    with Engines(LoadedModel.of("tiny", model)).engine(make_policy("fcfs"), limits, RealClock(), seed=0) as engine:
        stream = engine.submit([5, 6], max_new_tokens=50)
        with pytest.raises(ExecutorError, match="keeps its scheduler"):
            engine.call(lambda loop: loop.serve_by(Scheduler(make_policy("qllm"), engine.limits), RealClock()))
        stream.cancel()


def test_routing_is_kept_on_the_device_and_is_not_that_of_a_later_pass(model, monkeypatch):
    runner, recorder = replaying(model), RunRecorder(0.0, 0)
    with torch.inference_mode():
        for number, lengths in enumerate([(5, 9), (11,), (20, 3)]):
            running = runner.begin([(s, len(s.tokens)) for s in sequences(*lengths)])
            run_to_end(running)
            recorder.routing[number] = running.kept_routing()
            assert isinstance(recorder.routing[number], torch.Tensor)
    plain = Runner(model, 64, 4)
    want = []
    with torch.inference_mode():
        for lengths in [(5, 9), (11,), (20, 3)]:
            running = plain.begin([(s, len(s.tokens)) for s in sequences(*lengths)])
            run_to_end(running)
            assert isinstance(running.kept_routing(), list)
            want.append(running.routing)
    assert len(runner.recorded) == 1  # all by the same pieces
    assert np.array_equal(recorder.counts(), want)


def test_engines_of_a_calibration_record_what_they_use(model, runners, monkeypatch):
    """As on a GPU: no bucket that nothing fits, and no pass in groups of experts."""
    monkeypatch.setattr(engine_overhead, "as_served", lambda _: {"graphs": "use", "splitter": engine_overhead.whole})
    loop = loop_seconds(model, 2)
    ((given, runner),) = runners
    assert given == "use"
    assert 1 <= len(runner.recorded) <= 4
    assert 0 < loop.between < loop.all
