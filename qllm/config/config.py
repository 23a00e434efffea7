"""The configuration of a simulation; each mistake is a ConfigError of one line, with file, line and what is allowed."""

from __future__ import annotations

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from qllm.config.schema import Arrival, JobClass, LimitsConfig, PolicyConfig, Replay
from qllm.config.yaml_lines import ConfigError, YamlFile, load_yaml, parse_dotted, set_path
from qllm.traces.messages import KeyPath, dotted, suggestion
from qllm.traces.requests.recipe import Poisson, Recipe, check_total
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


class Config(StrictModel):
    """One simulated experiment. Times in seconds, lengths in tokens, rates in requests per second."""

    name: str = "simulation"
    timings: str  #: a bundled timing trace or the path of one
    popularity: str = "uniform"  #: how tokens spread over experts: uniform, a bundled table or the path of one
    expert_mode: Literal["fused", "separate"] | None = None  #: default: what the timing trace was taken with
    max_step: Positive = 0.002  #: seconds that a query block or a group of experts should not exceed
    classes: dict[str, JobClass]
    arrival: Arrival = Poisson()
    rate: Positive | None = None  #: all classes together
    requests: Count | None = None  #: sent in one run
    duration: Positive | None = None  #: seconds of arrivals, where `requests` is not given
    limits: LimitsConfig = LimitsConfig()
    policies: list[PolicyConfig]
    seeds: Count | list[Annotated[int, Field(ge=0)]] = 1  #: how many (0, 1, 2, ...) or which
    #: key of this configuration -> values; every combination is run
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    #: written with results: versions, and where the timings come from
    provenance: dict[str, str] = Field(default_factory=dict)

    @field_validator("timings")
    @classmethod
    def _known_timings(cls, value: str, info: ValidationInfo) -> str:
        if looks_like_path(value):
            return existing_file(value, info)
        if value not in bundled_timings():
            raise ValueError(f"unknown timing trace {value!r}; {suggestion(value, bundled_timings())}, or a path")
        return value

    @field_validator("popularity")
    @classmethod
    def _known_popularity(cls, value: str, info: ValidationInfo) -> str:
        names = ["uniform", *bundled_popularity()]
        if looks_like_path(value):
            return existing_file(value, info)
        if value not in names:
            raise ValueError(f"unknown popularity table {value!r}; {suggestion(value, names)}, or a path")
        return value

    @field_validator("classes")
    @classmethod
    def _shares(cls, classes: dict[str, JobClass]) -> dict[str, JobClass]:
        if not classes:
            raise ValueError("at least one class is needed, e.g. ls")
        check_total({name: job.share for name, job in classes.items()})
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
        self.recipe()

    def recipe(self) -> Recipe:
        """What generates the requests. TraceError where the configuration does not say all of it."""
        return checked(Recipe, {"arrival": self.arrival, "classes": self.classes})

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

    def at(self, point: dict[str, Any]) -> Config:
        """This configuration with one point of the sweep put in."""
        data = self.model_dump(exclude_none=True, by_alias=True)
        data["sweep"] = {}
        for key, value in point.items():
            set_path(data, parse_dotted(key), value)
        return Config.model_validate(data)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
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
    key, text = explain(detail, data)
    if swept:
        text = text if key == swept[1] else f"{dotted(key)}: {text}"
        key = swept[0]
    return source.error(key, text)
