"""The parts of a configuration; lengths and arrivals are those of a trace's recipe. config.py reports what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qllm.config.policies import file_policy, named_policy
from qllm.scheduler import Policy
from qllm.traces.requests.recipe import ClassRecipe, Gamma, OnOff, Poisson
from qllm.traces.requests.strict_model import Count, InputFile, Positive, StrictModel

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Slo(StrictModel):
    """What makes a finished request good; where several are given, all of them."""

    ttft: Positive | None = None  #: seconds
    ttft_over_isolated: Positive | None = None  #: TTFT over the request's TTFT alone on an idle device
    tpot: Positive | None = None  #: seconds per output token after the first

    @model_validator(mode="after")
    def _something(self) -> Slo:
        if self.ttft is None and self.ttft_over_isolated is None and self.tpot is None:
            raise ValueError("give at least one of ttft, ttft_over_isolated, tpot")
        return self


class _Priority(StrictModel):
    """The key that a class begins with."""

    priority: int = 0  #: lower is more urgent


class JobClass(ClassRecipe, _Priority):
    """One class of requests: its priority, its share and lengths as in the recipe of a trace, and its SLO."""

    slo: Slo | None = None


class Replay(StrictModel):
    """Arrivals and lengths of a recorded trace; a given `rate` stretches time so that the mean rate is that."""

    process: Literal["trace"]
    file: InputFile
    format: Literal["azure", "burstgpt", "mooncake", "csv", "jsonl"] | None = None  #: default: looked up


Arrival = Annotated[Poisson | Gamma | OnOff | Replay, Field(discriminator="process")]


class LimitsConfig(StrictModel):
    """What the batches and the memory may hold (see qllm.scheduler.Limits)."""

    max_seqs: Count = 32  #: sequences in a pass
    max_batched_tokens: Count = 8192  #: tokens in a pass; a longer prompt takes several passes
    block_size: Count = 16  #: tokens in a KV block
    kv_blocks: Count | None = None  #: default: what the GPU's memory has room for, see from_config.scheduler_limits
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9  #: of the GPU's memory that may be used at all
    activation_bytes: NotNegative = 2e9  #: kept free for activations
    urgent_share: Annotated[float, Field(ge=0, lt=1)] = 0.0  #: of the KV blocks, for priorities up to 0 alone
    max_suspended_tokens: Count | None = None  #: tokens in suspended passes, whose activations are kept
    evict: Literal["recompute", "offload"] = "recompute"  #: what becomes of the KV that has to give way

    @model_validator(mode="after")
    def _room_for_decodes(self) -> LimitsConfig:
        if self.max_batched_tokens < self.max_seqs:
            raise ValueError(
                f"max_batched_tokens ({self.max_batched_tokens}) must be at least max_seqs ({self.max_seqs})"
            )
        return self


class PolicyConfig(BaseModel):
    """One policy: a name of the registry or a Python file, a label for tables, and the policy's own settings."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str | None = None
    file: InputFile | None = None
    class_: str | None = Field(None, alias="class")  #: which class of the file, where it defines several policies
    label: str | None = None  #: in tables and figures

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _usable(self) -> PolicyConfig:
        if (self.name is None) == (self.file is None):
            raise ValueError("give either name (of a policy that ships) or file (a Python file that defines one)")
        if self.class_ is not None and self.file is None:
            raise ValueError("class names a class of file, and no file is given")
        self.build()
        return self

    def build(self) -> Policy:
        """A fresh policy object. ConfigError where the name, the file or a setting is wrong."""
        settings = dict(self.model_extra or {})
        if self.file is not None:
            return file_policy(self.file, self.class_, settings)
        return named_policy(self.name or "", settings)

    @property
    def title(self) -> str:
        """What tables and figures call this policy: its label, or its name, or its file's name."""
        return self.label or self.name or Path(self.file or "").stem
