"""Reading a checkpoint's weights with transformers: all of them are there and fit, or one line says which does not."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import pairwise
from typing import cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from qllm.executor.errors import LoadError
from qllm.executor.model.checks import auto_class, words

log = logging.getLogger(__name__)


def why_broken(error: Exception) -> str:
    """What an error says of a checkpoint that transformers cannot load, in one line."""
    needs_code = "it needs code that comes with the checkpoint (trust_remote_code lets it run)"
    return needs_code if "trust_remote_code" in str(error) else words(error)


def read_weights(
    name: str,
    config: PreTrainedConfig,
    place: torch.device,
    dtype: str | torch.dtype,
    trust_remote_code: bool,
    without: tuple[str, ...] = (),
    cast_to: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model with the checkpoint's weights; on an accelerator they are read straight onto it.

    Args:
        name: a folder, or a name on a model hub.
        config: the model's.
        place: where the weights go.
        dtype: of the weights; "auto" for that of the checkpoint.
        trust_remote_code: whether code that comes with the checkpoint may run.
        without: names in the model of weights that the configuration has transformers leave out.
        cast_to: type of the weights, where transformers leaves some in that of the file; None where it does not.

    Raises LoadError where weights are missing, or of another shape than the configuration asks for.
    """
    report = _Report()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(report)
    try:
        model, told = auto_class(config).from_pretrained(
            name,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            device_map=None if place.type == "cpu" else {"": place},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with names
        )
    except Exception as error:
        raise LoadError(f"cannot be loaded: {report.cause or why_broken(error)}") from error
    finally:
        logger.removeFilter(report)
    if told["mismatched_keys"]:
        key, in_file, in_model = min(told["mismatched_keys"])
        raise LoadError(f"{key} is {list(in_file)} in its files and {list(in_model)} by its config.json")
    if told["missing_keys"]:
        raise LoadError(f"its files lack {_some(told['missing_keys'])}, which its config.json asks for")
    if ignored := [key for key in told["unexpected_keys"] if not key.startswith(without)]:
        log.warning("%s: not of this model, left out: %s", name, _some(ignored))
    if cast_to is not None:
        _cast(model, cast_to)
    return cast(PreTrainedModel, model)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    # of a quantised checkpoint, weights without a scale stay as they are whatever type was asked for
    exempt = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype is torch.float16:
        exempt += getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not any(part in name for part in exempt):
            weight.data = weight.data.to(dtype)


class _Report(logging.Filter):
    """Keeps transformers' tables of what does not fit from being printed: one line says it."""

    cause = ""  #: what broke while weights were put together

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" not in text:
            return True
        for before, line in pairwise(text.splitlines()):
            if line.startswith("Error: "):  # Error: <operation> on tensors destined for <name>. <files>
                self.cause = f"{line.partition('destined for ')[2].split('. ')[0]} cannot be put together: {before}"
        return False


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more weights" if others else first
