"""The configuration of a simulation: its keys, their units and limits, and the one-line errors for all the rest.

Every model here refuses unknown keys. `load_config` turns whatever pydantic finds into a ConfigError of one line that
names file, line, key, the line's content and what is allowed.
"""

from __future__ import annotations

import itertools
import os
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from qllm.policies import file_policy, named_policy
from qllm.yamlfile import ConfigError, KeyPath, YamlFile, kind, load_yaml, parse_dotted, set_path, suggestion
from scheduler import Policy
from traces.length_draws import bundled_lengths
from traces.popularity import bundled_popularity
from traces.timing import bundled as bundled_timings

#: Axis of the figures and column of every table, though it need not be swept.
RATE = "rate"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


def _existing(value: str, info: ValidationInfo) -> str:
    """An absolute path; relative ones start at the configuration's folder."""
    base = (info.context or {}).get("base", Path.cwd())
    path = Path(os.path.abspath(base / Path(value).expanduser()))
    if not path.is_file():
        hint = ""
        if "azure" in path.name.lower():
            hint = "; download it from https://github.com/Azure/AzurePublicDataset (data/)"
        raise ValueError(f"no such file: {os.path.relpath(path)} (paths start at the configuration's folder){hint}")
    return str(path)


def _looks_like_path(value: str) -> bool:
    return "/" in value or os.sep in value or value.endswith((".csv", ".json", ".jsonl", ".py", ".gz"))


InputFile = Annotated[str, AfterValidator(_existing)]


class Keys(BaseModel):
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


class Lognormal(Keys):
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


class Length(Keys):
    """How many tokens: one of these keys."""

    fixed: Count | None = None  #: every request the same
    uniform: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None  #: [low, high], both included
    lognormal: Lognormal | None = None
    quantiles: str | None = None  #: drawn from a quantile table: a bundled name or a CSV file
    trace: InputFile | None = None  #: drawn with replacement from a request trace

    @field_validator("quantiles")
    @classmethod
    def _table(cls, value: str, info: ValidationInfo) -> str:
        if _looks_like_path(value):
            return _existing(value, info)
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


class Pairs(Keys):
    """Prompt and output lengths drawn together, a row of a request trace at a time."""

    trace: InputFile


class Slo(Keys):
    """What makes a finished request good; where several are given, all of them."""

    ttft: Positive | None = None  #: seconds
    ttft_over_isolated: Positive | None = None  #: TTFT over the request's TTFT alone on an idle device
    tpot: Positive | None = None  #: seconds per output token after the first

    @model_validator(mode="after")
    def _something(self) -> Slo:
        if self.ttft is None and self.ttft_over_isolated is None and self.tpot is None:
            raise ValueError("give at least one of ttft, ttft_over_isolated, tpot")
        return self


class JobClass(Keys):
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


class Poisson(Keys):
    """Exponential gaps."""

    process: Literal["poisson"] = "poisson"


class Gamma(Keys):
    """Gamma-distributed gaps; cv is their coefficient of variation (1 is Poisson, more is burstier)."""

    process: Literal["gamma"]
    cv: Positive


class OnOff(Keys):
    """Bursts: `on_s` seconds at `burst` times the mean rate, then `off_s` seconds at what keeps the mean at `rate`."""

    process: Literal["onoff"]
    on_s: Positive
    off_s: Positive
    burst: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None  #: default: nothing arrives in off_s


class Replay(Keys):
    """Arrivals and lengths of a recorded trace; a given `rate` stretches time so that the mean rate is that."""

    process: Literal["trace"]
    file: InputFile
    format: Literal["azure", "burstgpt", "mooncake", "csv", "jsonl"] | None = None  #: default: looked up


Arrival = Annotated[Poisson | Gamma | OnOff | Replay, Field(discriminator="process")]


class LimitsConfig(Keys):
    """What the batches and the memory may hold (see scheduler.Limits)."""

    max_seqs: Count = 32  #: sequences in a pass
    max_tokens: Count = 8192  #: tokens in a pass; a longer prompt takes several passes
    block_size: Count = 16  #: tokens in a KV block
    kv_blocks: Count | None = None  #: default: what the GPU's memory has room for, see qllm.build.scheduler_limits
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9  #: of the GPU's memory that may be used at all
    activation_bytes: NotNegative = 2e9  #: kept free for activations
    urgent_share: Annotated[float, Field(ge=0, lt=1)] = 0.0  #: of the KV blocks, for priorities up to 0 alone
    max_suspended_tokens: Count | None = None  #: tokens in suspended passes, whose activations are kept
    evict: Literal["recompute", "offload"] = "recompute"  #: what becomes of the KV that has to give way

    @model_validator(mode="after")
    def _room_for_decodes(self) -> LimitsConfig:
        if self.max_tokens < self.max_seqs:
            raise ValueError(f"max_tokens ({self.max_tokens}) must be at least max_seqs ({self.max_seqs})")
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


