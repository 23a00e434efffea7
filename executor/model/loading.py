"""Loading a model with the qllm hooks: a checkpoint, or random weights of a configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from qllm.executor.checkpoint.files import check_files, read_headers
from qllm.executor.checkpoint.reading import read_weights, why_broken
from qllm.executor.errors import LoadError, UnsupportedModelError
from qllm.executor.latent.hook import hook_latents
from qllm.executor.model.checks import (
    auto_class,
    check_config,
    check_layers,
    check_model,
    expand_weights,
)
from qllm.executor.model.hooks import drop_senses, speed_up
from qllm.executor.model.info import dtype_name, fitting_blocks, memory_bytes, model_facts, with_layers
from qllm.executor.quantised.experts import (
    check_in_memory,
    checked_experts,
    quantise_experts,
    tell_experts,
    weights_bytes,
)
from qllm.executor.quantised.layout import read_apart
from qllm.executor.quantised.left_out import leave_out
from qllm.executor.quantised.packed import FORMS, expand_packed, read_packed
from qllm.executor.recurrent.mixers import hook_mixers
from qllm.executor.unpacked.attention import hook_unpacked

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
    experts: str = "plain",
) -> PreTrainedModel:
    """Load a causal language model with the qllm hooks, in evaluation mode.

    Quantised weights (FP8, MXFP4, compressed-tensors) are expanded to `dtype` while they are read. Whatever
    configuration and headers of files can tell is checked before weights are read.

    Args:
        name_or_path: a folder, or a name on a model hub.
        device: where the model is to run.
        dtype: of the weights; "auto" for that of the checkpoint.
        trust_remote_code: whether code that comes with the checkpoint may run.
        experts: "plain": of that type too; "packed": those of an FP8 or MXFP4 checkpoint as its files hold them; "nf4":
            quantised to four bits a weight. Then host memory has to hold the plain model.

    Raises:
        UnsupportedModelError: the model keeps state outside attention, is no causal decoder, its experts or attention
            do not go through transformers' interfaces, or its weights are quantised and cannot be expanded.
        LoadError: the checkpoint is not there, is damaged or not whole, or does not fit the device.
    """
    chosen = checked_dtype(dtype) if isinstance(dtype, str) else dtype
    with _logging_refusal():
        return _load(str(name_or_path), checked_device(device), chosen, trust_remote_code, checked_experts(experts))


def _load(
    name: str, place: torch.device, dtype: str | torch.dtype, trust_remote_code: bool, experts: str
) -> PreTrainedModel:
    with _naming(name):
        config = _read_config(name, trust_remote_code)
        method = expand_weights(config)
        found = torch_dtype(dtype, config) or torch.bfloat16
        skeleton = _skeleton(config, found, trust_remote_code)
        _check_size(skeleton, place, method, experts)
        host = torch.device("cpu") if experts == "nf4" else place  # the plain weights need not fit an accelerator
        if experts == "nf4":
            _check_size(skeleton, host, method)
        headers = read_headers(name)
        apart = read_apart(skeleton, config, method, experts, headers)
        if apart:
            leave_out(config, apart)
        elsewhere = {source for weight in apart.values() for source in weight.names()}
        check_files({key: header for key, header in headers.items() if key not in elsewhere}, config, method)
        cast_to = None if method is None else torch_dtype(dtype, config)
        model = read_weights(name, config, host, dtype, trust_remote_code, tuple(apart), cast_to)
        read_packed(model, apart, headers, host)
        linears = [each for each in apart if each.endswith(".weight")]
        expand_packed(model, linears if experts == "packed" else apart, model.dtype)
        return _prepare(model, experts, place)


def prepare_model(model: PreTrainedModel, *, experts: str = "plain") -> PreTrainedModel:
    """Switch a loaded model over to the hooks.

    Args:
        model: where it is to run. It is changed, and returned.
        experts: "plain" or "nf4", see `load_model`.

    Raises:
        UnsupportedModelError: as `load_model` does.
    """
    with _logging_refusal():
        check_in_memory(checked_experts(experts))
        return _prepare(model, experts, model.device)


def _prepare(model: PreTrainedModel, experts: str, place: torch.device) -> PreTrainedModel:
    model.eval()
    check_config(model.config)
    if experts == "nf4":
        quantise_experts(model, place)
    if experts != "plain":
        tell_experts(model)
    for hook in (hook_mixers, hook_unpacked, hook_latents):
        hook(model)
    called = check_model(model)
    drop_senses(model, called)
    speed_up(model, called)
    log.info("model loaded: %s, %s, on %s", model.config.model_type, dtype_name(model), model.device)
    return model


@contextmanager
def _logging_refusal() -> Iterator[None]:
    try:
        yield
    except (UnsupportedModelError, LoadError) as error:
        log.warning("model refused: %s", error)
        raise


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the checkpoint that is refused."""
    try:
        yield
    except (UnsupportedModelError, LoadError) as error:
        raise type(error)(f"{name}: {error}") from error.__cause__


