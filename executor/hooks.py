"""Registers "qllm" with transformers' experts and attention interfaces (transformers >= 5.7).

Importing this module is enough; a model is switched over with `set_attn_implementation` and
`set_experts_implementation`.
"""

from __future__ import annotations

from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface

from executor.attention import attention_forward
from executor.experts import experts_forward

NAME = "qllm"

AttentionInterface.register(NAME, attention_forward)
ExpertsInterface.register(NAME, experts_forward)