class Config(Keys):
    """One simulated experiment. Times in seconds, lengths in tokens, rates in requests per second."""

    name: str = "simulation"
    timings: str  #: a bundled timing trace or the path of one
    popularity: str = "uniform"  #: how tokens spread over experts: uniform, a bundled table or the path of one
    expert_mode: Literal["fused", "separate"] | None = None  #: default: what the timing trace was taken with
    max_step: Positive = 0.002  #: longest step (seconds) of those that can be cut
    classes: dict[str, JobClass]
    arrival: Arrival = Poisson()
    rate: Positive | None = None  #: all classes together
    requests: Count | None = None  #: sent in one run
    duration: Positive | None = None  #: seconds of arrivals, where `requests` is not given
    limits: LimitsConfig = LimitsConfig()
    policies: list[PolicyConfig]
    seeds: Count | list[Annotated[int, Field(ge=0)]] = 1  #: how many (0, 1, 2, ...) or which
    sweep: dict[str, list[Any]] = {}  #: key of this configuration -> values; every combination is run
    provenance: dict[str, str] = {}  #: written with results: versions, and where the timings come from

    @field_validator("timings")
    @classmethod
    def _known_timings(cls, value: str, info: ValidationInfo) -> str:
        if _looks_like_path(value):
            return _existing(value, info)
        if value not in bundled_timings():
            raise ValueError(f"unknown timing trace {value!r}; {suggestion(value, bundled_timings())}, or a path")
        return value

    @field_validator("popularity")
    @classmethod
    def _known_popularity(cls, value: str, info: ValidationInfo) -> str:
        names = ["uniform", *bundled_popularity()]
        if _looks_like_path(value):
            return _existing(value, info)
        if value not in names:
            raise ValueError(f"unknown popularity table {value!r}; {suggestion(value, names)}, or a path")
        return value

    @field_validator("classes")
    @classmethod
    def _shares(cls, classes: dict[str, JobClass]) -> dict[str, JobClass]:
        if not classes:
            raise ValueError("at least one class is needed, e.g. ls")
        given = [job.share for job in classes.values() if job.share is not None]
        if sum(given) > 1 + 1e-9 or (len(given) == len(classes) and abs(sum(given) - 1) > 1e-9):
            raise ValueError(f"the shares add up to {sum(given):g}; they must add up to 1")
        return classes

    @field_validator("policies")
    @classmethod
    def _distinct(cls, policies: list[PolicyConfig]) -> list[PolicyConfig]:
        if not policies:
            raise ValueError("at least one policy is needed, e.g. fcfs")
        titles = [policy.title for policy in policies]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"two policies are called {title!r}; give one of them a label")
        return policies

    @field_validator("seeds")
    @classmethod
    def _seed_list(cls, seeds: int | list[int]) -> list[int]:
        chosen = list(range(seeds)) if isinstance(seeds, int) else seeds
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"expected a number of seeds or a list of different seeds, got {seeds}")
        return chosen

    @field_validator("sweep")
    @classmethod
    def _sweepable(cls, sweep: dict[str, list[Any]]) -> dict[str, list[Any]]:
        keys = [key for key in cls.model_fields if key not in ("name", "seeds", "sweep", "provenance")]
        for key, values in sweep.items():
            root = str(parse_dotted(key)[0])
            if root not in keys:
                message = f"cannot be swept; {suggestion(root, keys)}, or a key inside one of them (limits.max_seqs)"
                raise PydanticCustomError("unknown_key", "{message}", {"key": key, "message": message})
            if not values:
                raise ValueError(f"{key} has no values; expected a list such as [1, 2]")
        return sweep

    @model_validator(mode="after")
    def _complete(self) -> Config:
        if self.requests is not None and self.duration is not None:
            raise ValueError("give requests or duration, not both")
        if isinstance(self.arrival, Replay):
            for name, job in self.classes.items():
                if job.prompt is not None or job.output is not None or job.lengths is not None:
                    raise ValueError(f"class {name} gives lengths, but a replayed trace brings its own; leave them out")
        else:
            self._complete_recipe()
        return self

    def _complete_recipe(self) -> None:
        """What a generated workload needs besides."""
        if self.requests is None and self.duration is None:
            raise ValueError("give requests (how many are sent) or duration (seconds of arrivals)")
        if self.rate is None and RATE not in self.sweep:
            raise ValueError("give rate (requests per second) or sweep.rate")
        for name, job in self.classes.items():
            if job.lengths is None and (job.prompt is None or job.output is None):
                raise ValueError(f"class {name} needs prompt and output, e.g. prompt: {{fixed: 500}}, or lengths")
        without = [name for name, job in self.classes.items() if job.share is None]
        if len(without) > 1:
            raise ValueError(
                f"classes {', '.join(without)} have no share; one class may leave it out and gets the rest"
            )

    @property
    def seed_list(self) -> list[int]:
        """The seeds, one run each."""
        return self.seeds if isinstance(self.seeds, list) else list(range(self.seeds))

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the swept values, the first key slowest: [{'rate': 0.5}, {'rate': 1.0}, ...]."""
        return [dict(zip(self.sweep, values, strict=True)) for values in itertools.product(*self.sweep.values())]

    def at(self, point: dict[str, Any]) -> Config:
        """This configuration with one point of the sweep put in."""
        data = self.model_dump(exclude_none=True, by_alias=True)
        data["sweep"] = {}
        for key, value in point.items():
            set_path(data, parse_dotted(key), value)
        return Config.model_validate(data)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read, override (`key.path=value`) and check a configuration, every point of its sweep included.

    Raises ConfigError: one line that names file, line, key, the line's content and what is allowed.
    """
    source = load_yaml(path)
    for assignment in overrides:
        source.override(assignment)
    context = {"base": source.path.parent}
    try:
        config = Config.model_validate(source.data, context=context)
    except ValidationError as error:
        raise _one_line(source, error.errors()[0], source.data) from None
    for key, values in config.sweep.items():
        for position, value in enumerate(values):
            _check_swept(source, key, position, value, context)
    return config


