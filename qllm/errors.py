"""The typed errors for what comes from outside: one line each, exit code 2."""

from executor.errors import ExecutorError
from qllm.yamlfile import ConfigError
from scheduler import SchedulerError
from traces.popularity import PopularityError
from traces.requests import TraceError
from traces.timing import TimingError


class SweepError(RuntimeError):
    """A sweep that cannot go on: its workers cannot be reached, or were lost."""


EXPECTED = (ConfigError, TraceError, TimingError, PopularityError, SchedulerError, SweepError, ExecutorError)
