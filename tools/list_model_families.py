"""Writes the tables of docs/models.md: what becomes of released checkpoints and of each model type of transformers.

    python tools/list_model_families.py [--check]

Each model type of the installed transformers is built tiny, with random weights, and put through the checks that a
checkpoint meets at load. Memory is computed on the meta device, where a model of any size takes none. A table stands
between `<!-- models: NAME -->` and `<!-- /models -->`. `--check` writes nothing, and fails where the page is out of
date.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from figure_parts.markdown import markdown
from released_checkpoints import OTHERS, TWENTY, Checkpoint, Quantised
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForMultimodalLM, DynamicCache, PreTrainedConfig

from qllm.executor.errors import UnsupportedModelError
from qllm.executor.latent.hook import METHOD, forms
from qllm.executor.model.checks import auto_class, check_config, expand_weights, load_code
from qllm.executor.model.hooks import PASS_THROUGH, drop_senses
from qllm.executor.model.info import ACCELERATOR_SHARE, ring_size
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.runner import declared_windows, window_of
from qllm.executor.quantised.experts import weights_bytes
from qllm.executor.quantised.packed import FORMS
from qllm.executor.recurrent.states import state_bytes
from qllm.executor.testing import families, tiny_config, tiny_model
from qllm.executor.unpacked.caches import unpacked_layers
from qllm.scheduler import Limits
from qllm.scheduler.memory import residents

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
MARKED = re.compile(r"(<!-- models: (\w+) -->\n).*?(<!-- /models -->)", re.DOTALL)
UNKNOWN = "not tried: no tiny configuration of it is known here"
SIZES = "qllm_sizes"  #: attention that notes what it is given
GPU_BYTES = 80 * 10**9
BLOCK = Limits().block_size
#: What errors say, and what that means.
PLAIN = {
    "index out of range": "the index of its sparse attention asks for the positions of all tokens",
    "DeepseekV4": "attends to compressed keys, which it keeps in a cache of its own",
    "ReferenceSlidingWindow": "attends to a part of the tokens that the engine does not know",
    "not causal": "its attention is not causal: it generates text by diffusion",
    "in two passes": "a prompt computed in two passes gives other logits than in one",
}


class Memory(NamedTuple):
    """What a model takes in bfloat16."""

    weights: int  #: bytes, of the text part
    kv: int  #: bytes a token, of layers that keep all tokens; 0: unknown
    state: int  #: bytes a sequence, of recurrent layers
    in_ring: int = 0  #: bytes a token, of layers that keep a window
    ring: int = 0  #: tokens that these keep of a sequence on a GPU


def config_of(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The configuration of a released checkpoint, as far as its sizes go."""
    return CONFIG_MAPPING[checkpoint.model_type](**(checkpoint.sizes or {}))


