"""A small random Qwen3-MoE with a byte-level tokenizer and a chat template: to try the server, and to test it."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from qllm.executor.testing import small_config

NAME = "demo"
SPECIAL = ("<bos>", "<eos>", "<|turn|>")
TEMPLATE = """\
{%- for message in messages -%}
<|turn|>{{ message.role }}
{{ message.content }}
{% endfor -%}
{%- if add_generation_prompt -%}
<|turn|>assistant
{% endif -%}"""


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over all bytes and pairs of small letters, so that any text comes out as it went in."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in string.ascii_lowercase for b in string.ascii_lowercase]
    merges += [("Ġ", letter) for letter in string.ascii_lowercase]
    pieces = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[0],
        additional_special_tokens=[SPECIAL[2]],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def demo_model(
    vocabulary: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random Qwen3-MoE of 8 layers and 16 experts; the same numbers each time."""
    config = small_config(vocabulary=vocabulary, hidden=256, width=256, experts=16)
    config.update(overrides)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).to(torch.device(device)).eval()
    return model
