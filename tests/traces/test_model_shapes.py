"""Sizes of a model: impossible ones are refused, and weights count as their type says."""

from dataclasses import replace

import pytest

from qllm.traces import SHAPES, TimingError
from qllm.traces.step_times.model_shapes import WEIGHT_BYTES

QWEN = SHAPES["qwen3-30b-a3b"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top_k": 999}, r"top_k is 999, must be at most experts \(128\)"),
        ({"kv_heads": 64}, r"kv_heads is 64, must be at most heads \(32\)"),
        ({"kv_heads": 5}, r"heads is 32, must be a multiple of kv_heads \(5\)"),
        ({"layers": 0}, "layers is 0, must be a whole number of at least 1"),
        ({"layers": 10**8}, "layers x experts is 12800000000, must be at most 16777216"),
        ({"hidden": "2048"}, "hidden is '2048', must be a whole number"),
        ({"hidden": 2048.0}, "hidden is 2048.0, must be a whole number"),
        ({"vocab": True}, "vocab is True, must be a whole number"),
        ({"inter": 10**30}, "inter is 10+, must be a whole number"),
        ({"tied": 1}, "tied is 1, must be true or false"),
        ({"name": ""}, "name is '', must be a text"),
        ({"window": 128}, "window is 128 and window_layers is 0: both or none"),
        ({"window": 128, "window_layers": 49}, r"window_layers is 49, must be at most layers \(48\)"),
        ({"dense_layers": 48, "dense_inter": 1}, r"dense_layers is 48, must be less than layers \(48\)"),
        ({"dense_layers": 1}, "dense_layers is 1 and dense_inter is 0: both or none"),
        ({"max_context": -1}, "max_context is -1, must be a whole number of at least 0"),
    ],
)
def test_an_impossible_size_is_named(changed, message):
    with pytest.raises(TimingError, match=f"model '.*': {message}"):
        replace(QWEN, **changed)


@pytest.mark.parametrize(("kind", "bits"), [("fp8", 8), ("mxfp4", 4.25), ("nvfp4", 4.5), ("int4", 4.125), ("bf16", 16)])
def test_weights_take_their_type_and_its_scales(kind, bits):
    assert 8 * WEIGHT_BYTES[kind] == bits
    experts = QWEN.layers * QWEN.experts * QWEN.expert_weights
    assert QWEN.weights_bytes(kind, "bf16") == round(experts * bits / 8 + 2 * QWEN.other_weights())
