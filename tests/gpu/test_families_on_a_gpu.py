"""On a GPU every family gives the tokens of `generate` there: eagerly, and replayed where its passes are recorded."""

import pytest
import torch

from qllm.executor.errors import UnsupportedModelError
from qllm.executor.graphs.runner import GraphRunner
from qllm.executor.model.loading import prepare_model
from qllm.executor.testing import families, run_batch, tiny_model
from tests.executor.kept_worlds import generated, prompts, sequences

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
#: Refused, by an error of the device, after which nothing in its process can use the GPU.
BREAKS_THE_DEVICE = {"qwen4_exp", "qwen4_exp_text"}


@pytest.mark.parametrize("family", [family for family in families() if family not in BREAKS_THE_DEVICE])
def test_a_family_gives_the_tokens_of_generate(family):
    asked = prompts(5, 1, 21, 12)
    with torch.inference_mode():
        try:
            model = tiny_model(family).cuda()
            wanted = [generated(model, prompt) for prompt in asked]
        except Exception as error:  # no tiny model of it is known, or transformers cannot run it here
            pytest.skip(f"{type(error).__name__}: {error}")
        try:
            prepare_model(model)
        except UnsupportedModelError as error:
            pytest.skip(str(error))
        for graphs in ("off", "use"):
            runner = GraphRunner(model, 64, 4, graphs=graphs, max_seqs=4)
            runner.make_cache()
            assert run_batch(runner, sequences(asked), len(wanted[0])) == wanted, graphs
