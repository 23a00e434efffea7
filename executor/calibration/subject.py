"""The model that is calibrated: a checkpoint, or random weights of its configuration, whole or a few of its layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qllm.executor.calibration.store import CalibrationError
from qllm.executor.model.checks import check_config
from qllm.executor.model.info import memory_bytes
from qllm.executor.model.loading import load_model, prepare_model

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("*.safetensors", "*.bin")
MEMORY_SHARE = 0.7  # of the free memory that weights may take
FEW_LAYERS = 2  # measured of a model that does not fit: one would leave out what lies between two


@dataclass(frozen=True)
class Subject:
    """What is calibrated. name: of the model; layers: of the whole model, `model` may have fewer; weights_bytes: of
    the whole model; weights: where they are from, for the header."""

    name: str
    model: PreTrainedModel
    layers: int
    weights_bytes: int
    weights: str = "checkpoint"


def load_subject(name_or_path: str, *, device: str = "cpu", dtype: str = "auto") -> Subject:
    """Load what `qllm calibrate --model` names: a checkpoint, or a folder that holds only a config.json, which gets
    random weights. Of a model that does not fit in memory, FEW_LAYERS layers are built with random weights.

    Raises CalibrationError for a model, device or dtype that is not there, UnsupportedModelError.
    """
    if dtype not in DTYPES:
        raise CalibrationError(f"--dtype {dtype}: allowed: {', '.join(DTYPES)}")
    place = checked_device(device)
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"--model {name_or_path}: {str(error).splitlines()[0]}") from None
    check_config(config)
    found = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
    name = Path(name_or_path).name if Path(name_or_path).exists() else name_or_path
    size = weights_bytes(config, found)
    layers: int = config.get_text_config(decoder=True).num_hidden_layers
    if size > MEMORY_SHARE * memory_bytes(place)[0]:
        few = random_model(with_layers(config, FEW_LAYERS), found, place)
        return Subject(name, few, layers, size, f"random, {FEW_LAYERS} of {layers} layers (the model does not fit)")
    folder = Path(name_or_path)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        return Subject(name, random_model(config, found, place), layers, size, "random (the folder holds none)")
    return Subject(name, load_model(name_or_path, device=place, dtype=found), layers, size)


def checked_device(device: str) -> torch.device:
    """The device of that name. CalibrationError where this machine has none such."""
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise CalibrationError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return place


def weights_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights, nothing allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(p.numel() * p.element_size() for p in model.parameters())


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


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model with random weights, made where it is to run."""
    torch.manual_seed(0)
    with device:
        return prepare_model(AutoModelForCausalLM.from_config(config, dtype=dtype))
