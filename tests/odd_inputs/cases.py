"""A case of odd input, what its answer must be, and processes that run many: a hang is found, the rest goes on."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

REFUSED, ACCEPTED = "refused", "accepted"
LONGEST = 400  # characters of a message
HANG_S = 10.0


class Fault(Exception):
    """What is wrong with the answer to an odd input."""


@dataclass(frozen=True)
class Case:
    """One odd input: `run` tries it in an empty working folder, and says REFUSED or ACCEPTED or raises a Fault."""

    area: str
    name: str
    run: Callable[[], str]


@dataclass(frozen=True)
class Answer:
    """What a case came to."""

    case: Case
    outcome: str  # REFUSED, ACCEPTED, or what is wrong
    seconds: float

    @property
    def wrong(self) -> bool:
        return self.outcome not in (REFUSED, ACCEPTED)


def expect(right: bool, told: str) -> None:
    """Raise Fault with `told` unless `right`."""
    if not right:
        raise Fault(told)


def refusal(message: str, *names: str) -> str:
    """REFUSED, if `message` is short, one line, and holds one of `names` (if any are given)."""
    line = message.strip()
    expect("\n" not in line, f"a message of several lines: {line!r}")
    expect("Traceback" not in line, f"a traceback: {line!r}")
    expect(len(line) <= LONGEST, f"a message of {len(line)} characters: {line[:200]!r}...")
    expect(len(line.split()) > 2, f"a message that does not help: {line!r}")
    expect(not names or any(name in line for name in names), f"names none of {names}: {line!r}")
    return REFUSED


def tried(function: Callable[[], Any], kinds: type[Exception] | tuple[type[Exception], ...], *names: str) -> Any:
    """REFUSED where `function` raises one of `kinds`, with a message that helps; else what it gives."""
    try:
        return function()
    except kinds as error:
        return refusal(" ".join(str(error).split()), *names)


def both(name: str, plain: Any, odd: Any) -> None:
    """Raise Fault unless the odd input's answer is the plain one's."""
    expect(plain == odd, f"{name} is {odd!r}, of the plain input {plain!r}")


# ---- the command line -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def problem(self) -> str:
        """The error's line, without the warnings before it."""
        return "\n".join(line for line in self.err.splitlines() if not line.startswith(("warning:", "interrupted")))


