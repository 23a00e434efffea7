"""Step times that an engine measures on an accelerator: with a clock that prices passes the prices are found again."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor.engine import engine as engine_file
from qllm.executor.engine import step_costs
from qllm.executor.engine.engine import Engine
from qllm.executor.engine.step_costs import measured_splitter
from qllm.executor.graphs.runner import GraphRunner
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.packed_batch import Batch, Sequence
from qllm.executor.model.passes import current_pass
from qllm.executor.model.split import LinearSplitter, whole
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits
from tests.engine_worlds import make_model

EXPERTS, TOP_K = 8, 2
EXPERT, ROW, LAUNCH, CELL = 3e-4, 1e-5, 2e-5, 4e-8


class PricingTimer:
    """Moments of a device whose times are known: longer the first time, and in all but one of the repeats."""

    def __init__(self):
        self.now, self.passes, self.read_in_pass, self.running = 0.0, 0, 0, None

    def read(self):
        running = current_pass()
        if running is not self.running:
            self.passes, self.read_in_pass, self.running = self.passes + 1, 0, running
        rows = running.batch.rows
        layer, part = divmod(self.read_in_pass, 4)
        attention = 1e-3 + (0 if layer % 2 else CELL * rows * (rows + 1) / 2)  # every other one has a short window
        price = [0.0, attention, 1e-3, max(EXPERTS * EXPERT, LAUNCH + ROW * TOP_K * rows)][part]
        self.now += price * (1.0 if 7 <= self.passes <= 9 else 100.0 if self.passes <= 3 else 1.5)
        self.read_in_pass += 1
        return self.now

    def intervals(self, moments):
        return [after - before for before, after in pairwise(moments)]


@pytest.fixture(scope="module", params=[2, 10])
def runner(request, one_thread):
    model = prepare_model(tiny_model("qwen3_moe", num_hidden_layers=request.param))
    runner = GraphRunner(model, kv_blocks=64, block_size=4)
    runner.make_cache()
    return runner


def test_the_prices_of_a_clock_are_found_again(runner):
    found = measured_splitter(runner, EXPERTS, TOP_K, 0.01, timer=PricingTimer())
    assert (found.n_experts, found.top_k, found.max_step) == (EXPERTS, TOP_K, 0.01)
    assert (found.expert, found.row, found.launch, found.cell) == pytest.approx((EXPERT, ROW, LAUNCH, CELL), rel=1e-6)
    assert runner.model.config._attn_implementation == "qllm"
    assert runner.model.config._experts_implementation == "qllm"


def test_where_passes_are_short_nothing_is_measured_nor_cut(runner):
    splitter = measured_splitter(runner, EXPERTS, TOP_K, 1e-6, most_rows=100)
    batch = Batch([(Sequence([5] * 100, [*range(25)]), 100)], runner.cache)
    assert splitter(batch)[:2] == (EXPERTS, 1)


def test_a_device_without_memory_for_many_rows_measures_fewer(runner, monkeypatch):
    tried, real = [], step_costs._measure

    def measure(runner, sizes, times, timer):
        tried.append(sizes)
        if len(tried) == 1:
            raise torch.OutOfMemoryError
        real(runner, sizes, times, timer)

    monkeypatch.setattr(step_costs, "_measure", measure)
    monkeypatch.setattr(step_costs, "LEAST_ROWS", 100)
    found = measured_splitter(runner, EXPERTS, TOP_K, 0.01, timer=PricingTimer())
    assert tried == [(256, 128, 16), (128, 64, 16)]
    assert found.cell == pytest.approx(CELL, rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 100_000),
    st.sampled_from([(8, 2), (128, 8), (64, 1)]),
    st.floats(1e-4, 1.0),
    st.floats(0, 1e-4),
    st.floats(0, 1e-6),
    st.floats(0, 1e-3),
)
def test_a_layer_is_cut_into_the_fewest_groups_that_last_no_longer_than_a_step(
    rows, experts, step, expert, row, launch
):
    splitter = LinearSplitter(*experts, max_step=step, expert=expert, row=row, launch=min(launch, step / 2))
    n = experts[0]
    size = splitter(SimpleNamespace(rows=rows, prefill_cells=0)).experts_per_group
    if splitter.group_seconds(n, rows) <= step:
        assert size == n
    else:
        assert size < n or n == 1
        assert size == 1 or splitter.group_seconds(size, rows) <= step
        fewer = math.ceil(n / size) - 1
        assert splitter.group_seconds(math.ceil(n / fewer), rows) > step
    assert splitter.group_seconds(n, rows) == pytest.approx(max(expert * n, splitter.launch + row * rows * experts[1]))


class RunnerOfAGpu(GraphRunner):
    def make_cache(self):
        super().make_cache()
        self.device = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("made", "given", "expected"),
    [(GraphRunner, {}, "a CPU's"), (RunnerOfAGpu, {}, "measured"), (RunnerOfAGpu, {"splitter": whole}, "given")],
)
def test_an_engine_on_a_gpu_measures_its_steps_unless_it_is_told_how_to_split(
    one_thread, monkeypatch, made, given, expected
):
    def measured(*args, **kwargs):
        assert (args[1:], kwargs) == ((EXPERTS, TOP_K, 0.01), {"most_rows": 64})
        return "measured"

    monkeypatch.setattr(engine_file, "measured_splitter", measured)
    monkeypatch.setattr(engine_file, "GraphRunner", made)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    with Engine(make_model(), limits=Limits(max_seqs=2, max_batched_tokens=64, kv_blocks=20), **given) as engine:
        assert engine._runner.splitter == {"given": whole, "a CPU's": LinearSplitter(EXPERTS, TOP_K)}.get(
            expected, expected
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_measures_itself():
    model = prepare_model(tiny_model("qwen3_moe", max_position_embeddings=4096).cuda())
    runner = GraphRunner(model, kv_blocks=300, block_size=16)
    runner.make_cache()
    found = measured_splitter(runner, EXPERTS, TOP_K, 0.01)
    assert 0 < found.expert < 1e-3
    assert 0 <= found.row < 1e-5
    assert 0 < found.cell < 1e-7
    assert found.launch is not None
