"""Having transformers load a checkpoint without some of its weights, and expand what else is quantised.

A quantiser is what transformers lets change a model before weights are read. One is registered for each method whose
experts can stay packed; it does what that method's own does, and takes the weights out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

METHODS = ("fp8", "mxfp8", "mxfp4")
PREFIX = "qllm_"


def settings_of(config: PreTrainedConfig) -> Any:
    """What config.json says of the quantisation, of the whole model or of its language model; None if nothing."""
    return getattr(_owner(config), "quantization_config", None)


def _owner(config: PreTrainedConfig) -> PreTrainedConfig:
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    return config if getattr(config, "quantization_config", None) else text


def leave_out(config: PreTrainedConfig, weights: Iterable[str]) -> None:
    """Have transformers load a checkpoint, quantised by one of METHODS, without these weights of the model."""
    owner = _owner(config)
    settings = owner.quantization_config
    owner.quantization_config = {**settings, "quant_method": PREFIX + settings["quant_method"], "without": [*weights]}


def _register(method: str) -> None:
    config_class: Any = AUTO_QUANTIZATION_CONFIG_MAPPING[method]
    quantiser_class: Any = AUTO_QUANTIZER_MAPPING[method]

    def settings(self: Any, without: list[str], quant_method: str, **given: Any) -> None:
        config_class.__init__(self, **given)
        self.quant_method, self.without = quant_method, without

    def take_out(self: Any, model: PreTrainedModel, **given: Any) -> None:
        quantiser_class.preprocess_model(self, model, **given)
        for name in self.quantization_config.without:
            path, _, weight = name.rpartition(".")
            module = model.get_submodule(path)
            delattr(module, weight)
            module.__dict__["_is_hf_initialized"] = True  # nothing is left that random numbers could go to

    name = f"Packed{method.capitalize()}"
    register_quantization_config(PREFIX + method)(type(f"{name}Config", (config_class,), {"__init__": settings}))
    register_quantizer(PREFIX + method)(type(f"{name}Quantizer", (quantiser_class,), {"preprocess_model": take_out}))


for _method in METHODS:
    _register(_method)