def command(*arguments: object) -> Ended:
    """What `qllm ARGUMENTS` does, in this process. A Fault where an exception comes out of it."""
    from qllm.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch("sys.argv", ["qllm", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)  # numpy's: inf or nan where nobody thought of it
        warnings.filterwarnings("ignore", ".*never awaited", RuntimeWarning)
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    told = Ended(code, out.getvalue(), err.getvalue())
    expect("Traceback" not in told.out + told.err, f"a traceback: {told.err[-400:]!r}")
    return told


def refused_by_command(ended: Ended, *names: str) -> str:
    """REFUSED, if the command ended with code 2 and one line that holds one of `names`."""
    expect(ended.code == 2, f"exit code {ended.code}: {(ended.problem or ended.out)[:300]!r}")
    if ended.problem.startswith(("Usage:", "╭")):  # the parser of options has a box of its own
        flat = " ".join(ended.problem.replace("│", " ").split())
        expect(not names or any(name in flat for name in names), f"names none of {names}: {flat!r}")
        return REFUSED
    expect(ended.problem.startswith("error: "), f"no error line: {ended.err[-300:]!r}")
    return refusal(ended.problem, *names)


def simulated(
    *arguments: object, out: str = "out", names: Sequence[str] = (), figures: bool = False
) -> pd.DataFrame | str:
    """REFUSED, or the requests that `qllm simulate ARGUMENTS` wrote, after `served`; figures take seconds."""
    with contextlib.nullcontext() if figures else mock.patch("qllm.plots.curves.save_figures"):
        ended = command("simulate", *arguments, "--out", out, "--jobs", 1, "--format", "table" if figures else "json")
    if ended.code:
        return refused_by_command(ended, *names)
    expect("failed" not in ended.err, f"a simulation failed: {ended.err[-300:]!r}")
    return served(pq.read_table(Path(out, "requests.parquet")).to_pandas())


def served(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows`, if each request has ended and its times add up."""
    done = rows[rows["status"] == "finished"]
    expect(set(rows["status"]) <= {"finished", "rejected"}, f"statuses {set(rows['status'])}")
    expect(bool((rows.loc[rows["status"] == "rejected", "reason"] != "").all()), "rejected without a reason")
    times = done[["arrival_s", "first_launch_s", "first_token_s", "finish_s"]].to_numpy(dtype=float)
    expect(bool(np.isfinite(times).all()), "a time is not finite")
    expect(bool((np.diff(times, axis=1) >= 0).all()), "times run backwards")
    parts = done[["queueing_s", "running_s", "suspended_s"]].to_numpy(dtype=float)
    slack = 1e-9 * np.maximum(1.0, np.abs(times[:, 3]))
    expect(bool((np.abs(parts.sum(axis=1) - (times[:, 3] - times[:, 0])) <= slack).all()), "the times do not add up")
    expect(bool((parts >= -slack[:, None]).all()), "a negative time")
    return rows


# ---- many cases -----------------------------------------------------------------------------------------------------


def answer(case: Case) -> str:
    """The outcome of `case`, tried in a folder of its own."""
    home = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="odd") as folder:
        inside = Path(folder, "in")  # so that "../x" is nobody's file
        inside.mkdir()
        os.chdir(inside)
        try:
            return case.run()
        except Fault as fault:
            return f"fault: {fault}"
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            return f"fault: {type(error).__name__} at {where}: {' '.join(str(error).split())[:300]}"
        finally:
            os.chdir(home)


def run_all(cases: Sequence[Case], processes: int = 2, hang_s: float = HANG_S) -> Iterator[Answer]:
    """The answers, in the order in which they come. A case that does not end within `hang_s` is a fault."""
    todo = list(range(len(cases)))[::-1]
    workers = [_Worker(cases) for _ in range(min(processes, len(cases)))]
    busy: list[_Worker] = []
    try:
        while todo or busy:
            for worker in [one for one in workers if one not in busy and todo]:
                worker.begin(todo.pop())
                busy.append(worker)
            ready = wait([worker.pipe for worker in busy], timeout=0.2)
            for worker in busy.copy():
                took = time.monotonic() - worker.began
                if worker.pipe in ready:
                    outcome = worker.outcome()
                elif took > hang_s:
                    outcome = f"fault: no answer within {hang_s:g} s"
                else:
                    continue
                busy.remove(worker)
                yield Answer(cases[worker.number], outcome, took)
                if outcome.startswith(("fault: no answer", "fault: the process")):
                    workers[workers.index(worker)] = worker.replaced()
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that answers one case at a time."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = cases
        context = multiprocessing.get_context("fork")  # cases are closures
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(cases, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.number, self.began = 0, 0.0
        self.pipe.recv()  # it is there, and has imported what takes long

    def begin(self, number: int) -> None:
        self.number, self.began = number, time.monotonic()
        self.pipe.send(number)

    def outcome(self) -> str:
        try:
            told: str = self.pipe.recv()
        except EOFError:
            self._process.join(5)
            return f"fault: the process ended with code {self._process.exitcode}"
        return told

    def replaced(self) -> _Worker:
        self.end()
        return _Worker(self._cases)

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(cases: Sequence[Case], pipe: Connection) -> None:
    import logging
    import threading

    import torch

    import qllm.executor.engine.engine
    import qllm.experiment.sweep
    import qllm.plots.curves
    import qllm.plots.schedule  # noqa: F401

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "another engine of this process", RuntimeWarning)
    logging.disable(logging.CRITICAL)
    threading.excepthook = lambda _: None  # an engine's thread says why it ended; the streams say it too
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(answer(cases[pipe.recv()]))
