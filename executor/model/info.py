"""What a model is made of, and how much of it fits its device."""

from __future__ import annotations

import copy
import logging
import os
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from qllm.executor.errors import KVMemoryError
from qllm.executor.gpu.pass_inputs import RECORDED_ROWS
from qllm.executor.model.kv_cache import Rings
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, has_kernels, run_to_end, window_of
from qllm.executor.model.split import whole
from qllm.executor.quantised.experts import experts_form
from qllm.executor.recurrent.states import state_bytes

CPU_SHARE = 0.25  # of the memory that is free, for KV, where nobody says how much
ACCELERATOR_SHARE = 0.8

log = logging.getLogger(__name__)


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What a timing trace must agree on with `model`, seen in a pass over one token."""
    # `layers` counts those that mix tokens. A trace has no key for moe_layers, for state_bytes (of a sequence, in its
    # recurrent layers), nor for window (the largest, of layers that keep no more than it; 0: none does) and
    # window_bytes_per_token (of these layers). kv_bytes_per_token is of the layers that keep all tokens.
    window = window_of(model)
    rings = None if window is None else Rings(1, -(-window // 2), window)
    runner = Runner(model, kv_blocks=1, block_size=2, splitter=whole, rings=rings)
    sequence = Sequence([1], [0], ring=runner.cache.ring_of(1))
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
        "kv_bytes_per_token": runner.cache.token_bytes(),
        "window": window or 0,
        "window_bytes_per_token": runner.cache.token_bytes(in_rings=True),
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


def ring_size(window: int, block_size: int, *, kernels: bool) -> int:
    """Blocks of a full ring, which holds the window; 0 where there is none.

    Where kernels of a GPU attend, it holds the rows of a recorded pass on top, which are written before they attend.
    """
    rows = RECORDED_ROWS if kernels else 1
    return -(-(window + rows - 1) // block_size) if window else 0


def fitting_blocks(
    model: PreTrainedModel, facts: dict[str, Any], block_size: int, residents: int, kv_memory: int | None = None
) -> int:
    """KV blocks that fit beside what does not grow with a sequence's length. Arguments and errors as of `blocks_in`.

    Args:
        model: see blocks_in.
        facts: those of `model_facts`.
        block_size: see blocks_in.
        residents: sequences that hold KV at a time: each may have a state, and a full ring.
        kv_memory: see blocks_in.
    """
    return blocks_in(
        *(model, facts["kv_bytes_per_token"], block_size, kv_memory),
        states=residents * facts["state_bytes"],
        ring_token_bytes=facts["window_bytes_per_token"],
        ring_blocks=residents * ring_size(facts["window"], block_size, kernels=has_kernels(model.device)),
    )


def blocks_in(
    model: PreTrainedModel,
    token_bytes: int,
    block_size: int,
    kv_memory: int | None = None,
    states: int = 0,
    *,
    ring_token_bytes: int = 0,
    ring_blocks: int = 0,
) -> int:
    """KV blocks that fit `kv_memory` bytes (None: a share of the free memory). Raises KVMemoryError if none does.

    Args:
        model: is on its device.
        token_bytes: KV of a token, in the layers that keep all tokens.
        block_size: tokens in a block.
        kv_memory: bytes for KV and states.
        states: bytes of it that the states of recurrent layers take.
        ring_token_bytes: KV of a token, in the layers that keep a window.
        ring_blocks: blocks that the rings of all sequences take at most; they never take more than there are blocks.
    """
    if kv_memory is None:
        share = CPU_SHARE if model.device.type == "cpu" else ACCELERATOR_SHARE
        kv_memory = int(memory_bytes(model.device)[0] * share)
    both = token_bytes + ring_token_bytes
    left = kv_memory - states - both  # a cache holds one slot more than its blocks
    rings = ring_blocks * block_size * ring_token_bytes
    blocks = max(left // both, (left - rings) // token_bytes) // block_size
    if blocks < 1:
        beside = f" beside {states} bytes of the sequences' recurrent state" if states else ""
        raise KVMemoryError(
            f"kv_memory is {kv_memory} bytes; allowed: at least {states + (block_size + 1) * both}, one block "
            f"of {block_size} tokens{beside}"
        )
    return int(blocks)


def make_cache(runner: Runner, token_bytes: int, ring_token_bytes: int = 0) -> None:
    """Make the KV of all layers at once, before the first request. Raises KVMemoryError where it does not fit.

    Args:
        runner: whose cache it is.
        token_bytes: KV of a token, in the layers that keep all tokens.
        ring_token_bytes: the same, in those that keep a window.
    """
    # Most systems promise more memory than there is, and end the process that uses it: so look before.
    cache, (_, total) = runner.cache, memory_bytes(runner.device)
    need, windows = (cache.zero_slot + 1) * token_bytes, 0
    if cache.rings is not None:
        windows = (cache.rings.n_blocks * cache.block_size + 1) * ring_token_bytes
    found = f"{total} bytes in all"
    if need + windows <= total:
        try:
            return runner.make_cache()
        except (RuntimeError, MemoryError) as error:  # a CPU raises RuntimeError, of which OutOfMemoryError is one
            found = str(error).splitlines()[0]
    beside = f" and {windows} of sliding windows" if windows else ""
    raise KVMemoryError(
        f"limits.kv_blocks is {cache.n_blocks}: {need} bytes of KV{beside} on {runner.device} ({found}); "
        "allowed: fewer, or None for what fits"
    )
