"""Validation over replayed passes: what is recorded of a run, and that nothing waits for it meanwhile."""

import numpy as np
import pytest
import torch

import qllm.executor.engine.engine as engine_module
from qllm.config.config import load_config
from qllm.executor.calibration import engine_overhead
from qllm.executor.calibration.engine_overhead import loop_seconds
from qllm.executor.engine.recorder import RunRecorder
from qllm.executor.graphs.runner import GraphRunner
from qllm.executor.model.loading import LoadedModel
from qllm.executor.model.runner import Runner, run_to_end
from qllm.experiment.run import runs
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
