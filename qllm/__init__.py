"""QLLM: simulate and serve Mixture-of-Experts models for latency-sensitive and best-effort jobs on one GPU.

from qllm import simulate, load_results, plot_slo

results = simulate("configs/paper.yaml", set=["sweep.rate=[1,2,4]"])
results.summary       # DataFrame, a row per policy, rate and class
plot_slo(results)     # matplotlib axes
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qllm.breakdowns import plot_ablation as plot_ablation
    from qllm.breakdowns import plot_cdf as plot_cdf
    from qllm.breakdowns import plot_time_spent as plot_time_spent
    from qllm.config import load_config as load_config
    from qllm.figures import add_caption as add_caption
    from qllm.figures import plot_slo as plot_slo
    from qllm.figures import plot_ttft as plot_ttft
    from qllm.metrics import summarise as summarise
    from qllm.results import Results as Results
    from qllm.results import load_results as load_results
    from qllm.sweep import simulate as simulate
    from qllm.timing_figures import plot_expert_times as plot_expert_times
    from qllm.timing_figures import plot_popularity as plot_popularity
    from qllm.yamlfile import ConfigError as ConfigError

# Loaded when first used: pandas and matplotlib take longer to import than `qllm --help` may take.
_WHERE = {
    "ConfigError": "qllm.yamlfile",
    "Results": "qllm.results",
    "add_caption": "qllm.figures",
    "load_config": "qllm.config",
    "load_results": "qllm.results",
    "plot_ablation": "qllm.breakdowns",
    "plot_cdf": "qllm.breakdowns",
    "plot_expert_times": "qllm.timing_figures",
    "plot_popularity": "qllm.timing_figures",
    "plot_slo": "qllm.figures",
    "plot_time_spent": "qllm.breakdowns",
    "plot_ttft": "qllm.figures",
    "simulate": "qllm.sweep",
    "summarise": "qllm.metrics",
}

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'qllm' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(_WHERE)
