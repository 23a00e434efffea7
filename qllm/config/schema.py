"""The parts of a configuration; lengths and arrivals are those of a trace's recipe. config.py reports what is wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator

from qllm.config.policies import file_policy, named_policy
from qllm.scheduler import Policy
from qllm.traces.messages import shown
from qllm.traces.requests.recipe import ClassRecipe, Generated, process_by_name
from qllm.traces.requests.strict_model import Count, InputFile, Positive, StrictModel


def check_title(text: str) -> str:
    """What tables, figures and their legends can show."""
    if not re.fullmatch(r"[^_$][^$]{0,79}", text) or not text.strip() or not text.isprintable():
        raise ValueError(
            f"{shown(text)} cannot be shown in tables and figures; allowed: up to 80 printable characters without $, "
            "the first none of _"
        )
    return text


def _file_name(text: str) -> str:
    """What a folder can be called on any system."""
    if not re.fullmatch(r"\w([\w .,+=@()-]{0,98}[\w+=@()-])?", text):
        raise ValueError(
            f"{shown(text)} is not a plain file name; allowed: up to 100 letters, digits and any of _-+=.,@() or space"
        )
    return text


def _short(value: Any, parts: int) -> Any:
    """`value` with the last `parts` parts of the absolute paths in it."""
    if isinstance(value, dict):
        return {key: _short(item, parts) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item, parts) for item in value]
    return "/".join(Path(value).parts[-parts:]) if isinstance(value, str) and os.path.isabs(value) else value


def cells(values: list[Any]) -> list[int | float | str]:
    """Swept values as a column of a table, of one type: numbers if all are, else text; files by name.

    ValueError where a value stands twice.
    """
    if all(isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 62 for value in values):
        found: list[int | float | str] = list(values)
    else:
        for parts in range(1, 20):
            found = [_text(_short(value, parts)) for value in values]
            if len(set(found)) == len(found):
                break
    twice = next((cell for cell in found if found.count(cell) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} stands twice; allowed: each value once")
    return found


def _text(value: Any) -> str:
    """A swept value as text; null is "none", which no reader of tables takes for a missing number."""
    if isinstance(value, str):
        return value
    return "none" if value is None else yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]


Title = Annotated[str, AfterValidator(check_title)]
FileName = Annotated[str, AfterValidator(_file_name)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Slo(StrictModel):
    """What makes a finished request good; where several are given, all of them."""

    ttft: Positive | None = None  #: seconds
    ttft_over_isolated: Positive | None = None  #: TTFT over the request's TTFT alone on an idle device
    tpot: Positive | None = None  #: seconds per output token after the first
    e2e: Positive | None = None  #: seconds from arrival to the last token

    @model_validator(mode="after")
    def _something(self) -> Slo:
        if all(getattr(self, key) is None for key in type(self).model_fields):
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self


class Deadline(StrictModel):
    """Within which time a policy is to serve a request of the class, if it goes by that (as slack does)."""

    ttft: Positive | None = None  #: seconds from arrival to the first token
    tpot: Positive | None = None  #: seconds from token to token, on average


class Warmup(StrictModel):
    """The beginning of each run, whose requests do not count in the metrics: give one of the two."""

    seconds: NotNegative | None = None  #: from the first arrival on
    share: Annotated[float, Field(ge=0, lt=1)] | None = None  #: of the requests, in the order of their arrivals

    @model_validator(mode="after")
    def _one(self) -> Warmup:
        if (self.seconds is None) == (self.share is None):
            raise ValueError("give either seconds or share (of the requests)")
        return self


class _Priority(StrictModel):
    """The key that a class begins with."""

    priority: int = 0  #: lower is more urgent


class JobClass(ClassRecipe, _Priority):
    """One class of requests: its priority, its share or rate, its lengths as in the recipe of a trace, and its SLO."""

    #: requests per second of this class, in place of share; all classes have one, or none. A `rate` of the whole scales
    #: them in proportion
    rate: Positive | None = None
    slo: Slo | None = None
    deadline: Deadline | None = None  #: what policies may go by; the SLO is what results are judged by


class Replay(StrictModel):
    """Arrivals and lengths of a recorded trace; a given `rate` stretches time so that the mean rate is that."""

    process: Literal["trace"]  #: how requests arrive
    file: InputFile  #: a request trace
    #: default: found from the content
    format: Literal["azure", "burstgpt", "mooncake", "bailian", "csv", "jsonl"] | None = None
    unit: Literal["s", "ms", "us", "ns"] | None = None  #: of the file's arrivals; default: what the format says
    spread: bool = False  #: spread requests that share an instant over the gap to the next (arrivals were rounded)
    skip_invalid: bool = False  #: leave rows out that are no requests; a warning counts them
    #: of bailian's: a chat comes when its parent was answered and as much time has passed as between their arrivals;
    #: files of our own say whom a request follows by the columns follows and think_s
    sessions: bool = False


class Batch(StrictModel):
    """All requests at once, when the run begins: an offline batch, which has no rate."""

    process: Literal["batch"]  #: how requests arrive


class Closed(StrictModel):
    """A closed loop: clients that send their next request when the last has ended. It has no rate."""

    process: Literal["closed"]  #: how requests arrive
    clients: Count  #: of closed: each has one request in the system at most
    think_s: NotNegative = 0.0  #: of closed: seconds between an answer and the client's next request, exponential mean


class Conversations(StrictModel):
    """Conversations of several turns: a turn comes when the last was answered, and its prompt repeats all before it."""

    process: Literal["conversations"]  #: how requests arrive
    turns: Count  #: of conversations: requests of each; their first ones are a Poisson process of rate / turns
    think_s: NotNegative = 0.0  #: of conversations: seconds between an answer and the next turn, exponential mean


Unscheduled = Batch | Closed  #: arrivals that no rate tells
Arrival = Annotated[
    Annotated[Generated | Replay | Batch | Closed | Conversations, Field(discriminator="process")],
    BeforeValidator(process_by_name),
]


class LimitsConfig(StrictModel):
    """What the batches and the memory may hold (see qllm.scheduler.Limits)."""

    max_seqs: Count = 32  #: sequences in a pass
    max_batched_tokens: Count = 8192  #: tokens in a pass; a longer prompt takes several passes
    block_size: Count = 16  #: tokens in a KV block
    kv_blocks: Count | None = None  #: default: what the GPU's memory has room for, after weights and activations
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9  #: of the GPU's memory that may be used at all
    activation_bytes: Annotated[float, Field(ge=0, le=1e15)] = 2e9  #: kept free for activations
    urgent_share: Annotated[float, Field(ge=0, lt=1)] = 0.0  #: of the KV blocks, for priorities up to 0 alone
    max_suspended_tokens: Count | None = None  #: tokens in suspended passes, whose activations are kept
    #: requests that hold KV at a time; default: any, or twice max_seqs where each keeps more than blocks (windows)
    max_resident: Count | None = None
    evict: Literal["recompute", "offload"] = "recompute"  #: what becomes of the KV that has to give way
    #: keep the KV of prompts for those that begin alike, as long as nobody needs the blocks; in simulations of traces
    #: with hash_ids and of conversations
    prefix_cache: bool = False

    @model_validator(mode="after")
    def _room_for_decodes(self) -> LimitsConfig:
        if self.max_batched_tokens < self.max_seqs:
            raise ValueError(
                f"max_batched_tokens ({self.max_batched_tokens}) must be at least max_seqs ({self.max_seqs})"
            )
        return self


class CapacityConfig(StrictModel):
    """What `qllm capacity` looks for, and what a GPU costs."""

    attainment: Annotated[float, Field(gt=0, le=1)] = 0.99  #: share of the requests of each class to be within its SLO
    #: how far the rate found may lie below the lowest that fails, over it
    precision: Annotated[float, Field(ge=1e-4, le=0.5)] = 0.01
    price_per_gpu_hour: Positive | None = None  #: in any currency; with it, costs per million tokens are told
    #: the same where several GPUs are compared, by a part of their names: {a100: 2, h200: 4}
    prices: dict[str, Positive] = Field(default_factory=dict)
    curve: Annotated[int, Field(ge=0, le=100)] = 6  #: rates at which the attainment is drawn

    @model_validator(mode="after")
    def _one_price(self) -> CapacityConfig:
        if self.prices and self.price_per_gpu_hour is not None:
            raise ValueError("give either price_per_gpu_hour or prices")
        return self


class PolicyConfig(BaseModel):
    """One policy: a name of the registry or a Python file, a label for tables, and the policy's own settings."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: str | None = None  #: of a policy that ships
    file: InputFile | None = None  #: a Python file that defines one
    class_: str | None = Field(None, alias="class")  #: which class of the file, where it defines several policies
    label: Title | None = None  #: in tables and figures

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, data: Any) -> Any:
        if not isinstance(data, str | dict | PolicyConfig):
            raise ValueError(f"must be the name of a policy, or a mapping with name or file; got {shown(data)}")
        return {"name": data} if isinstance(data, str) else data

    @model_serializer
    def _as_given(self) -> dict[str, Any]:
        """With the settings that are null, which may differ from settings left out."""
        fields = {"name": self.name, "file": self.file, "class": self.class_, "label": self.label}
        return {key: value for key, value in fields.items() if value is not None} | (self.model_extra or {})

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