def _read_config(name: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The checkpoint's configuration, that of a model which can be served as far as it tells."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise LoadError(
            "cannot be loaded: the folder has no config.json; allowed: a checkpoint as transformers saves it"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers makes of a file that anybody may have written
        hint = "" if folder.exists() else "; allowed: a folder or a model hub's name"
        raise LoadError(f"cannot be loaded: {why_broken(error)}{hint}") from None
    check_config(config)
    return config


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model without memory for its weights."""
    auto = auto_class(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise LoadError(f"cannot be loaded: no model can be made of its config.json: {why_broken(error)}") from None
    check_layers(model)
    return model


def torch_dtype(dtype: str | torch.dtype, config: PreTrainedConfig) -> torch.dtype | None:
    """The type of weights; "auto" is that of the configuration, None where it has none."""
    if dtype == "auto":
        return cast(torch.dtype | None, config.dtype or config.get_text_config(decoder=True).dtype)
    return cast(torch.dtype, getattr(torch, dtype)) if isinstance(dtype, str) else dtype


def _check_size(skeleton: PreTrainedModel, place: torch.device, method: str | None, experts: str = "plain") -> None:
    size, room = weights_bytes(skeleton, experts), memory_bytes(place)[1]
    if size > room:
        told = f", experts {experts}" if experts != "plain" else f" (expanded from {method})" if method else ""
        smaller = "choose a smaller model or dtype"
        if experts == "plain" and method in FORMS:
            smaller += f", or experts packed, {weights_bytes(skeleton, 'packed') / 1e9:.0f} GB"
        raise LoadError(
            f"does not fit: {size / 1e9:.0f} GB of weights in {str(skeleton.dtype)[6:]}{told}, {place} has "
            f"{room / 1e9:.0f} GB; {smaller}"
        )


@dataclass(frozen=True)
class LoadedModel:
    """A prepared model on its device, and the model that it stands for."""

    name: str
    model: PreTrainedModel  #: it may have fewer layers than the whole one
    layers: int  #: of the whole model
    weights_bytes: int  #: of the whole model
    weights: str = "checkpoint"  #: where they are from, for headers
    _blocks: dict[tuple[int, int], int] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, name: str, model: PreTrainedModel, weights: str = "checkpoint") -> LoadedModel:
        """A whole model, prepared."""
        return cls(name, model, model_facts(model)["layers"], weights_bytes(model), weights)

    def kv_blocks(self, block_size: int, residents: int) -> int:
        """KV blocks of `block_size` tokens for so many sequences at a time, by what was free when first asked."""
        asked = block_size, residents
        if asked not in self._blocks:
            facts = model_facts(self.model)
            self._blocks[asked] = fitting_blocks(self.model, facts, block_size, residents)
        return self._blocks[asked]


def load(
    name_or_path: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    experts: str = "plain",
    random_weights: bool = False,
) -> LoadedModel:
    """Load what `--model`, `--device`, `--dtype` and `--experts` name. Raises as `load_model` does, for a command.

    With `random_weights` a folder that holds only a config.json gets random weights. Of a model that does not fit in
    memory FEW_LAYERS layers with random weights are built.
    """
    place = checked_device(device)
    checked_dtype(dtype)
    checked_experts(experts)
    folder = Path(name_or_path)
    name = folder.name if folder.exists() else name_or_path
    try:
        if random_weights:
            with _naming(name_or_path):
                config = _read_config(name_or_path, trust_remote_code)
                found = torch_dtype(dtype, config) or torch.float32
                skeleton = _skeleton(config, found, trust_remote_code)
                size = weights_bytes(skeleton, experts)
            layers: int = config.get_text_config(decoder=True).num_hidden_layers
            made = size if experts == "packed" else weights_bytes(skeleton)  # to be quantised, it is made plain
            if made > MEMORY_SHARE * memory_bytes(place)[0]:
                few = random_model(with_layers(config, FEW_LAYERS), found, place, experts)
                weights = f"random, {FEW_LAYERS} of {layers} layers (the model does not fit)"
                return LoadedModel(name, few, layers, size, weights)
            if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
                model = random_model(config, found, place, experts)
                return LoadedModel(name, model, layers, size, "random (the folder holds none)")
        model = _load(name_or_path, place, dtype, trust_remote_code, experts)
    except LoadError as error:
        raise LoadError(f"--model {error}") from None
    return LoadedModel.of(name, model)


def checked_device(device: str | torch.device) -> torch.device:
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


def random_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, experts: str = "plain"
) -> PreTrainedModel:
    """A model with random weights, made where it is to run."""
    torch.manual_seed(0)
    with device:
        model = auto_class(config).from_config(config, dtype=dtype)
    # not inside: pinned buffers are host memory whatever the default device
    return prepare_model(model, experts=experts)
