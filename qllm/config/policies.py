"""Policies by name or from a user's Python file; the scheduler itself does no I/O."""

from __future__ import annotations

import importlib.util
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from qllm.config.yaml_lines import ConfigError
from qllm.scheduler import POLICIES, Policy, PolicyError, SchedulerError, build_policy, make_policy
from qllm.traces.messages import suggestion

STUCK_S = 5.0  #: seconds after which a call is looked at, and stopped if it is there still after as many


def named_policy(name: str, settings: dict[str, Any]) -> Policy:
    """A policy that ships, e.g. 'qllm' with {'fill_tokens': 0}. ConfigError for an unknown name or setting."""
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r:.80}; {suggestion(name, list(POLICIES))}, or file: a Python file")
    try:
        return make_policy(name, **settings)
    except SchedulerError as error:
        raise ConfigError(str(error)) from None


def file_policy(file: str | Path, class_name: str | None, settings: dict[str, Any]) -> Policy:
    """The Policy subclass (`class_name` if several) of a Python file, which is run. ConfigError names file and line."""
    path = Path(file)
    spec = importlib.util.spec_from_file_location(f"qllm_policy_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file; expected one that defines a subclass of qllm.scheduler.Policy")
    module = importlib.util.module_from_spec(spec)
    try:
        with watched(path):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(describe_failure(error, path)) from None
    found = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Policy) and value.__module__ == module.__name__
    }
    if class_name is not None and class_name not in found:
        raise ConfigError(f"{path}: no policy class {class_name!r:.80}; {suggestion(class_name, list(found))}")
    if class_name is None and len(found) != 1:
        names = f"{len(found)} of them ({', '.join(found)}); name one with class:" if found else "none"
        raise ConfigError(f"{path}: expected one subclass of qllm.scheduler.Policy, found {names}")
    chosen = class_name or next(iter(found))
    try:
        with watched(path):
            return build_policy(found[chosen], chosen, settings)
    except SchedulerError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        raise ConfigError(describe_failure(error, path)) from None


@contextmanager
def watched(file: str | Path | None) -> Iterator[None]:
    """Stop code of a user's policy file in which one call goes on for more than STUCK_S seconds: TimeoutError there.

    Only in a process's main thread, and where there are alarm signals; elsewhere nothing is watched.
    """
    if file is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before: list[FrameType | None] = [None]

    def look(_signal: int, frame: FrameType | None) -> None:
        call = None  # the outermost call into the file
        while frame is not None:
            call, frame = (frame if frame.f_code.co_filename == str(file) else call), frame.f_back
        if call is not None and call is before[0]:
            raise TimeoutError(f"{call.f_code.co_name} has not returned for {STUCK_S:g} s")
        before[0] = call

    old = signal.signal(signal.SIGALRM, look)
    around = signal.setitimer(signal.ITIMER_REAL, STUCK_S, STUCK_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *around)
        signal.signal(signal.SIGALRM, old)


def describe_failure(error: BaseException, path: str | Path) -> str:
    """One line for an exception raised by a user's file: file, line there, type and message."""
    path = Path(path)
    while isinstance(error, PolicyError) and error.__cause__ is not None:  # the scheduler's word for it
        error = error.__cause__
    lines = []
    cause: BaseException | None = error
    while cause is not None:  # SimPy raises a copy whose cause is the exception that the file raised
        lines += [frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if Path(frame.filename) == path]
        cause = cause.__cause__
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    message = error.msg if isinstance(error, SyntaxError) else (str(error).splitlines() or [""])[0]
    return f"{path}{f':{line}' if line else ''}: {type(error).__name__}: {message}"
