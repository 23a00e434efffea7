"""The settings of a server, as server.yaml gives them; mistakes are a ConfigError of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from qllm.config.policies import named_policy
from qllm.config.schema import PolicyConfig
from qllm.config.yaml_lines import ConfigError, load_yaml
from qllm.scheduler import Limits
from qllm.server.batches.settings import BatchSettings
from qllm.traces.requests.strict_model import Count, Positive, StrictModel, explain

Whole = Annotated[int, Field(ge=0, lt=1 << 53)]


class ClassSettings(StrictModel):
    """One class of requests: how urgent it is, and how much of it may wait."""

    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]  #: lower is more urgent; 0 and below are LS
    max_waiting: Whole  #: requests without a first token yet, of this class and of more urgent ones
    max_waiting_tokens: Whole  #: tokens of their prompts
    max_ttft: Positive | None = None  #: seconds within which a first token is wanted, for policies that go by it
    max_tpot: Positive | None = None  #: the same from token to token, on average


class ApiKey(StrictModel):
    """A client that may use the server."""

    key: Annotated[str, Field(min_length=8)]  #: what it sends as its bearer token
    #: class of its requests; it may ask for a less urgent one, and not for a more urgent one
    class_name: str | None = None


class EngineLimits(StrictModel):
    """What the engine's passes and its KV cache may hold (see qllm.scheduler.Limits)."""

    max_seqs: Count = 32  #: sequences in a pass
    max_batched_tokens: Count = 8192  #: tokens in a pass; a longer prompt takes several passes
    block_size: Count = 16  #: tokens in a KV block
    kv_blocks: Count | None = None  #: default: what a share of the free memory has room for
    urgent_blocks: Whole = 0  #: of these, for LS alone
    max_suspended_tokens: Count | None = None  #: tokens in suspended passes, whose activations are kept
    evict: Literal["recompute", "offload"] = "recompute"  #: what becomes of the KV that has to give way

    def build(self) -> Limits:
        """For the engine."""
        return Limits(**self.model_dump())


_LS = ClassSettings(priority=0, max_waiting=1024, max_waiting_tokens=4_000_000)
_BE = ClassSettings(priority=1, max_waiting=512, max_waiting_tokens=2_000_000)


class ServerSettings(StrictModel):
    """How a model is served. Times in seconds, lengths in tokens unless a key says otherwise."""

    model_name: Annotated[str, Field(min_length=1)] | None = None  #: what clients call it; default: the checkpoint
    policy: PolicyConfig = PolicyConfig.model_validate("slack")  #: a name, or a mapping as in sweeps
    engine: EngineLimits = EngineLimits()
    max_step: Positive = 0.01  #: seconds that no step of a pass should exceed
    classes: dict[str, ClassSettings] = Field(default={"ls": _LS, "be": _BE}, min_length=1)
    default_class: str = "ls"  #: of requests that do not say
    batch_class: str = "be"  #: of the lines of batches
    #: service tier -> class
    tiers: dict[str, str] = Field(default={"priority": "ls", "default": "ls", "auto": "ls", "flex": "be"})
    #: what a client may hang on the model's name, to name a class
    model_suffixes: dict[str, str] = Field(default={":ls": "ls", ":be": "be"})
    class_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")] = "X-QLLM-Class"  #: which may name a class
    api_keys: list[ApiKey] = Field(default=[])  #: with none, everybody may use the server
    batches: BatchSettings = BatchSettings()
    spans: bool = False  #: an OpenTelemetry span for each request, sent where its environment variables say
    max_body_bytes: Count = 8 << 20  #: of a request
    body_timeout: Positive = 30.0  #: seconds in which a request's body has to arrive
    send_timeout: Positive = 60.0  #: seconds after which a client that takes nothing of its answer is given up
    request_seconds: Positive | None = None  #: after which a request that has not ended is given up
    max_prompt_tokens: Count | None = None  #: default: what the model's positions and the KV cache have room for
    max_prompt_characters: Count | None = None  #: default: as if each token were the longest
    max_prompts: Count = 64  #: prompts in one request
    max_choices: Count = 16  #: answers to a prompt (n)
    max_stop_strings: Whole = 8
    max_stop_characters: Count = 256  #: of a stop string
    max_connections: Count = 4096
    drain_seconds: Annotated[float, Field(ge=0, le=86400)] = 30.0  #: after SIGTERM, for what was accepted

    @model_validator(mode="after")
    def _classes_exist(self) -> ServerSettings:
        named = {"default_class": self.default_class, "batch_class": self.batch_class}
        named |= {f"tiers.{tier}": name for tier, name in self.tiers.items()}
        named |= {f"model_suffixes.{suffix}": name for suffix, name in self.model_suffixes.items()}
        for i, key in enumerate(self.api_keys):
            if key.class_name is not None:
                named[f"api_keys.{i}.class_name"] = key.class_name
        for where, name in named.items():
            if name not in self.classes:
                raise ValueError(f"{where}: no class is called {name!r:.80}; allowed: {', '.join(self.classes)}")
        if len({key.key for key in self.api_keys}) < len(self.api_keys):
            raise ValueError("api_keys: two keys are the same")
        return self

    def with_policy(self, name: str) -> ServerSettings:
        """The same settings with a policy that ships. Raises ConfigError."""
        named_policy(name, {})
        return self.model_copy(update={"policy": PolicyConfig.model_validate(name)})


def load_settings(path: str | Path | None) -> ServerSettings:
    """The settings of a YAML file; without one, the defaults. Raises ConfigError, one line."""
    if path is None:
        return ServerSettings()
    source = load_yaml(path)
    try:
        return ServerSettings.model_validate(source.data, context={"base": source.path.parent})
    except ValidationError as error:
        key, text = explain(error, source.data)
        if any(part == "api_keys" for part in key):  # the line holds a secret
            raise ConfigError(f"{path}: api_keys: {text.split(', got ')[0]}") from None
        raise source.error(key, text) from None
