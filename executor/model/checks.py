"""Which models can be served: checks of the configuration, and of the loaded model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from qllm.executor.errors import UnsupportedModelError
from qllm.executor.model.hooks import NAME, PASS_THROUGH
from qllm.executor.model.info import embedding
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.passes import RunningPass
from qllm.executor.model.runner import Runner, declared_windows, run_to_end
from qllm.executor.recurrent.mixers import mix_one_by_one
from qllm.executor.recurrent.states import KNOWN
from qllm.executor.unpacked.caches import is_unpacked

PROBE_TOKENS = 8
MOST_WORDS = 300  # characters of another library's message
NO_POINT = "no layer has experts behind transformers' experts interface, so a pass cannot stop between experts"


def words(error: Exception) -> str:
    """What an error of another library says, in one line."""
    told = shorten(str(error), MOST_WORDS, placeholder=" ...")
    plain = isinstance(error, OSError | ValueError | ImportError) and told
    return told if plain else f"{type(error).__name__}: {told}"


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that makes the language model: a composite model is made whole, and gets text only.

    Raises UnsupportedModelError where there is none.
    """
    known = {
        AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForMultimodalLM: MODEL_FOR_MULTIMODAL_LM_MAPPING,
    }
    for auto, mapping in known.items():
        if type(config) in mapping or auto.__name__ in (getattr(config, "auto_map", None) or {}):
            return auto
    raise UnsupportedModelError(f"{config.model_type}: transformers has no language model of this type")


def load_code(config: PreTrainedConfig) -> None:
    """Import the model's code, which may define layers of its cache: before, transformers does not know of them."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
        if type(config) in mapping:
            mapping[type(config)]


def check_config(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError for what the configuration alone rules out."""
    name = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name}: encoder-decoder models are not supported")
    load_code(config)
    try:
        layers = DynamicCache(config=config).layers
    except KeyError as error:
        raise UnsupportedModelError(f"{name}: keeps state outside attention (layers of type {error})") from error
    other = {type(layer).__name__ for layer in layers if type(layer) not in KNOWN and not is_unpacked(layer)}
    if other:
        raise UnsupportedModelError(f"{name}: keeps state outside attention (cache layers {', '.join(sorted(other))})")
    types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if "chunked_attention" in types:
        raise UnsupportedModelError(f"{name}: chunked attention is not supported")


def expand_weights(config: PreTrainedConfig) -> str | None:
    """Have quantised weights expanded while they are read, whatever the device could do with them; their method.

    Experts that stay packed do not go through the experts interface. Raises UnsupportedModelError where transformers
    cannot expand them.
    """
    owners = [c for c in (config, config.get_text_config(decoder=True)) if getattr(c, "quantization_config", None)]
    if not owners:
        return None
    given = owners[0].quantization_config
    if not isinstance(given, Mapping):
        raise UnsupportedModelError(f"{config.model_type}: quantization_config is {given!r}; allowed: a mapping")
    bits = next((bits for bits in ("4bit", "8bit") if given.get(f"load_in_{bits}")), None)
    method = f"bitsandbytes_{bits}" if bits else str(given.get("quant_method"))
    expanded = [name for name, made in AUTO_QUANTIZATION_CONFIG_MAPPING.items() if _expands(made)]
    if method not in expanded:
        raise UnsupportedModelError(
            f"{config.model_type}: its weights are quantised ({method}), and transformers cannot expand them at load; "
            f"allowed: a checkpoint in bfloat16, float16 or float32, or one that can be expanded "
            f"({', '.join(sorted(expanded))})"
        )
    owners[0].quantization_config = {**given, "dequantize": True}
    return method


def _expands(made: type) -> bool:
    parameters = inspect.signature(made).parameters
    return "dequantize" in parameters and "gguf_file" not in parameters  # a GGUF file is no checkpoint's folder


def check_layers(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where no layer holds experts of the interface; they need no memory."""
    if not any(hasattr(module, "is_transposed") for module in model.modules()):  # what the interface sets
        raise UnsupportedModelError(f"{model.config.model_type}: {NO_POINT}")


def check_model(model: PreTrainedModel) -> set[torch.nn.Module]:
    """Run a tiny input through the hooks, which stay on; the modules that a pass calls.

    Raises UnsupportedModelError where the model ignores the hooks.
    """
    try:
        return _check_model(model)
    except UnsupportedModelError:
        if not mix_one_by_one(model):
            raise
        return _check_model(model)


def _check_model(model: PreTrainedModel) -> set[torch.nn.Module]:
    # Two passes over a prompt, the second packed with another sequence, against the model's own logits in one pass:
    # state outside attention is lost between. Experts return their input here, since in half precision rounding alone
    # changes a token's experts.
    name = model.config.model_type
    try:
        expected, logits, running, called = _compare(model)
    except UnsupportedModelError:
        raise
    except Exception as broken:
        raise UnsupportedModelError(f"{name}: a pass over {PROBE_TOKENS} tokens breaks: {words(broken)}") from broken
    if not running.routing:
        raise UnsupportedModelError(f"{name}: {NO_POINT}")
    if not any(map(any, running.routing)):
        raise UnsupportedModelError(f"{name}: its tokens go to no expert")
    check_windows(model.config, declared_windows(model.config), running.windows)
    if not expected.isfinite().all():
        raise UnsupportedModelError(
            f"{name}: its logits are not finite: the weights are damaged, or too large for {str(model.dtype)[6:]}"
        )
    error, size = (logits - expected).float().norm(), expected.float().norm()
    # Rounding alone: 1e-6 in float32, 2e-2 in bfloat16; lost state is of the order of 1.
    if error > size * (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1) or error.isnan():
        raise UnsupportedModelError(
            f"{name}: a prompt computed in two passes gives other logits than in one (relative error "
            f"{error / size:.2g}): it keeps state outside attention, or attends in a way that the hook does not know"
        )
    return called


def _compare(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, RunningPass, set[torch.nn.Module]]:
    """Logits of one pass without the hooks and of two with them; a pass through the model's own experts.

    Also the modules that it calls: of the others another one may read a weight.
    """
    called: set[torch.nn.Module] = set()
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
        recorder = register_module_forward_pre_hook(lambda module, _: called.add(module))
        try:
            _, running = probe(model, prompt)
        finally:
            recorder.remove()
    return expected, logits, running, called


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
