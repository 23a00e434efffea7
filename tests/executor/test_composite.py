"""Composite models are served text only: what sees and hears takes no memory, and one line says so."""

import logging

import pytest

from qllm.executor.model.loading import prepare_model
from qllm.executor.quantised.experts import weights_bytes
from qllm.executor.testing import tiny_model
from tests.executor.kept_worlds import generated, in_chunks, prompts

pytestmark = pytest.mark.usefixtures("one_thread")
LEFT = {
    "qwen3_vl_moe": ("model.visual",),
    "qwen3_omni_moe_thinker": ("model.audio_tower", "model.visual"),
    "minimax_m3_vl": ("model.vision_tower", "model.multi_modal_projector"),
    "qwen3_5_moe": (),  # its text model is a class of its own
    "qwen3_moe": (),
}


@pytest.mark.parametrize(("name", "left"), LEFT.items())
def test_what_sees_and_hears_is_left_out_and_text_stays_the_same(name, left, caplog) -> None:
    model = tiny_model(name)
    asked, parts = prompts(5, 12), [model.get_submodule(part) for part in left]
    wanted = [generated(model, prompt) for prompt in asked]
    size = sum(weight.nbytes for part in parts for weight in part.parameters())
    before = weights_bytes(model)
    with caplog.at_level(logging.WARNING):
        prepare_model(model)
    assert weights_bytes(model) == before - size
    assert [part for part in left if f"{part} (" in caplog.text] == list(left)
    assert ("text only; left out" in caplog.text) == bool(left)
    assert in_chunks(model, asked, [4]) == wanted
