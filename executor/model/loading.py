"""Loading a model with the qllm hooks."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qllm.executor.cpu.hugepages import collapse_anonymous
from qllm.executor.cpu.linear import pack_model
from qllm.executor.model.checks import check_config, check_model


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model with the qllm hooks, in evaluation mode.

    Raises UnsupportedModelError for a model that keeps state outside attention, is no causal decoder, or whose experts
    or attention do not go through transformers' interfaces. Code from the checkpoint runs only with
    `trust_remote_code`.
    """
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    check_config(config)
    model = AutoModelForCausalLM.from_pretrained(
        name_or_path, config=config, dtype=dtype, trust_remote_code=trust_remote_code
    )
    return prepare_model(model.to(torch.device(device)))  # type: ignore[arg-type]


def prepare_model(model: PreTrainedModel) -> PreTrainedModel:
    """Switch a loaded model over to the hooks, after the same checks as `load_model`."""
    model.eval()
    check_config(model.config)
    check_model(model)
    if pack_model(model):
        collapse_anonymous()
    return model
