"""The configuration of a simulation; each mistake is a ConfigError of one line, with file, line and what is allowed."""

from __future__ import annotations

import itertools
import math
import os
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from qllm.config.schema import (
    Arrival,
    CapacityConfig,
    Conversations,
    FileName,
    JobClass,
    LimitsConfig,
    PolicyConfig,
    Replay,
    Unscheduled,
    Warmup,
    cells,
    check_title,
)
from qllm.config.timings_source import named_timings
from qllm.config.yaml_lines import ConfigError, YamlFile, load_yaml, parse_dotted, set_path
from qllm.traces.messages import KeyPath, dotted, suggestion
from qllm.traces.requests.clients.settings import Clients, Servegen
from qllm.traces.requests.recipe import Generated, Poisson, Recipe, check_total
from qllm.traces.requests.strict_model import (
    Count,
    Positive,
    StrictModel,
    checked,
    existing_file,
    explain,
    looks_like_path,
)
from qllm.traces.step_times.popularity import bundled_popularity
from qllm.traces.step_times.timings import bundled_timings

#: Axis of the figures and column of every table, though it need not be swept.
RATE = "rate"
MOST_RUNS = 100_000  #: simulations of one sweep
MOST_REPLICAS = 1024


class Config(StrictModel):
    """One simulated experiment. Times in seconds, lengths in tokens, rates in requests per second."""

    name: FileName = "simulation"  #: of the folder of the results
    #: a bundled timing trace, the path of one, or its GPU and model, as {gpu: h200, model: qwen3-30b-a3b}
    timings: str
    popularity: str = "uniform"  #: how tokens spread over experts: uniform, a bundled table or the path of one
    expert_mode: Literal["fused", "separate"] | None = None  #: default: what the timing trace was taken with
    #: seconds that a query block or a group of experts should not exceed
    max_step: Annotated[float, Field(ge=1e-6, allow_inf_nan=False)] = 0.002
    classes: dict[str, JobClass]  #: of requests, by name, such as ls and be
    arrival: Arrival = Poisson()  #: how requests arrive: a process, or a recorded trace
    rate: Positive | None = None  #: requests per second, all classes together
    requests: Count | None = None  #: how many are sent in one run
    duration: Positive | None = None  #: seconds of arrivals, where `requests` is not given
    warmup: Warmup | None = None  #: what of each run the metrics leave out
    limits: LimitsConfig = LimitsConfig()
    replicas: Annotated[int, Field(ge=1, le=MOST_REPLICAS)] = 1  #: GPUs behind a router, each with its own scheduler
    #: of several GPUs the one that a request goes to: each in turn; where the fewest requests are; where the fewest are
    #: that are as urgent; where the fewest prompt tokens are computed first; or all wait in front, most urgent first
    router: Literal["round_robin", "least_loaded", "ls_aware", "prefix_aware", "shared_queue"] = "least_loaded"
    policies: list[PolicyConfig]  #: those that are compared
    #: how many (0, 1, 2, ...) or which
    seeds: Annotated[int, Field(ge=1, le=MOST_RUNS)] | list[Annotated[int, Field(ge=0, lt=1 << 63)]] = Field(
        1, validate_default=True
    )
    capacity: CapacityConfig = CapacityConfig()
    #: key of this configuration -> values; every combination is run
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    #: written with results: versions, and where the timings come from
    provenance: dict[str, str] = Field(default_factory=dict)

    @field_validator("timings", mode="before")
    @classmethod
    def _named_timings(cls, value: Any, info: ValidationInfo) -> Any:
        return named_timings(value, info)

    @field_validator("timings")
    @classmethod
    def _known_timings(cls, value: str, info: ValidationInfo) -> str:
        if looks_like_path(value):
            return existing_file(value, info)
        if value not in bundled_timings():
            there = suggestion(value, bundled_timings())
            raise ValueError(f"unknown timing trace {value!r:.80}; {there}, {{gpu: ..., model: ...}}, or a path")
        return value

    @field_validator("popularity")
    @classmethod
    def _known_popularity(cls, value: str, info: ValidationInfo) -> str:
        names = ["uniform", *bundled_popularity()]
        if looks_like_path(value):
            return existing_file(value, info)
        if value not in names:
            raise ValueError(f"unknown popularity table {value!r:.80}; {suggestion(value, names)}, or a path")
        return value

    @field_validator("classes")
    @classmethod
    def _shares(cls, classes: dict[str, JobClass]) -> dict[str, JobClass]:
        if not classes:
            raise ValueError("at least one class is needed, e.g. ls")
        for name in classes:
            check_title(name)
        rates = [name for name, job in classes.items() if job.rate is not None]
        odd = [name for name, job in classes.items() if rates and (job.rate is None or job.share is not None)]
        if odd:
            raise ValueError(
                f"class {rates[0]} has a rate; allowed: a rate for each class, also {odd[0]}, and no share"
            )
        if not rates:
            check_total({name: job.share for name, job in classes.items()})
        return classes

    @field_validator("policies")
    @classmethod
    def _distinct(cls, policies: list[PolicyConfig]) -> list[PolicyConfig]:
        if not policies:
            raise ValueError("at least one policy is needed, e.g. fcfs")
        titles = [policy.title for policy in policies]
        for title in titles:
            check_title(title)
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
            root, *inner = map(str, parse_dotted(key))
            if root == "timings" and inner:
                raise ValueError(f"{key} cannot be swept; allowed: timings: [{{gpu: ..., model: ...}}, ...]")
            if root not in keys:
                message = f"cannot be swept; {suggestion(root, keys)}, or a key inside one of them (limits.max_seqs)"
                raise PydanticCustomError("unknown_key", "{message}", {"key": key, "message": message})
            if not values:
                raise ValueError(f"{key} has no values; expected a list such as [1, 2]")
            try:
                cells(values)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        return sweep

    @model_validator(mode="after")
    def _complete(self) -> Config:
        runs = math.prod(len(values) for values in self.sweep.values()) * len(self.policies) * len(self.seed_list)
        if runs > MOST_RUNS:
            raise ValueError(f"the sweep has {runs:,} simulations; allowed: {MOST_RUNS:,}")
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
        process = self.arrival.process
        if isinstance(self.arrival, Unscheduled):
            if self.requests is None:
                raise ValueError(f"arrival {process} needs requests (how many are sent)")
            if self.rate is not None or RATE in self.sweep or self.has_class_rates:
                raise ValueError(f"arrival {process} has no rate; leave rate out")
        elif self.requests is None and self.duration is None:
            raise ValueError("give requests (how many are sent) or duration (seconds of arrivals)")
        elif self.offered_rate is None and RATE not in self.sweep:
            raise ValueError("give rate (requests per second) or sweep.rate")
        if self.has_class_rates:
            if isinstance(self.arrival, Conversations | Clients | Servegen):
                raise ValueError(f"arrival {process} has one rate; give classes a share in place of a rate")
            for name in self.classes:
                self.recipe(name)
        else:
            self.recipe()

    @property
    def has_class_rates(self) -> bool:
        """Whether each class comes at a rate of its own."""
        return any(job.rate is not None for job in self.classes.values())

    @property
    def offered_rate(self) -> float | None:
        """Requests per second, all classes together; None where nobody says."""
        if self.rate is not None or not self.has_class_rates:
            return self.rate
        return sum(job.rate or 0.0 for job in self.classes.values())

    def recipe(self, name: str | None = None) -> Recipe:
        """What generates the requests, or those of one class. TraceError where the configuration does not say all."""
        process = self.arrival if isinstance(self.arrival, Generated) else Poisson()
        classes = self.classes if name is None else {name: self.classes[name].model_copy(update={"share": None})}
        return checked(Recipe, {"arrival": process, "classes": classes})

    @property
    def priorities(self) -> dict[str, int]:
        """Of each class, lower is more urgent."""
        return {name: job.priority for name, job in self.classes.items()}

    @property
    def seed_list(self) -> list[int]:
        """The seeds, one run each."""
        return self.seeds if isinstance(self.seeds, list) else list(range(self.seeds))

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the swept values, the first key slowest: [{'rate': 0.5}, {'rate': 1.0}, ...]."""
        return [dict(zip(self.sweep, values, strict=True)) for values in itertools.product(*self.sweep.values())]

    def point_cells(self) -> list[dict[str, int | float | str]]:
        """`points`, their values as tables have them."""
        columns = [cells(values) for values in self.sweep.values()]
        return [dict(zip(self.sweep, row, strict=True)) for row in itertools.product(*columns)]

    def at(self, point: dict[str, Any]) -> Config:
        """This configuration with one point of the sweep put in. ConfigError where its values do not go together."""
        data = self.model_dump(exclude_unset=True, by_alias=True)
        data["sweep"] = {}
        for name, value in point.items():
            set_path(data, parse_dotted(name), value)
        try:
            return Config.model_validate(data)
        except ValidationError as error:
            key, text = explain(error, data)
            where = ", ".join(f"{name}={value}" for name, value in point.items())
            raise ConfigError(f"sweep: at {where}: {f'{dotted(key)}: ' if key else ''}{text}") from None


def load_config(path: str | Path, overrides: str | list[str] | tuple[str, ...] = ()) -> Config:
    """Read and check a configuration, every point of its sweep included.

    Args:
        path: The YAML file.
        overrides: Keys to change, as "key.path=value".

    Returns:
        The configuration, its paths absolute.

    Raises:
        ConfigError: One line that names file, line, key, the line's content and what is allowed.
    """
    source = load_yaml(path)
    for assignment in [overrides] if isinstance(overrides, str) else overrides:
        source.override(assignment)
    context = {"base": source.path.parent}
    try:
        config = Config.model_validate(source.data, context=context)
    except ValidationError as error:
        raise _one_line(source, error, source.data) from None
    sweep = {
        key: [_checked_swept(source, key, position, value, context) for position, value in enumerate(values)]
        for key, values in config.sweep.items()
    }
    for key, values in sweep.items():
        try:
            cells(values)
        except ValueError as error:
            raise source.error(("sweep", key), str(error)) from None
    return config.model_copy(update={"sweep": sweep}) if sweep else config


def _checked_swept(source: YamlFile, key: str, position: int, value: Any, context: dict[str, Any]) -> Any:
    """`value`, its paths absolute, if the configuration is valid with it; else an error names the line of the sweep."""
    data, path = deepcopy(source.data), parse_dotted(key)
    try:
        set_path(data, path, value)
        found: Any = Config.model_validate(data, context=context).model_dump(by_alias=True)
    except ConfigError as error:
        raise source.error(("sweep", key), str(error)) from None
    except ValidationError as error:
        raise _one_line(source, error, data, swept=(("sweep", key, position), path)) from None
    for part in path:
        found = found.get(part) if isinstance(found, dict) else found[part]
    return _with_paths(value, found)


def _with_paths(value: Any, found: Any) -> Any:
    """`value` with the absolute paths that validation made of files in it."""
    if isinstance(value, dict) and isinstance(found, dict):
        return {key: _with_paths(item, found.get(key)) for key, item in value.items()}
    if isinstance(value, list) and isinstance(found, list):
        return [_with_paths(*pair) for pair in zip(value, found, strict=True)]
    if isinstance(value, dict) and isinstance(found, str):  # names that stand for one
        return found
    if isinstance(value, str) and isinstance(found, dict):  # its long form
        return next((item for item in found.values() if isinstance(item, str) and os.path.isabs(item)), value)
    return found if isinstance(value, str) and isinstance(found, str) and os.path.isabs(found) else value


def _one_line(
    source: YamlFile, error: ValidationError, data: Any, swept: tuple[KeyPath, KeyPath] | None = None
) -> ConfigError:
    """The ConfigError for pydantic's first finding. `swept`: where the value came from and where it was put."""
    key, text = explain(error, data)
    if swept:
        text = text if key in ((), swept[1]) else f"{dotted(key)}: {text}"
        key = swept[0]
    return source.error(key, text)
