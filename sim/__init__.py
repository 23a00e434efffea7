"""The simulator: the Scheduler on virtual time, over a SimPy model of the GPU."""

if __name__ != "qllm.sim":
    raise ImportError("this package is called qllm.sim: from qllm.sim import ...")

from qllm.sim.isolated import isolated_ttft, uniform
from qllm.sim.replicas import ROUTERS
from qllm.sim.routing import RecordedRouting, ResampledRouting, Routing
from qllm.sim.simulate import simulate
from qllm.traces.results import LoadPoint, LoadRecord, PassSlice, RunResult, Status

__all__ = [
    "ROUTERS",
    "LoadPoint",
    "LoadRecord",
    "PassSlice",
    "RecordedRouting",
    "ResampledRouting",
    "Routing",
    "RunResult",
    "Status",
    "isolated_ttft",
    "simulate",
    "uniform",
]
