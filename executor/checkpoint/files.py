"""A checkpoint's safetensors files: what their headers tell, and which weights would be misread."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from qllm.executor.errors import LoadError
from qllm.executor.model.checks import words
from qllm.executor.quantised.left_out import settings_of
from qllm.executor.quantised.packed import FP8, Header

PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")  # types in a file of weights that are not quantised
LFS = b"version https://git-lfs"  # how a file begins in a clone without its contents


def read_headers(name: str) -> dict[str, Header]:
    """The weights in a checkpoint's safetensors files, fetched where they lie on a hub. Raises LoadError."""
    return {weight: header for file in weight_files(name) for weight, header in read_header(file).items()}


def check_files(headers: Mapping[str, Header], config: PreTrainedConfig, method: str | None) -> None:
    """Raise LoadError for weights, quantised by `method`, that transformers would misread."""
    packed = next((name for name, header in headers.items() if header.dtype not in PLAIN), None)
    if packed is not None and method is None:
        raise LoadError(
            f"{packed} is quantised ({headers[packed].dtype}), but config.json has no quantization_config; allowed: a "
            "checkpoint in bfloat16, float16 or float32, or one that says how to expand it"
        )
    block = (settings_of(config) or {}).get("weight_block_size")
    for name, header in headers.items():
        if (
            method == "fp8"
            and header.dtype == FP8.dtype
            and not any(scales in headers for scales in _names_of_scales(name))
        ):
            raise LoadError(f"its files lack {name}_scale_inv, the scales of {name}")
        weight = headers.get(name.removesuffix("_scale_inv"))
        scales = header.shape
        if block is None or weight is None or len(scales) != 2 or not name.endswith("_scale_inv"):
            continue
        # transformers cuts rows and columns into as many equal blocks as there are scales
        if any(n > 1 and size % of for n, size, of in zip(scales, weight.shape[-2:], block, strict=True)):
            raise LoadError(f"{name}: blocks of {block} do not divide {weight.shape}, and would be misread")


def _names_of_scales(weight: str) -> list[str]:
    stem = weight.removesuffix("weight")
    return [f"{weight}_scale_inv", f"{weight}_scale", f"{stem}scale", f"{stem}qscale_weight"]


def weight_files(name: str) -> list[Path]:
    """A checkpoint's safetensors files; none where its weights are of another kind. Raises LoadError."""
    try:
        single = cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if single is not None:
            return [Path(single)]
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        return [] if index is None else [Path(file) for file in get_checkpoint_shard_files(name, index)[0]]
    except Exception as error:  # the index is a file that anybody may have written
        raise LoadError(f"{SAFE_WEIGHTS_INDEX_NAME} cannot be read ({words(error)})") from None


def read_header(file: Path) -> dict[str, Header]:
    """The weights in a safetensors file. Raises LoadError."""
    try:
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
            return {name: Header(part.get_dtype(), part.get_shape(), file) for name, part in parts.items()}
    except (OSError, SafetensorError) as error:
        if not file.is_file():
            raise LoadError(f"{file.name} is missing; the index names it") from None
        with file.open("rb") as opened:
            pointer = opened.read(len(LFS)) == LFS
        told = "a Git LFS pointer; run git lfs pull" if pointer else f"damaged ({words(error)}); fetch it again"
        raise LoadError(f"{file.name} is {told}") from None
