"""What an engine on a GPU runs before it serves."""

import pytest
import torch

from qllm.executor.engine import engine as engine_file
from qllm.executor.engine import warm_up as warm_up_file
from qllm.executor.engine.engine import Engine
from qllm.executor.engine.warm_up import warm_up
from qllm.executor.graphs.runner import GraphRunner
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.passes import RunningPass
from qllm.executor.model.split import Split
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits
from tests.engine_worlds import make_model


@pytest.fixture
def runner(one_thread, monkeypatch):
    monkeypatch.setattr(warm_up_file, "REGULAR", 16)
    runner = GraphRunner(prepare_model(tiny_model("qwen3_moe", num_hidden_layers=3)), kv_blocks=25, block_size=4)
    runner.make_cache()
    return runner


@pytest.fixture(autouse=True)
def switch_intervals(monkeypatch):
    """Those that are set; none is, since other tests follow."""
    asked = []
    monkeypatch.setattr(warm_up_file.sys, "setswitchinterval", asked.append)
    return asked


@pytest.fixture
def ran(monkeypatch):
    """Rows and layers of the passes that are closed."""
    ran, close = [], RunningPass.close

    def closes(running):
        ran.append((running.batch.rows, running.layer))
        close(running)

    monkeypatch.setattr(RunningPass, "close", closes)
    return ran


@torch.inference_mode()
def test_the_first_layers_of_each_regular_length_run_once_and_one_that_leaves_a_rest(runner, ran):
    for most, lengths in ((15, []), (16, [16]), (50, [16, 17, 32, 48]), (1000, [16, 17, 32, 48, 64, 80, 96])):
        warm_up(runner, most)
        assert ran == [(n, 2) for n in lengths]
        ran.clear()


@torch.inference_mode()
def test_other_threads_give_way_sooner_unless_they_do_already(runner, switch_intervals, monkeypatch):
    warm_up(runner, 1)
    monkeypatch.setattr(warm_up_file.sys, "getswitchinterval", lambda: 1e-5)
    warm_up(runner, 1)
    assert switch_intervals == [5e-4, 1e-5]


@torch.inference_mode()
def test_prompts_whose_attention_is_cut_are_left_out(runner, ran):
    runner.splitter = lambda batch: Split(1, 2 if batch.rows > 32 else 1)
    warm_up(runner, 1000)
    assert ran == [(16, 2), (17, 2), (32, 2)]


@torch.inference_mode()
def test_where_time_or_memory_end_the_rest_is_left_to_its_first_use(runner, ran, monkeypatch, caplog):
    monkeypatch.setattr(warm_up_file, "MOST_SECONDS", 0.0)
    warm_up(runner, 50)
    assert ran == [(16, 2)]

    def without_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(warm_up_file, "run_first_layers", without_memory)
    warm_up(runner, 50)
    assert "prompts of 16 tokens could not be warmed up" in caplog.text


class RunnerOfAGpu(GraphRunner):
    def make_cache(self):
        super().make_cache()
        self.device = torch.device("cuda:0")


def test_an_engine_warms_up_in_the_thread_that_serves_on_a_gpu_alone(one_thread, monkeypatch):
    asked = []
    monkeypatch.setattr(engine_file, "measured_splitter", lambda *_, **__: engine_file.LinearSplitter(8, 2))
    monkeypatch.setattr(
        engine_file, "warm_up", lambda runner, most: asked.append((engine_file.threading.current_thread().name, most))
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    limits = Limits(max_seqs=2, max_batched_tokens=64, kv_blocks=20)
    Engine(make_model(), limits=limits).close()
    assert not asked
    monkeypatch.setattr(engine_file, "GraphRunner", RunnerOfAGpu)
    Engine(make_model(), limits=limits).close()
    assert asked == [(engine_file.THREAD, 64)]
