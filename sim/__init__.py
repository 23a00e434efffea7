"""The simulator: the Scheduler on virtual time, over a SimPy model of the GPU."""

from traces.results import RunResult as SimResult
from traces.results import Slice, Status

from .routing import Recorded, Resampled, Routing
from .runs import Pace
from .simulate import isolated_ttft, simulate, uniform

__all__ = [
    "Pace",
    "Recorded",
    "Resampled",
    "Routing",
    "SimResult",
    "Slice",
    "Status",
    "isolated_ttft",
    "simulate",
    "uniform",
]
