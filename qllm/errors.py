"""The typed errors for what comes from outside: one line each, exit code 2."""

from qllm.config.yaml_lines import ConfigError
from qllm.executor.errors import ExecutorError
from qllm.scheduler import SchedulerError
from qllm.traces.requests.trace import TraceError
from qllm.traces.step_times.popularity import PopularityError
from qllm.traces.step_times.timings import TimingError


class SweepError(RuntimeError):
    """A sweep that cannot go on: its workers cannot be reached, or were lost."""


EXPECTED = (ConfigError, TraceError, TimingError, PopularityError, SchedulerError, SweepError, ExecutorError)
