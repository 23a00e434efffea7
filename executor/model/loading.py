"""Loading a model with the qllm hooks: a checkpoint, or random weights of a configuration."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qllm.executor.cpu.hugepages import collapse_anonymous
from qllm.executor.cpu.linear import pack_model
from qllm.executor.errors import LoadError, UnsupportedModelError
from qllm.executor.model.checks import check_config, check_model
from qllm.executor.model.info import blocks_in, memory_bytes, model_facts

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("*.safetensors", "*.bin")
MEMORY_SHARE = 0.7  # of the free memory that weights may take
FEW_LAYERS = 2  # built of a model that does not fit: with one, nothing would lie between two layers

log = logging.getLogger(__name__)


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model with the qllm hooks, in evaluation mode.

    Args:
        name_or_path: a folder, or a name on a model hub.
        device: where the model is to run.
        dtype: of the weights; "auto" for that of the checkpoint.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        UnsupportedModelError: the model keeps state outside attention, is no causal decoder, or its experts or
            attention do not go through transformers' interfaces.
    """
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    with _logging_refusal():
        check_config(config)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        name_or_path, config=config, dtype=dtype, trust_remote_code=trust_remote_code
    )
    return prepare_model(model.to(torch.device(device)))  # type: ignore[arg-type]  # the stubs of `to` want a str


def prepare_model(model: PreTrainedModel) -> PreTrainedModel:
    """Switch a loaded model over to the hooks.

    Args:
        model: where it is to run. It is changed, and returned.

    Raises:
        UnsupportedModelError: as `load_model` does.
    """
    model.eval()
    with _logging_refusal():
        check_config(model.config)
        check_model(model)
    if pack_model(model):
        collapse_anonymous()
    log.info("model loaded: %s, %s, on %s", model.config.model_type, str(model.dtype)[6:], model.device)
    return model


@contextmanager
def _logging_refusal() -> Iterator[None]:
    try:
        yield
    except UnsupportedModelError as error:
        log.warning("model refused: %s", error)
        raise


@dataclass(frozen=True)
class LoadedModel:
    """A prepared model on its device, and the model that it stands for."""

    name: str
    model: PreTrainedModel  #: it may have fewer layers than the whole one
    layers: int  #: of the whole model
    weights_bytes: int  #: of the whole model
    weights: str = "checkpoint"  #: where they are from, for headers
    _blocks: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, name: str, model: PreTrainedModel, weights: str = "checkpoint") -> LoadedModel:
        """A whole model, prepared."""
        return cls(name, model, model_facts(model)["layers"], _bytes(model), weights)

    def kv_blocks(self, block_size: int) -> int:
        """KV blocks of `block_size` tokens that the device has room for, by what was free when first asked."""
        if block_size not in self._blocks:
            token_bytes = model_facts(self.model)["kv_bytes_per_token"]
            self._blocks[block_size] = blocks_in(self.model, token_bytes, block_size)
        return self._blocks[block_size]


def load(
    name_or_path: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    random_weights: bool = False,
) -> LoadedModel:
    """Load what `--model`, `--device` and `--dtype` name. Raises LoadError, or UnsupportedModelError as `load_model`.

    With `random_weights` a folder that holds only a config.json gets random weights. Of a model that does not fit in
    memory FEW_LAYERS layers with random weights are built.
    """
    place = checked_device(device)
    checked_dtype(dtype)
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _not_loaded(name_or_path, error) from None
    with _logging_refusal():
        check_config(config)
    folder = Path(name_or_path)
    name = folder.name if folder.exists() else name_or_path
    if random_weights:
        found = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
        size = weights_bytes(config, found)
        layers: int = config.get_text_config(decoder=True).num_hidden_layers
        if size > MEMORY_SHARE * memory_bytes(place)[0]:
            few = random_model(with_layers(config, FEW_LAYERS), found, place)
            weights = f"random, {FEW_LAYERS} of {layers} layers (the model does not fit)"
            return LoadedModel(name, few, layers, size, weights)
        if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
            model = random_model(config, found, place)
            return LoadedModel(name, model, layers, size, "random (the folder holds none)")
    try:
        model = load_model(name_or_path, device=place, dtype=dtype, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise _not_loaded(name_or_path, error) from None
    return LoadedModel.of(name, model)


def checked_device(device: str) -> torch.device:
    """The device of that name. Raises LoadError where this machine has none such."""
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise LoadError(f"--device {device}: not usable here: {first}; allowed: cpu, or a device of torch") from None
    return place


def checked_dtype(dtype: str) -> str:
    """`dtype`, one of DTYPES. Raises LoadError."""
    if dtype not in DTYPES:
        raise LoadError(f"--dtype {dtype}: unknown; allowed: {', '.join(DTYPES)}")
    return dtype


def _not_loaded(name: str, error: Exception) -> LoadError:
    first = str(error).splitlines()[0]
    return LoadError(f"--model {name}: cannot be loaded: {first}; allowed: a folder or a model hub's name")


def weights_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights, nothing allocated."""
    with torch.device("meta"):
        return _bytes(AutoModelForCausalLM.from_config(config, dtype=dtype))


def _bytes(model: PreTrainedModel) -> int:
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
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return prepare_model(model)  # not inside: pinned buffers are host memory whatever the default device