def memory_of(config: PreTrainedConfig) -> Memory:
    """Memory of a model, computed from one token without any weights."""
    kept: list[int] = []
    windowed: list[int] = []
    windows, numbers = declared_windows(config), itertools.count()
    expanding: list[int] = []
    unpacked = unpacked_layers(config)

    def attention(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        number = next(numbers)
        window = kwargs.get("sliding_window") or (windows[number] if number < len(windows) else None)
        if module.layer_idx not in unpacked and not hasattr(module, METHOD):
            (windowed if largest and window else kept).append(key.nbytes + value.nbytes)
        rows, heads = query.shape[2], query.shape[1]
        return query.new_empty((query.shape[0], rows, heads, value.shape[-1])), None

    AttentionInterface.register(SIZES, attention)
    with torch.device("meta"), torch.inference_mode():
        model = auto_class(config).from_config(config, dtype=torch.bfloat16).eval()
        model.set_experts_implementation(PASS_THROUGH)  # where rows go would depend on numbers
        model.set_attn_implementation(SIZES)
        latent = [m for m in model.modules() if hasattr(m, METHOD) and m.layer_idx not in unpacked]
        for module in latent:
            note_latents(module, kept, expanding)
        largest = 0 if latent else window_of(model) or 0
        called: set[torch.nn.Module] = set()
        recorder = register_module_forward_pre_hook(lambda module, _: called.add(module))
        try:
            cache = model(input_ids=torch.ones((1, 1), dtype=torch.int64), use_cache=True).past_key_values
        except NotImplementedError:  # numbers decide what is attended, and there are none
            return Memory(weights_of(model) + sum(expanding), 0, 0)
        finally:
            recorder.remove()
    drop_senses(model, called)
    for layer in (cache.layers[i] for i in unpacked):  # of these the engine keeps what transformers does
        found = (layer.keys, layer.values, getattr(layer, "indexer_keys", None))
        kept += [tensor.nbytes for tensor in found if tensor is not None]
    ring = BLOCK * ring_size(largest, BLOCK, kernels=True)
    return Memory(weights_of(model) + sum(expanding), sum(kept), state_bytes(cache), sum(windowed), ring)


def note_latents(module: Any, kept: list[int], expanding: list[int]) -> None:
    """Have latent attention note what it keeps of a token, and the matrices by which queries meet latents."""
    expand = getattr(module, METHOD)

    def noted(latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = expand(latent, rotary)
        kept.append(latent.nbytes + rotary.nbytes)
        width = keys.shape[-1] - rotary.shape[-1] + values.shape[-1]
        expanding.append(keys.shape[1] * width * latent.nbytes)
        return keys, values

    setattr(module, METHOD, noted)


def weights_of(model: torch.nn.Module) -> int:
    """Bytes of a model's weights, shared ones once, and of the matrices by which queries meet latents."""
    return sum(parameter.nbytes for parameter in model.parameters()) + sum(form.nbytes for form in forms(model))


@functools.cache
def verdict(model_type: str) -> str:
    """Empty where a model of that type is served, else the reason why not."""
    try:
        tiny_config(model_type)
    except Exception:  # a class of configurations may ask for anything
        return UNKNOWN
    try:
        prepare_model(tiny_model(model_type))
    except UnsupportedModelError as error:
        return str(error).removeprefix(f"{model_type}: ")
    except Exception:  # sizes that do not fit each other
        return UNKNOWN
    return ""


def in_plain_words(reason: str) -> str:
    return next((told for found, told in PLAIN.items() if found in reason), reason)


def keeps(config: PreTrainedConfig) -> str:
    """What a model keeps of a sequence."""
    text = config.get_text_config(decoder=True)
    text.allow_global_per_layer_attribute_access = True
    load_code(config)
    layers = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    both = any(name.startswith("LinearAttentionAnd") for name in layers)
    found = []
    if both or layers & {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        found.append("latent attention" if getattr(text, "kv_lora_rank", None) else "attention")
    if any("SlidingWindow" in name for name in layers):
        found.append("sliding windows")
    if "DynamicIndexedLayer" in layers:
        found.append("sparse attention")
    if not all(name.startswith(("Dynamic", "Dummy", "LinearAttention")) for name in layers):
        found.append("layers of its own")
    if both:
        found.append("a recurrent state in the same layer")
    if "LinearAttentionLayer" in layers:
        mamba = any(name.startswith(("mamba", "ssm")) for name in vars(text))
        conv = "conv" in (getattr(text, "layer_types", None) or ())
        found.append("convolution" if conv else "state space" if mamba else "linear attention")
    return ", ".join(found)


def short(number: int, unit: int) -> str:
    """`number` in units, three digits at most."""
    value = number / unit
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def fits(memory: Memory) -> str:
    """Whether a model fits a GPU of 80 GB, and KV of how many tokens beside it."""
    resident = residents(Limits().max_seqs, None)
    left = ACCELERATOR_SHARE * (GPU_BYTES - memory.weights) - resident * memory.state
    if left <= 0 or not memory.kv:
        return "no" if left <= 0 else "-"
    rings = resident * memory.ring * memory.in_ring
    tokens = int(max(left / (memory.kv + memory.in_ring), (left - rings) / memory.kv)) // 1000
    return f"yes, KV of {tokens:,},000 tokens" if tokens else "no"


def checkpoints() -> str:
    """The twenty: served or not, and the memory that they take."""
    columns = ("checkpoint", "model type", "served", "fits 80 GB", "weights")
    columns += ("KV a token", "windows a sequence", "state a sequence", "sizes")
    return markdown(columns, map(row_of, TWENTY))


def row_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Its row in the table."""
    name = checkpoint.name + (f" ({checkpoint.like})" if checkpoint.like else "")
    source = "default" if checkpoint.sizes is None else "config.json"
    config = config_of(checkpoint)
    reason, memory = in_plain_words(refusal(config)), memory_of(config)
    told = (f"no: {reason}", "-") if reason else ("yes", fits(memory))
    sizes = [f"{short(memory.weights, 10**9)} GB"]
    sizes += [f"{short(memory.kv, 10**3)} kB" if memory.kv and not reason else "-"]
    for kept in (memory.ring * memory.in_ring, memory.state):
        sizes.append(f"{short(kept, 10**6)} MB" if kept and not reason else "-")
    return name, f"`{checkpoint.model_type}`", *told, *sizes, source


def refusal(config: PreTrainedConfig) -> str:
    """Empty where a configuration and a tiny model of its type are served, else the reason why not."""
    try:
        check_config(config)
    except UnsupportedModelError as error:
        return str(error)
    return verdict(config.model_type)


def types() -> str:
    """Every model type: what it keeps of a sequence, and whether it is served."""
    rows = [type_row(name) for name in families()]
    served = sum(row[2].startswith("yes") for row in rows)
    told = f"transformers {transformers.__version__}: {served} of {len(rows)} model types are served."
    return told + "\n\n" + markdown(("model type", "keeps of a sequence", "served"), rows)


def type_row(name: str) -> tuple[str, ...]:
    """Its row in the table."""
    config = config_to_show(name)
    reason = in_plain_words(refusal(config))
    text = ", text only" if auto_class(config) is AutoModelForMultimodalLM else ""
    served = f"yes{text}" if not reason else reason if reason == UNKNOWN else f"no: {reason}"
    return f"`{name}`", keeps(config), served


def config_to_show(name: str) -> PreTrainedConfig:
    """A tiny configuration of a model type, where one is known, else the default."""
    try:
        return tiny_config(name)
    except Exception:  # a class of configurations may ask for anything
        return CONFIG_MAPPING[name]()


def quantised() -> str:
    """How released checkpoints hold their weights, and what becomes of that."""
    rows = []
    for row in OTHERS:
        size = f"{2 * row.billions:.0f} GB"
        held = f"{row.method}, {size} in bfloat16" if row.method else f"bfloat16, {size}"
        rows.append((row.name, f"`{row.model_type}`", held, outcome(row), packed(row)))
    return markdown(("checkpoint", "model type", "weights", "result", "with `--experts packed`"), rows)


def packed(checkpoint: Quantised) -> str:
    """What the weights of a released checkpoint take whose experts stay packed, the others in bfloat16."""
    if checkpoint.method not in FORMS:
        return "-"
    config = CONFIG_MAPPING[checkpoint.model_type](**(checkpoint.sizes or {}))
    config.quantization_config = {"quant_method": checkpoint.method, "weight_block_size": checkpoint.block}
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=torch.bfloat16)
    return f"{short(weights_bytes(model, 'packed'), 10**9)} GB"


def outcome(checkpoint: Quantised) -> str:
    """What the loader makes of a released checkpoint."""
    if reason := verdict(checkpoint.model_type):
        return f"refused: {in_plain_words(reason)}"
    if checkpoint.method is None:
        return "loads"
    config = tiny_config(checkpoint.model_type)
    config.quantization_config = {"quant_method": checkpoint.method}
    try:
        expand_weights(config)
    except UnsupportedModelError:
        return "refused: transformers cannot expand them"
    return "loads, expanded"


TABLES: dict[str, Callable[[], str]] = {made.__name__: made for made in (checkpoints, types, quantised)}


def with_tables(text: str) -> str:
    """`text` with every marked table written anew."""
    transformers.logging.set_verbosity_error()
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    held = PAGE.read_text(encoding="utf-8")
    made = with_tables(held)
    if not check:
        PAGE.write_text(made, encoding="utf-8")
    elif made != held:
        sys.exit("docs/models.md is out of date: run python tools/list_model_families.py")


if __name__ == "__main__":
    main()
