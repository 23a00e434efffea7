"""What a model is made of, and how much of it fits its device."""

from __future__ import annotations

import copy
import logging
import os
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from qllm.executor.errors import KVMemoryError
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import whole
from qllm.executor.quantised.experts import experts_form
from qllm.executor.recurrent.states import state_bytes

CPU_SHARE = 0.25  # of the memory that is free, for KV, where nobody says how much
ACCELERATOR_SHARE = 0.8

log = logging.getLogger(__name__)


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What a timing trace must agree on with `model`, seen in a pass over one token."""
    # `layers` counts those that mix tokens. A trace has no key for moe_layers, kv_bytes_per_token (of all these layers)
    # and state_bytes (of a sequence, in its recurrent layers).
    runner, sequence = Runner(model, kv_blocks=1, block_size=2, splitter=whole), Sequence([1], [0])
    with torch.inference_mode():
        running = runner.begin([(sequence, 1)])
        run_to_end(running)
    return {
        "layers": running.layer + 1,
        "hidden": embedding(model).weight.shape[1],
        "experts": len(running.routing[0]),
        "top_k": sum(running.routing[0]),
        "dtype": dtype_name(model),
        "moe_layers": len(running.routing),
        "kv_bytes_per_token": runner.cache.bytes_per_block() // 2,
        "state_bytes": state_bytes(sequence.recurrent),
    }


def dtype_name(model: PreTrainedModel) -> str:
    """What its weights are, as logs, results and timing traces name it: "bfloat16", or "bfloat16, experts nf4"."""
    form = experts_form(model)
    return str(model.dtype).removeprefix("torch.") + ("" if form == "plain" else f", experts {form}")


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same model with its first `layers` layers that hold experts; leading layers without are left out."""
    short = copy.deepcopy(config)
    text = short.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "first_k_dense_replace", 0):
        text.first_k_dense_replace = 0
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None):
            setattr(text, name, getattr(text, name)[-layers:])
    return short


def embedding(model: PreTrainedModel) -> torch.nn.Embedding:
    """The model's input embedding: `num_embeddings` token ids."""
    return cast(torch.nn.Embedding, model.get_input_embeddings())


def stop_ids(model: PreTrainedModel, tokenizer: object = None) -> frozenset[int]:
    """The token ids at which a request ends that names none: the generation configuration's and the tokenizer's.

    So does vLLM. `generate` of transformers stops at the generation configuration's alone. Where this names none,
    config.json's count. Ids that are no token of the model are ignored, with a warning.
    """
    text = model.config.get_text_config(decoder=True)
    configs = (getattr(model, "generation_config", None), model.config, text)
    given = next((eos for c in configs if (eos := getattr(c, "eos_token_id", None)) is not None), None)
    found = [*_ids(given), *_ids(getattr(tokenizer, "eos_token_id", None))]
    vocabulary = embedding(model).num_embeddings
    known = [token for token in found if type(token) is int and 0 <= token < vocabulary]
    if ignored := [token for token in found if token not in known]:
        log.warning("stop tokens ignored: %s; allowed: token ids from 0 to %d", ignored, vocabulary - 1)
    return frozenset(known)


def _ids(given: Any) -> list[Any]:
    given = given.tolist() if isinstance(given, torch.Tensor) else given
    return [] if given is None else list(given) if isinstance(given, list | tuple | set) else [given]


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def blocks_in(
    model: PreTrainedModel, token_bytes: int, block_size: int, kv_memory: int | None = None, states: int = 0
) -> int:
    """KV blocks that fit `kv_memory` bytes (None: a share of the free memory). Raises KVMemoryError if none does.

    Args:
        model: is on its device.
        token_bytes: KV of a token, all layers.
        block_size: tokens in a block.
        kv_memory: bytes for KV and states.
        states: bytes of it that the states of recurrent layers take.
    """
    if kv_memory is None:
        share = CPU_SHARE if model.device.type == "cpu" else ACCELERATOR_SHARE
        kv_memory = int(memory_bytes(model.device)[0] * share)
    blocks = ((kv_memory - states) // token_bytes - 1) // block_size  # a cache holds one slot more than its blocks
    if blocks < 1:
        beside = f" beside {states} bytes of the sequences' recurrent state" if states else ""
        raise KVMemoryError(
            f"kv_memory is {kv_memory} bytes; allowed: at least {states + (block_size + 1) * token_bytes}, one block "
            f"of {block_size} tokens{beside}"
        )
    return int(blocks)


def make_cache(runner: Runner, token_bytes: int) -> None:
    """Make the KV of all layers at once, before the first request. Raises KVMemoryError where it does not fit."""
    # Most systems promise more memory than there is, and end the process that uses it: so look before.
    cache = runner.cache
    need, (_, total) = (cache.zero_slot + 1) * token_bytes, memory_bytes(runner.device)
    found = f"{total} bytes in all"
    if need <= total:
        try:
            return runner.make_cache()
        except (RuntimeError, MemoryError) as error:  # a CPU raises RuntimeError, of which OutOfMemoryError is one
            found = str(error).splitlines()[0]
    raise KVMemoryError(
        f"limits.kv_blocks is {cache.n_blocks}: {need} bytes of KV on {runner.device} ({found}); "
        "allowed: fewer, or None for what fits"
    )
