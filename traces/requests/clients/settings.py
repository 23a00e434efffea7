"""What a recipe or a configuration says of a pool of clients."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qllm.traces.requests.strict_model import Count, InputFolder, Positive, StrictModel

MOST_CLIENTS = 100_000
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Clients(StrictModel):
    """Clients with Gamma gaps, each at a rate of its own, of which a few send most; all rates add up to `rate`.

    The k-th client's rate is in proportion to 1 / k**skew (Zipf). Each one is the tenant of its requests.
    """

    process: Literal["clients"]  #: how requests arrive
    clients: Count  #: of clients and closed: how many; of closed each has one request in the system at most
    cv: Positive  #: of the gaps of each client; 1 is poisson, more is burstier
    skew: Annotated[float, Field(ge=0, le=10)] = 1.0  #: of clients: the k-th one's rate is as 1 / k**skew; 0: all alike
    #: of clients: how far their lengths lie apart, as the standard deviation of the logarithm of a factor of each; the
    #: mean over all requests stays that of the class
    length_sigma: Annotated[float, Field(ge=0, le=3)] = 0.0

    @field_validator("clients")
    @classmethod
    def _not_too_many(cls, clients: int) -> int:
        if clients > MOST_CLIENTS:
            raise ValueError(f"{clients} must be at most {MOST_CLIENTS}")
        return clients

    @field_validator("cv")
    @classmethod
    def _drawable(cls, cv: float) -> float:
        if not 1e-3 <= cv <= 100:  # as of gamma
            raise ValueError(f"{cv!r} must lie between 0.001 and 100")
        return cv


class Servegen(StrictModel):
    """The clients of a folder of ServeGen's: their rates by window, how their gaps spread, their lengths.

    The mean rate over the time from `begin_s` to `end_s` is `rate`; then it begins again.
    """

    process: Literal["servegen"]  #: how requests arrive
    folder: InputFolder  #: of servegen: the one with chunk-0-trace.csv, chunk-0-dataset.json and so on
    busiest: Count | None = None  #: of servegen: so many clients, those with most requests; default: all
    begin_s: NotNegative = 0.0  #: of servegen: where in the time of its files a run begins, in seconds
    end_s: Positive | None = None  #: of servegen: where it begins again; default: where the files end

    @model_validator(mode="after")
    def _some_time(self) -> Servegen:
        if self.end_s is not None and self.end_s < self.begin_s + 1:
            raise ValueError(f"end_s ({self.end_s:g}) must be at least a second above begin_s ({self.begin_s:g})")
        return self
