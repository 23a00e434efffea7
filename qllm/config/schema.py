"""The parts of a configuration: classes and their lengths, SLOs, arrivals, limits, policies.

Every model refuses unknown keys and numbers written as text; what is wrong is reported by qllm.config.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from qllm.config.policies import file_policy, named_policy
from qllm.config.yaml_lines import suggestion
from qllm.scheduler import Policy
from qllm.traces.requests.lengths import bundled_lengths

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


def existing_file(value: str, info: ValidationInfo) -> str:
    """An absolute path; relative ones start at the configuration's folder."""
    base = (info.context or {}).get("base", Path.cwd())
    path = Path(os.path.abspath(base / Path(value).expanduser()))
    if not path.is_file():
        hint = ""
        if "azure" in path.name.lower():
            hint = "; download it from https://github.com/Azure/AzurePublicDataset (data/)"
        raise ValueError(f"no such file: {os.path.relpath(path)} (paths start at the configuration's folder){hint}")
    return str(path)


def looks_like_path(value: str) -> bool:
    return "/" in value or os.sep in value or value.endswith((".csv", ".json", ".jsonl", ".py", ".gz"))


InputFile = Annotated[str, AfterValidator(existing_file)]


class StrictModel(BaseModel):
    """A mapping with these keys and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and cls.model_config.get("extra") == "forbid":
            for key in data:
                if key not in cls.model_fields:
                    hint = suggestion(str(key), list(cls.model_fields))
                    raise PydanticCustomError("unknown_key", "{message}", {"key": str(key), "message": hint})
        return data


class Lognormal(StrictModel):
    """Lognormal token counts: `sigma` of the logarithm and either the mean or the median; cut off at min and max."""

    mean: Positive | None = None
    median: Positive | None = None
    sigma: Positive
    min: Count | None = None
    max: Count | None = None

    @model_validator(mode="after")
    def _one_centre(self) -> Lognormal:
        if (self.mean is None) == (self.median is None):
            raise ValueError("give either mean or median (tokens)")
        return self


class Length(StrictModel):
    """How many tokens: one of these keys."""

    fixed: Count | None = None  #: every request the same
    uniform: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None  #: [low, high], both included
    lognormal: Lognormal | None = None
    quantiles: str | None = None  #: drawn from a quantile table: a bundled name or a CSV file
    trace: InputFile | None = None  #: drawn with replacement from a request trace

    @field_validator("quantiles")
    @classmethod
    def _table(cls, value: str, info: ValidationInfo) -> str:
        if looks_like_path(value):
            return existing_file(value, info)
        if value not in bundled_lengths():
            raise ValueError(f"unknown quantile table {value!r}; {suggestion(value, bundled_lengths())}, or a path")
        return value

    @model_validator(mode="after")
    def _one(self) -> Length:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}; got {', '.join(given) or 'none'}")
        if self.uniform is not None and self.uniform[0] > self.uniform[1]:
            raise ValueError(f"uniform: low ({self.uniform[0]}) must not exceed high ({self.uniform[1]})")
        return self


class Pairs(StrictModel):
    """Prompt and output lengths drawn together, a row of a request trace at a time."""

    trace: InputFile


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


class JobClass(StrictModel):
    """One class of requests."""

    priority: int = 0  #: lower is more urgent
    share: Share | None = None  #: of the requests; one class may leave it out and gets the rest
    prompt: Length | None = None  #: tokens; left out only where a trace gives them
    output: Length | None = None
    lengths: Pairs | None = None  #: in place of prompt and output
    slo: Slo | None = None

    @model_validator(mode="after")
    def _one_source(self) -> JobClass:
        if self.lengths is not None and (self.prompt is not None or self.output is not None):
            raise ValueError("give either lengths (pairs from a trace) or prompt and output")
        return self


class Poisson(StrictModel):
    """Exponential gaps."""

    process: Literal["poisson"] = "poisson"


class Gamma(StrictModel):
    """Gamma-distributed gaps; cv is their coefficient of variation (1 is Poisson, more is burstier)."""

    process: Literal["gamma"]
    cv: Positive


class OnOff(StrictModel):
    """Bursts: `on_s` seconds at `burst` times the mean rate, then `off_s` seconds at what keeps the mean at `rate`."""

    process: Literal["onoff"]
    on_s: Positive
    off_s: Positive
    burst: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None  #: default: nothing arrives in off_s


class Replay(StrictModel):
    """Arrivals and lengths of a recorded trace; a given `rate` stretches time so that the mean rate is that."""

    process: Literal["trace"]
    file: InputFile
    format: Literal["azure", "burstgpt", "mooncake", "csv", "jsonl"] | None = None  #: default: looked up


Arrival = Annotated[Poisson | Gamma | OnOff | Replay, Field(discriminator="process")]


class LimitsConfig(StrictModel):
    """What the batches and the memory may hold (see scheduler.Limits)."""

    max_seqs: Count = 32  #: sequences in a pass
    max_batched_tokens: Count = 8192  #: tokens in a pass; a longer prompt takes several passes
    block_size: Count = 16  #: tokens in a KV block
    kv_blocks: Count | None = None  #: default: what the GPU's memory has room for, see qllm.build.scheduler_limits
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
