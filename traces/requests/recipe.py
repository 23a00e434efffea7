"""The recipe of a generated trace. These models are its only check, from a configuration, command line or Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qllm.traces.messages import shown, suggestion
from qllm.traces.requests.clients.settings import Clients, Servegen
from qllm.traces.requests.quantile_table import bundled_lengths
from qllm.traces.requests.strict_model import (
    Count,
    InputFile,
    Positive,
    StrictModel,
    checked,
    existing_file,
    looks_like_path,
)
from qllm.traces.requests.trace import SINGLE_CLASS, TraceError, check_classes

Share = Annotated[float, Field(ge=0, le=1)]


class Lognormal(StrictModel):
    """Lognormal token counts: exp(normal(mu, sigma)), rounded, with mu = ln(median), or ln(mean) - sigma**2 / 2.

    `mean` and `median` hold before clipping: what lies outside [`min`, `max`] (default: 1, no bound) is set to the
    bound, not drawn again, so the mean moves.
    """

    mean: Positive | None = None  #: tokens; give this or median
    median: Positive | None = None  #: tokens
    sigma: Annotated[float, Field(gt=0, le=10)]  #: standard deviation of the logarithm
    min: Count | None = None  #: tokens; shorter ones become that
    max: Count | None = None  #: tokens; longer ones become that

    @model_validator(mode="after")
    def _one_centre(self) -> Lognormal:
        if (self.mean is None) == (self.median is None):
            raise ValueError("give either mean or median (tokens)")
        if self.max is not None and (self.min or 1) > self.max:
            raise ValueError(f"min ({self.min}) must not exceed max ({self.max})")
        return self


class Length(StrictModel):
    """How many tokens: one of these keys. A number alone is `fixed`, a name alone `quantiles`."""

    fixed: Count | None = None  #: tokens, every request the same
    #: tokens, [low, high], both included
    uniform: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    lognormal: Lognormal | None = None
    quantiles: str | None = None  #: drawn from a quantile table: a bundled name or a CSV file
    trace: InputFile | None = None  #: drawn with replacement from a request trace

    @model_validator(mode="before")
    @classmethod
    def _in_full(cls, data: Any) -> Any:
        number = isinstance(data, int | float) and not isinstance(data, bool)
        return {"fixed": data} if number else {"quantiles": data} if isinstance(data, str) else data

    @field_validator("quantiles")
    @classmethod
    def _table(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        if looks_like_path(value):
            return existing_file(value, info)
        if value not in bundled_lengths():
            raise ValueError(
                f"unknown quantile table {shown(value)}; {suggestion(value, bundled_lengths())}, or a path"
            )
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

    trace: InputFile  #: a request trace, from which rows are drawn with replacement


class Poisson(StrictModel):
    """Exponential gaps."""

    process: Literal["poisson"] = "poisson"  #: how requests arrive


class Gamma(StrictModel):
    """Gamma-distributed gaps; cv is their coefficient of variation (1 is Poisson, more is burstier)."""

    process: Literal["gamma"]
    cv: Positive  #: of gamma and of clients: coefficient of variation of the gaps; 1 is poisson, more is burstier

    @field_validator("cv")
    @classmethod
    def _drawable(cls, cv: float) -> float:
        if not 1e-3 <= cv <= 100:  # beyond, the shape leaves what float64 draws well
            raise ValueError(f"{cv!r} must lie between 0.001 and 100")
        return cv


class OnOff(StrictModel):
    """Bursts: `on_s` seconds at `burst` times the mean rate, then `off_s` seconds at what keeps the mean at `rate`."""

    process: Literal["onoff"]
    on_s: Positive  #: of onoff: seconds of a burst
    off_s: Positive  #: of onoff: seconds between two bursts
    #: of onoff: times the mean rate; default: nothing arrives in off_s
    burst: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _mean_can_be_kept(self) -> OnOff:
        highest = (self.on_s + self.off_s) / self.on_s
        if self.burst is not None and self.burst > highest * (1 + 1e-9):
            raise ValueError(f"burst ({self.burst!r}) must lie between 1 and (on_s + off_s) / on_s = {highest:g}")
        return self


class Phase(StrictModel):
    """A stretch of time at a rate of its own."""

    seconds: Positive  #: how long it lasts
    rate: Annotated[float, Field(ge=0, allow_inf_nan=False)]  #: in proportion to that of the other phases


class Phases(StrictModel):
    """A Poisson process whose rate changes: phases one after the other, over and over, with `rate` as their mean."""

    process: Literal["phases"]
    phases: Annotated[list[Phase], Field(min_length=1, max_length=1000)]  #: of phases: such as the hours of a day

    @model_validator(mode="after")
    def _somebody_comes(self) -> Phases:
        if not any(phase.rate for phase in self.phases):
            raise ValueError("the rate of one phase at least must be above 0")
        return self


def process_by_name(data: Any) -> Any:
    """`arrival: poisson` in full. ValueError for what is neither a name nor a mapping."""
    if data is None or isinstance(data, str):
        return {"process": data or "poisson"}
    if not isinstance(data, Mapping | BaseModel):
        raise ValueError(f"must be the name of a process, such as poisson, or a mapping; got {shown(data)}")
    return data


Generated = Poisson | Gamma | OnOff | Phases | Clients | Servegen  #: processes that draw arrivals at a rate
GeneratedArrival = Annotated[Annotated[Generated, Field(discriminator="process")], BeforeValidator(process_by_name)]


class ClassRecipe(StrictModel):
    """One class of a generated trace."""

    share: Share | None = None  #: of the requests; one class may leave it out and gets the rest
    prompt: Length | None = None  #: tokens; left out only where a trace or the whole recipe gives them
    output: Length | None = None
    lengths: Pairs | None = None  #: in place of prompt and output

    @model_validator(mode="after")
    def _one_source(self) -> ClassRecipe:
        if self.lengths is not None and (self.prompt is not None or self.output is not None):
            raise ValueError("give either lengths (pairs from a trace) or prompt and output")
        return self


class Recipe(StrictModel):
    """A whole trace; `prompt`, `output` or `lengths` serve the classes that give none of their own."""

    arrival: GeneratedArrival = Poisson()
    classes: dict[str, ClassRecipe] = Field(default_factory=lambda: {SINGLE_CLASS[0]: ClassRecipe()})
    prompt: Length | None = None
    output: Length | None = None
    lengths: Pairs | None = None

    @field_validator("classes")
    @classmethod
    def _shares(cls, classes: dict[str, ClassRecipe]) -> dict[str, ClassRecipe]:
        _adding_up({name: of_class.share for name, of_class in classes.items()})
        return classes

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        if self.lengths is not None and (self.prompt is not None or self.output is not None):
            raise ValueError("give either lengths (pairs from a trace) or prompt and output")
        for name in self.classes:
            self.lengths_of(name)
        return self

    def lengths_of(self, name: str) -> Pairs | tuple[Length, Length] | None:
        """Where a class's lengths come from: pairs, or prompt and output, or None: from the clients of a folder.

        TraceError where the recipe does not say.
        """
        own = self.classes[name]
        if own.lengths is not None:
            return own.lengths
        if self.lengths is not None and own.prompt is None and own.output is None:
            return self.lengths
        prompt, output = own.prompt or self.prompt, own.output or self.output
        if prompt is None and output is None and isinstance(self.arrival, Servegen):
            return None
        if prompt is None or output is None:
            raise TraceError(f"class {name} needs prompt and output, e.g. prompt: {{fixed: 500}}, or lengths")
        return prompt, output


def check_recipe(recipe: Recipe | Mapping[str, Any]) -> Recipe:
    """The recipe, checked. TraceError: one line with the key and what is allowed."""
    return recipe if isinstance(recipe, Recipe) else checked(Recipe, recipe)


def check_arrival(arrival: GeneratedArrival | Mapping[str, Any]) -> GeneratedArrival:
    """The arrival process, checked. TraceError as for a recipe."""
    return checked(_ARRIVAL, arrival, ("arrival",))


def check_shares(shares: Mapping[str, float | None]) -> dict[str, float | None]:
    """The share of each class, checked: they add up to 1, and one may be None. TraceError as for a recipe."""
    return checked(_SHARES, shares, ("classes",))


def check_total(shares: Mapping[str, float | None]) -> None:
    """TraceError where the given shares add up to more than 1, or are all there and add up to less."""
    given = [share for share in shares.values() if share is not None]
    if sum(given) > 1 + 1e-9 or (len(given) == len(shares) and abs(sum(given) - 1) > 1e-9):
        told = ", ".join(f"{name} {'-' if share is None else f'{share:.12g}'}" for name, share in shares.items())
        raise TraceError(f"the shares ({told}) add up to {sum(given):.12g}; they must add up to 1")


def _adding_up(shares: dict[str, float | None]) -> dict[str, float | None]:
    check_classes(list(shares))
    check_total(shares)
    without = [name for name, share in shares.items() if share is None]
    if len(without) > 1:
        raise TraceError(f"{', '.join(without)} have no share; one class may leave it out and gets the rest")
    return shares


_ARRIVAL: TypeAdapter[GeneratedArrival] = TypeAdapter(GeneratedArrival)
_SHARES: TypeAdapter[dict[str, float | None]] = TypeAdapter(
    Annotated[dict[str, Share | None], AfterValidator(_adding_up)]
)
