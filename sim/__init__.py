"""The simulator: the Scheduler on virtual time, over a SimPy model of the GPU."""

if __name__ != "qllm.sim":
    raise ImportError("this package is called qllm.sim: from qllm.sim import ...")

from qllm.sim.passes import Pace
from qllm.sim.routing import Recorded, Resampled, Routing
from qllm.sim.simulate import isolated_ttft, simulate, uniform
from qllm.traces.results import RunResult as SimResult
from qllm.traces.results import Slice, Status

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
