"""Request traces and timing traces: readers, writers, generators, and the data files that ship.

from qllm.traces import PassCostModel, Timings, generate, read_requests

trace = read_requests("AzureLLMInferenceTrace_conv.csv").head(1000).at_rate(2.0)
steps = PassCostModel(Timings.load("a100-mixtral-8x7b-int4"), max_step=0.002)
"""

if __name__ != "qllm.traces":
    raise ImportError("this package is called qllm.traces: from qllm.traces import ...")

from typing import TYPE_CHECKING

from qllm._lazy import lazy

if TYPE_CHECKING:
    from qllm.traces.prefixes import Prefixes as Prefixes
    from qllm.traces.requests.generate import assign_arrivals as assign_arrivals
    from qllm.traces.requests.generate import assign_classes as assign_classes
    from qllm.traces.requests.generate import generate as generate
    from qllm.traces.requests.quantile_table import bundled_lengths as bundled_lengths
    from qllm.traces.requests.readers import read_requests as read_requests
    from qllm.traces.requests.recipe import Recipe as Recipe
    from qllm.traces.requests.trace import RequestTrace as RequestTrace
    from qllm.traces.requests.trace import TraceError as TraceError
    from qllm.traces.requests.trace import TraceWarning as TraceWarning
    from qllm.traces.requests.writers import write_requests as write_requests
    from qllm.traces.results import LoadPoint as LoadPoint
    from qllm.traces.results import LoadRecord as LoadRecord
    from qllm.traces.results import PassSlice as PassSlice
    from qllm.traces.results import RunResult as RunResult
    from qllm.traces.results import Status as Status
    from qllm.traces.sessions import Sessions as Sessions
    from qllm.traces.sessions import closed_loop as closed_loop
    from qllm.traces.sessions import turns as turns
    from qllm.traces.step_times.aiconfigurator.importer import import_aiconfigurator as import_aiconfigurator
    from qllm.traces.step_times.cost_model import PassCostModel as PassCostModel
    from qllm.traces.step_times.data_sheet import DATA_SHEETS as DATA_SHEETS
    from qllm.traces.step_times.data_sheet import Gpu as Gpu
    from qllm.traces.step_times.file_format import Point as Point
    from qllm.traces.step_times.file_format import TimingError as TimingError
    from qllm.traces.step_times.file_format import TimingWarning as TimingWarning
    from qllm.traces.step_times.hf_config import shape_from_config as shape_from_config
    from qllm.traces.step_times.interpolate import ExtrapolationWarning as ExtrapolationWarning
    from qllm.traces.step_times.model_shapes import SHAPES as SHAPES
    from qllm.traces.step_times.model_shapes import ModelShape as ModelShape
    from qllm.traces.step_times.modelled import roofline_timings as roofline_timings
    from qllm.traces.step_times.pass_cost import PassCost as PassCost
    from qllm.traces.step_times.popularity import PopularityError as PopularityError
    from qllm.traces.step_times.popularity import bundled_popularity as bundled_popularity
    from qllm.traces.step_times.popularity import describe_popularity as describe_popularity
    from qllm.traces.step_times.popularity import load_popularity as load_popularity
    from qllm.traces.step_times.timings import Timings as Timings
    from qllm.traces.step_times.timings import bundled_timings as bundled_timings

_WHERE = {
    "DATA_SHEETS": "qllm.traces.step_times.data_sheet",
    "ExtrapolationWarning": "qllm.traces.step_times.interpolate",
    "Gpu": "qllm.traces.step_times.data_sheet",
    "LoadPoint": "qllm.traces.results",
    "LoadRecord": "qllm.traces.results",
    "ModelShape": "qllm.traces.step_times.model_shapes",
    "PassCost": "qllm.traces.step_times.pass_cost",
    "PassCostModel": "qllm.traces.step_times.cost_model",
    "PassSlice": "qllm.traces.results",
    "Point": "qllm.traces.step_times.file_format",
    "PopularityError": "qllm.traces.step_times.popularity",
    "Prefixes": "qllm.traces.prefixes",
    "Recipe": "qllm.traces.requests.recipe",
    "RequestTrace": "qllm.traces.requests.trace",
    "RunResult": "qllm.traces.results",
    "SHAPES": "qllm.traces.step_times.model_shapes",
    "Sessions": "qllm.traces.sessions",
    "Status": "qllm.traces.results",
    "TimingError": "qllm.traces.step_times.file_format",
    "TimingWarning": "qllm.traces.step_times.file_format",
    "Timings": "qllm.traces.step_times.timings",
    "TraceError": "qllm.traces.requests.trace",
    "TraceWarning": "qllm.traces.requests.trace",
    "assign_arrivals": "qllm.traces.requests.generate",
    "assign_classes": "qllm.traces.requests.generate",
    "bundled_lengths": "qllm.traces.requests.quantile_table",
    "bundled_popularity": "qllm.traces.step_times.popularity",
    "bundled_timings": "qllm.traces.step_times.timings",
    "closed_loop": "qllm.traces.sessions",
    "describe_popularity": "qllm.traces.step_times.popularity",
    "generate": "qllm.traces.requests.generate",
    "import_aiconfigurator": "qllm.traces.step_times.aiconfigurator.importer",
    "load_popularity": "qllm.traces.step_times.popularity",
    "read_requests": "qllm.traces.requests.readers",
    "roofline_timings": "qllm.traces.step_times.modelled",
    "shape_from_config": "qllm.traces.step_times.hf_config",
    "turns": "qllm.traces.sessions",
    "write_requests": "qllm.traces.requests.writers",
}

__all__ = [*_WHERE]
__getattr__, __dir__ = lazy(__name__, _WHERE)
