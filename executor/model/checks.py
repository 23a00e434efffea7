"""Which models can be served: checks made at load, before the first request."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qllm.executor.errors import UnsupportedModelError
from qllm.executor.model.hooks import NAME, PASS_THROUGH
from qllm.executor.model.info import embedding
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.passes import RunningPass
from qllm.executor.model.runner import Runner, declared_windows, run_to_end

PROBE_TOKENS = 8


def check_config(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError for what the configuration alone rules out."""
    name = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name}: encoder-decoder models are not supported")
    try:
        layers = DynamicCache(config=config).layers
    except KeyError as error:
        raise UnsupportedModelError(f"{name}: keeps state outside attention (layers of type {error})") from error
    other = {type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if other:
        raise UnsupportedModelError(f"{name}: keeps state outside attention (cache layers {', '.join(sorted(other))})")
    types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if "chunked_attention" in types:
        raise UnsupportedModelError(f"{name}: chunked attention is not supported")


def check_model(model: PreTrainedModel) -> None:
    """Run a tiny input through the hooks, which stay on. Raise UnsupportedModelError where the model ignores them."""
    # Two passes over a prompt, the second packed with another sequence, against the model's own logits in one pass:
    # state outside attention is lost between. Experts return their input here, since in half precision rounding alone
    # changes a token's experts.
    name = model.config.model_type
    vocab = embedding(model).num_embeddings
    prompt = [(7 * i + 3) % vocab for i in range(PROBE_TOKENS)]
    with torch.inference_mode():
        model.set_experts_implementation(PASS_THROUGH)
        model.set_attn_implementation("eager")
        ids = torch.tensor([prompt], device=model.device)
        expected = model(input_ids=ids, use_cache=False).logits[0, -1]
        model.set_attn_implementation(NAME)
        logits, _ = probe(model, prompt)
        model.set_experts_implementation(NAME)
        _, running = probe(model, prompt)
    if not running.routing:
        raise UnsupportedModelError(
            f"{name}: its experts do not go through transformers' experts interface, "
            "so a pass cannot stop between experts"
        )
    check_windows(model.config, declared_windows(model.config), running.windows)
    error = (logits - expected).float().norm() / expected.float().norm()
    # Rounding alone: 1e-6 in float32, 2e-2 in bfloat16; lost state is of the order of 1.
    if not error <= (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1):
        raise UnsupportedModelError(
            f"{name}: a prompt computed in two passes gives other logits than in one (relative error {error:.2g}): "
            "it keeps state outside attention, or attends in a way that the hook does not know"
        )


def probe(model: PreTrainedModel, prompt: list[int]) -> tuple[torch.Tensor, RunningPass]:
    """Logits `[vocab]` after `prompt` in two passes, and the second of them, which another sequence shares."""
    runner = Runner(model, kv_blocks=4, block_size=PROBE_TOKENS)
    sequence, other = Sequence(prompt, [2]), Sequence(prompt[1:4], [0])
    half = PROBE_TOKENS // 2
    run_to_end(runner.begin([(sequence, half)]))
    running = runner.begin([(sequence, PROBE_TOKENS - half), (other, 3)])
    logits = run_to_end(running)
    return logits[[entry.seq for entry in running.sampled].index(sequence)], running


def check_windows(config: PreTrainedConfig, windows: list[int | None], told: list[int | None]) -> None:
    """Raise UnsupportedModelError where a layer told (None: left to its mask) another window than it declares."""
    if not told:
        raise UnsupportedModelError(f"{config.model_type}: its attention does not go through the attention interface")
    if len(told) != len(windows) or any(t is not None and t != w for t, w in zip(told, windows, strict=True)):
        raise UnsupportedModelError(
            f"{config.model_type}: sliding windows {windows} by configuration, but attention was told {told}"
        )
