"""The shape of a model from its config.json, as Hugging Face publishes it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qllm.traces.files import not_regular
from qllm.traces.messages import clipped, shown
from qllm.traces.step_times.file_format import MOST_EXPERTS, TimingError
from qllm.traces.step_times.model_shapes import SHAPES, ModelShape

# What model families call the same size; the first that a file has counts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk", "moe_k")
EXPERT_WIDTH = ("moe_intermediate_size", "intermediate_size")
ATTENTION = ("full_attention", "sliding_attention")
MOST = 1 << 40
# Keys of attention or layers that a trace's steps are no model of, where they are neither null nor 0.
NOT_MODELLED = {
    "index_topk": "sparse attention",
    "sparse_attention_config": "sparse attention",
    "compress_ratios": "compressed attention",
    "attention_chunk_size": "attention in chunks",
    "hybrid_layer_pattern": "two kinds of heads",
    "linear_attn_config": "linear attention",
    "hybrid_override_pattern": "state-space layers",
    "ssm_state_size": "state-space layers",
    "routed_expert_hidden_size": "experts of another hidden size",
}
# quant_method -> type of the experts' weights, a key of WEIGHT_BYTES
QUANTISED = {"fp8": "fp8", "mxfp4": "mxfp4", "awq": "int4", "gptq": "int4"}


def shape_from_config(path: str | Path) -> ModelShape:
    """The shape of the model whose config.json, or folder with one, is at `path`.

    Raises:
        TimingError: One line with file, key and what is allowed: the file cannot be read or is no JSON object, a key is
            missing or impossible, the model has no experts, or layers that no step of a trace describes.
    """
    return _Config(path).shape()


def weights_dtype(path: str | Path) -> str:
    """The type of the experts' weights by the file's quantization_config: bf16 where there is none. TimingError."""
    config = _Config(path)
    given = config.data.get("quantization_config")
    if given is None:
        return "bf16"
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if method not in QUANTISED:
        allowed = f"{', '.join(QUANTISED)}, or no quantization_config"
        raise config.error("quantization_config", f"has quant_method {shown(method)}", allowed)
    return QUANTISED[method]


class _Config:
    """A config.json and where it lies, for errors."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            self.path /= "config.json"
        if not self.path.is_file():
            raise TimingError(f"{self.path}: {not_regular(self.path)}; allowed: a Hugging Face config.json")
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise TimingError(f"{self.path}: cannot be read as JSON: {str(error).splitlines()[0]:.200}") from None
        if not isinstance(data, dict):
            raise TimingError(f"{self.path}: holds {shown(data)}; allowed: the JSON object of a config.json")
        inner = data.get("text_config")  # of models that also see
        self.data: dict[str, Any] = {**data, **inner} if isinstance(inner, dict) else data

    def error(self, key: str, problem: str, allowed: str) -> TimingError:
        return TimingError(f"{self.path}: key {key!r} {problem}; allowed: {allowed}")

    def size(self, *keys: str, least: int = 1, default: int | None = None) -> int:
        """The first of `keys` that is there and not null."""
        for key in keys:
            value = self.data.get(key)
            if value is None:
                continue
            if type(value) is not int or not least <= value < MOST:
                raise self.error(key, f"is {shown(value)}", f"a whole number of at least {least}")
            return value
        if default is None:
            raise self.error(keys[0], "is missing", f"{' or '.join(keys)}, a whole number of at least {least}")
        return default

    def flag(self, key: str) -> bool:
        value = self.data.get(key, False)
        if type(value) is not bool and value is not None:
            raise self.error(key, f"is {shown(value)}", "true or false")
        return bool(value)

    def shape(self) -> ModelShape:
        for key, what in NOT_MODELLED.items():
            if self.data.get(key):
                raise self.error(key, f"says {what}, which no step describes", "models without it")
        if all(self.data.get(key) is None for key in EXPERTS):
            kind = self.data.get("model_type")
            raise self.error(
                EXPERTS[0], f"is missing: {shown(kind)} is no MoE model", f"{' or '.join(EXPERTS)}, with experts"
            )
        layers, hidden = self.size("num_hidden_layers"), self.size("hidden_size")
        heads = self.size("num_attention_heads")
        inter, experts = self.size(*EXPERT_WIDTH), self.size(*EXPERTS)
        if layers * experts > MOST_EXPERTS:
            told = f"makes {layers * experts} experts in all layers"
            raise self.error("num_hidden_layers", told, f"at most {MOST_EXPERTS}")
        dense = self._dense_layers(layers)
        window = self._window(layers)
        sizes: dict[str, Any] = {
            **{"layers": layers, "hidden": hidden, "heads": heads, "inter": inter, "experts": experts},
            "kv_heads": self.size("num_key_value_heads", default=heads),
            "top_k": self.size(*TOP_K),
            "vocab": self.size("vocab_size"),
            "shared_inter": self._shared(inter),
            **{
                "dense_layers": dense,
                "dense_inter": self.size("dense_intermediate_size", "intermediate_size") if dense else 0,
            },
            "tied": self.flag("tie_word_embeddings"),
            **{"window": window[0], "window_layers": window[1]},
            "max_context": self.size("max_position_embeddings", default=0),
            **self._heads(hidden, heads),
        }
        try:
            shape = ModelShape(self._name(), **sizes)
        except TimingError as error:
            raise TimingError(f"{self.path}: {error}") from None
        return next((known for known in SHAPES.values() if _same(known, shape)), shape)

    def _name(self) -> str:
        """That of the folder, or of the model's type where the file lies beside others."""
        given = self.data.get("_name_or_path") or self.data.get("name_or_path")
        names = [given if isinstance(given, str) else "", self.path.resolve().parent.name]
        if self.path.name != "config.json":
            names[1] = self.path.stem.removesuffix("_config")
        name = next((name for name in names if name.strip("./ ")), "model")
        return clipped(re.sub(r"[^a-z0-9._-]+", "-", name.rstrip("/").rsplit("/", 1)[-1].lower()))

    def _heads(self, hidden: int, heads: int) -> dict[str, int]:
        """Sizes of a head, and of what latent attention keeps."""
        if self.data.get("kv_lora_rank") is None:
            return {"head_dim": self.size("head_dim", default=max(hidden // heads, 1))}
        rope, nope = self.size("qk_rope_head_dim"), self.size("qk_nope_head_dim")
        value = self.size("v_head_dim", default=nope)
        return {
            "head_dim": nope,
            "value_dim": value if value != nope else 0,
            "latent_kv": self.size("kv_lora_rank") + rope,
            "latent_rope": rope,
            "latent_q": self.size("q_lora_rank", default=0),
        }

    def _shared(self, inter: int) -> int:
        """Width of all shared experts together."""
        shared = self.size("n_shared_experts", "num_shared_experts", least=0, default=0)
        return self.size("shared_expert_intermediate_size", least=0, default=shared * inter)

    def _dense_layers(self, layers: int) -> int:
        """Layers without experts, wherever they lie."""
        listed, every = self.data.get("mlp_only_layers") or [], self.size("decoder_sparse_step", default=1)
        if not isinstance(listed, list) or not all(type(at) is int for at in listed):
            raise self.error("mlp_only_layers", f"is {shown(listed)}", "a list of layers' numbers")
        first = self.size("first_k_dense_replace", least=0, default=0)
        dense = {at for at in range(layers) if at < first or at in listed or (at + 1) % every}
        dense |= {at for at in range(layers) if (at + 1) % self.size("interleave_moe_layer_step", default=1)}
        freq = self.data.get("moe_layer_freq")
        if isinstance(freq, list):
            if len(freq) != layers:
                raise self.error(
                    "moe_layer_freq", f"has {len(freq)} layers", f"as many as num_hidden_layers ({layers})"
                )
            dense |= {at for at, sparse in enumerate(freq) if not sparse}
        else:
            every = self.size("moe_layer_freq", default=1)
            dense |= {at for at in range(layers) if at % every}
        if len(dense) >= layers:
            raise self.error("first_k_dense_replace", f"leaves none of {layers} layers with experts", "fewer")
        return len(dense)

    def _window(self, layers: int) -> tuple[int, int]:
        """(Tokens that a layer with a window sees, how many layers have one)."""
        kinds = self.data.get("layer_types")
        if kinds is not None and not isinstance(kinds, list):
            raise self.error("layer_types", f"is {shown(kinds)}", f"a list of {', '.join(ATTENTION)}")
        for kind in kinds or ():
            if kind not in ATTENTION:
                raise self.error("layer_types", f"has {shown(kind)}, which no step describes", ", ".join(ATTENTION))
        if kinds is not None and len(kinds) != layers:
            raise self.error("layer_types", f"has {len(kinds)} layers", f"as many as num_hidden_layers ({layers})")
        tokens = self.size("sliding_window", default=0)
        if not tokens or ("use_sliding_window" in self.data and not self.flag("use_sliding_window")):
            return 0, 0
        count = layers if kinds is None else kinds.count("sliding_attention")
        return (tokens, count) if count else (0, 0)


def _same(known: ModelShape, shape: ModelShape) -> bool:
    """Whether two shapes differ in their name alone."""
    return {**vars(known), "name": ""} == {**vars(shape), "name": ""}
