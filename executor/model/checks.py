"""Which models can be served: checks of the configuration, of the weights' files, and of the loaded model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from qllm.executor.errors import LoadError, UnsupportedModelError
from qllm.executor.model.hooks import NAME, PASS_THROUGH
from qllm.executor.model.info import embedding
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.passes import RunningPass
from qllm.executor.model.runner import Runner, declared_windows, run_to_end
from qllm.executor.quantised.left_out import settings_of
from qllm.executor.quantised.packed import Header
from qllm.executor.recurrent.mixers import mix_one_by_one
from qllm.executor.recurrent.states import KNOWN
from qllm.executor.unpacked.caches import is_unpacked

PROBE_TOKENS = 8
PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")  # types in a file of weights that are not quantised
FP8 = "F8_E4M3"
MOST_WORDS = 300  # characters of another library's message
LFS = b"version https://git-lfs"  # how a file begins in a clone without its contents
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


def check_config(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError for what the configuration alone rules out."""
    name = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name}: encoder-decoder models are not supported")
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


def read_headers(name: str) -> dict[str, Header]:
    """The weights in a checkpoint's safetensors files, fetched where they lie on a hub. Raises LoadError."""
    return {weight: header for file in weight_files(name) for weight, header in read_header(file).items()}


def check_files(headers: Mapping[str, Header], config: PreTrainedConfig, method: str | None) -> None:
    """Raise LoadError for weights, quantised by `method`, that transformers would misread."""
    packed = next((name for name, header in headers.items() if header.dtype not in PLAIN), None)
    if packed is not None and method is None:
        raise LoadError(
            f"{packed} is quantised ({headers[packed].dtype}), but config.json has no quantization_config; allowed: a "
            "checkpoint in bfloat16, float16 or float32, or one that says how to expand it"
        )
    block = (settings_of(config) or {}).get("weight_block_size")
    for name, header in headers.items():
        if method == "fp8" and header.dtype == FP8 and not any(scales in headers for scales in _names_of_scales(name)):
            raise LoadError(f"its files lack {name}_scale_inv, the scales of {name}")
        weight = headers.get(name.removesuffix("_scale_inv"))
        scales = header.shape
        if block is None or weight is None or len(scales) != 2 or not name.endswith("_scale_inv"):
            continue
        # transformers cuts rows and columns into as many equal blocks as there are scales
        if any(n > 1 and size % of for n, size, of in zip(scales, weight.shape[-2:], block, strict=True)):
            raise LoadError(f"{name}: blocks of {block} do not divide {weight.shape}, and would be misread")


def _names_of_scales(weight: str) -> list[str]:
    stem = weight.removesuffix("weight")
    return [f"{weight}_scale_inv", f"{weight}_scale", f"{stem}scale", f"{stem}qscale_weight"]


def weight_files(name: str) -> list[Path]:
    """A checkpoint's safetensors files; none where its weights are of another kind. Raises LoadError."""
    try:
        single = cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if single is not None:
            return [Path(single)]
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        return [] if index is None else [Path(file) for file in get_checkpoint_shard_files(name, index)[0]]
    except Exception as error:  # the index is a file that anybody may have written
        raise LoadError(f"{SAFE_WEIGHTS_INDEX_NAME} cannot be read ({words(error)})") from None


def read_header(file: Path) -> dict[str, Header]:
    """The weights in a safetensors file. Raises LoadError."""
    try:
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
            return {name: Header(part.get_dtype(), part.get_shape(), file) for name, part in parts.items()}
    except (OSError, SafetensorError) as error:
        if not file.is_file():
            raise LoadError(f"{file.name} is missing; the index names it") from None
        with file.open("rb") as opened:
            pointer = opened.read(len(LFS)) == LFS
        told = "a Git LFS pointer; run git lfs pull" if pointer else f"damaged ({words(error)}); fetch it again"
        raise LoadError(f"{file.name} is {told}") from None


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