def _check_swept(source: YamlFile, key: str, position: int, value: Any, context: dict[str, Any]) -> None:
    """Validate the configuration with one swept value in place; its error names the line of the sweep."""
    data = deepcopy(source.data)
    try:
        set_path(data, parse_dotted(key), value)
        Config.model_validate(data, context=context)
    except ConfigError as error:
        raise source.error(("sweep", key), str(error)) from None
    except ValidationError as error:
        found = _one_line(source, error.errors()[0], data, swept=(("sweep", key, position), parse_dotted(key)))
        raise found from None


def _one_line(
    source: YamlFile, detail: ErrorDetails, data: Any, swept: tuple[KeyPath, KeyPath] | None = None
) -> ConfigError:
    """The ConfigError for pydantic's first finding. `swept`: where the value came from and where it was put."""
    key = _key_path(detail["loc"], data)
    context = detail.get("ctx", {})
    problem, value = detail["type"], detail["input"]
    if problem == "unknown_key":
        key = (*key, context["key"])
        text = f"unknown key {context['key']!r}; {context['message']}"
    elif problem == "missing":
        text = "this key is missing"
    elif problem == "value_error":
        text = str(context["error"])
    elif problem in ("union_tag_invalid", "literal_error"):
        given = context.get("tag", value)
        options = context.get("expected_tags") or context["expected"]
        names = [name.strip().strip("'") for name in options.replace(" or ", ", ").split(",")]
        key = (*key, context["discriminator"].strip("'")) if "discriminator" in context else key
        text = f"{given!r} is unknown; {suggestion(str(given), names)}"
    elif problem == "union_tag_not_found":
        text = f"the key {context['discriminator']} is missing"
    elif problem in ("model_type", "dict_type"):
        text = f"expected a mapping of keys, got {kind(value)}"
    else:
        said = detail["msg"][:1].lower() + detail["msg"][1:]
        shown = kind(value) if isinstance(value, dict | list) or value is None else repr(value)
        text = f"{said.replace('input should be', 'must be')}, got {shown}"
    if swept:
        text = text if key == swept[1] else f"{'.'.join(map(str, key))}: {text}"
        key = swept[0]
    return source.error(key, text)


def _key_path(loc: tuple[int | str, ...], data: Any) -> KeyPath:
    """The part of pydantic's location that stands in the data (it also holds names of the models tried)."""
    key: list[int | str] = []
    for depth, part in enumerate(loc):
        size = len(data) if isinstance(data, list) else 0
        if part in data if isinstance(data, dict) else isinstance(part, int) and part < size:
            key.append(part)
            data = data[part]
        elif depth == len(loc) - 1 and isinstance(data, dict):
            key.append(part)
    return tuple(key)
