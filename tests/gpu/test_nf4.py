"""Quantised experts where a GPU's kernels run: their products are plain ones, and nothing is recorded."""

from unittest import mock

import pytest
import torch

from qllm.executor.model import hooks
from qllm.executor.model.loading import load_model, prepare_model
from qllm.executor.model.runner import Runner
from qllm.executor.model.split import Split, whole
from qllm.executor.quantised.testing import quantise_checkpoint
from qllm.executor.testing import run_batch, tiny_model
from tests.executor.test_families import prompts, states
from tests.gpu.plain import plain_kernels
from tests.gpu.worlds import replaying

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")
assert plain_kernels  # a fixture of this module


@pytest.mark.parametrize(
    ("model_type", "method"), [("mixtral", "nf4"), ("gpt_oss", "nf4"), ("qwen3_moe", "fp8"), ("gpt_oss", "mxfp4")]
)
def test_tokens_are_those_of_a_cpus_passes(model_type, method, tmp_path):
    tiny = tiny_model(model_type, num_hidden_layers=2)
    with mock.patch.object(hooks, "pack_model", return_value=0), torch.inference_mode():
        if method == "nf4":
            model = prepare_model(tiny, experts="nf4")
        else:
            tiny.save_pretrained(tmp_path / "plain")
            quantise_checkpoint(tmp_path / "plain", tmp_path / "quantised", method, (32, 32))
            model = load_model(tmp_path / "quantised", experts="packed")
        want = run_batch(Runner(model, 40, 4), states(prompts()), 6)
        for split in (whole, lambda batch: Split(2, 3)):
            assert run_batch(Runner(model, 40, 4, split, kernels=True), states(prompts()), 6) == want
        runner = replaying(model, 40)
        assert run_batch(runner, states(prompts()), 6) == want
        assert (runner.graphs, runner.recorded) == ("off", {})
