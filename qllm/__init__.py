"""QLLM: simulate and serve Mixture-of-Experts models for latency-sensitive and best-effort jobs on one GPU.

from qllm import simulate, load_results, plot_slo

results = simulate("configs/paper.yaml", set=["sweep.rate=[1,2,4]"])
results.summary       # DataFrame, a row per policy, rate and class
plot_slo(results)     # matplotlib axes
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qllm.config import load_config as load_config
    from qllm.figures import plot_slo as plot_slo
    from qllm.figures import plot_ttft as plot_ttft
    from qllm.metrics import summarise as summarise
    from qllm.results import Results as Results
    from qllm.results import load_results as load_results
    from qllm.sweep import simulate as simulate
    from qllm.yamlfile import ConfigError as ConfigError

# Loaded when first used: pandas and matplotlib take longer to import than `qllm --help` may take.
_WHERE = {
    "ConfigError": "qllm.yamlfile",
    "Results": "qllm.results",
    "load_config": "qllm.config",
    "load_results": "qllm.results",
    "plot_slo": "qllm.figures",
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
