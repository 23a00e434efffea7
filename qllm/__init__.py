"""QLLM: simulate and serve Mixture-of-Experts models for latency-sensitive and best-effort jobs on one GPU.

from qllm import simulate, load_results, plot_slo

results = simulate("configs/paper.yaml", set=["sweep.rate=[1,2,4]"])
results.summary       # DataFrame, a row per policy, rate and class
plot_slo(results)     # matplotlib axes
"""

from typing import TYPE_CHECKING

from qllm._lazy import lazy

if TYPE_CHECKING:
    from qllm._version import __version__ as __version__
    from qllm.capacity.capacity import find_capacity as find_capacity
    from qllm.config.config import load_config as load_config
    from qllm.config.yaml_lines import ConfigError as ConfigError
    from qllm.errors import SweepError as SweepError
    from qllm.experiment.metrics import summarise as summarise
    from qllm.experiment.results import Results as Results
    from qllm.experiment.results import load_results as load_results
    from qllm.experiment.sweep import simulate as simulate
    from qllm.plots.curves import plot_slo as plot_slo
    from qllm.plots.curves import plot_ttft as plot_ttft
    from qllm.plots.point import plot_ablation as plot_ablation
    from qllm.plots.point import plot_cdf as plot_cdf
    from qllm.plots.point import plot_time_spent as plot_time_spent
    from qllm.plots.step_times import plot_expert_times as plot_expert_times
    from qllm.plots.step_times import plot_popularity as plot_popularity
    from qllm.plots.style import add_caption as add_caption

_WHERE = {
    "ConfigError": "qllm.config.yaml_lines",
    "Results": "qllm.experiment.results",
    "SweepError": "qllm.errors",
    "__version__": "qllm._version",
    "add_caption": "qllm.plots.style",
    "find_capacity": "qllm.capacity.capacity",
    "load_config": "qllm.config.config",
    "load_results": "qllm.experiment.results",
    "plot_ablation": "qllm.plots.point",
    "plot_cdf": "qllm.plots.point",
    "plot_expert_times": "qllm.plots.step_times",
    "plot_popularity": "qllm.plots.step_times",
    "plot_slo": "qllm.plots.curves",
    "plot_time_spent": "qllm.plots.point",
    "plot_ttft": "qllm.plots.curves",
    "simulate": "qllm.experiment.sweep",
    "summarise": "qllm.experiment.metrics",
}

__all__ = [*_WHERE]
__getattr__, __dir__ = lazy(__name__, _WHERE)
