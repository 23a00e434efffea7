"""Errors that the executor raises for anything that comes from outside: models, requests, settings."""

from __future__ import annotations


class ExecutorError(Exception):
    """Base of the executor's own errors."""


class UnsupportedModelError(ExecutorError, ValueError):
    """A model that cannot be served with preemption points; the message names the model and the reason."""


class LoadError(ExecutorError, ValueError):
    """A model, device or dtype that is not there; the message names the option and what is allowed."""


class SamplingError(ExecutorError, ValueError):
    """A sampling parameter outside its range; the message names the parameter and what is allowed."""


class GrammarError(SamplingError):
    """A grammar that cannot be compiled or followed; the message says why."""


class PassError(ExecutorError, ValueError):
    """A pass that cannot be started: no tokens, too few KV blocks, positions beyond the model's."""


class KVMemoryError(ExecutorError, ValueError):
    """KV blocks that do not fit the device's memory; the message names the setting and what is allowed."""


class EngineClosed(ExecutorError):
    """The engine was closed, or broke, before the request was served."""


class EngineBusy(ExecutorError):
    """So many requests wait that the engine takes no more (`Engine(max_waiting=...)`)."""


class RequestFailed(ExecutorError):
    """The pass that the request was in broke; the message says how, `__cause__` is the exception."""


class RequestError(ExecutorError, ValueError):
    """A request that cannot be served: the message names the parameter and what is allowed."""


class CalibrationError(ExecutorError, ValueError):
    """A calibration that cannot be made or gone on with; the message names the file or option."""


class UnusableLogits(ExecutorError):
    """Logits of a row hold NaN or infinity, or leave no token to choose."""
