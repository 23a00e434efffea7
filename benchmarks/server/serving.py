"""`qllm serve` as a process of its own, for the scripts in this folder."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from processes import EngineFailed, Process

from qllm.executor.testing import make_checkpoint

START_UP_S = 300.0  #: that the server may take until it listens
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


class Server(Process):
    """`qllm serve` on a free port. Leaving the `with` block ends it.

    Args:
        model: folder of a checkpoint; None: the small random model.
        folder: where the settings and the log go.
        settings: of the server, as in server.yaml.

    Attributes:
        url: where it listens.

    Raises:
        EngineFailed: it ended before it listened, or took too long.
    """

    def __init__(self, model: Path | None, folder: Path, settings: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "server.yaml"
        config.write_text(yaml.safe_dump({"model_name": "m", **settings}), encoding="utf-8")
        command = [sys.executable, "-m", "qllm", "serve", *([] if model is None else [str(model)])]
        log = folder / "server.log"
        seen = log.stat().st_size if log.exists() else 0
        super().__init__([*command, "--port", "0", "--config", str(config)], log)
        try:
            self.url = self._listens(seen)
        except BaseException:
            self.stop()
            raise

    def _listens(self, seen: int) -> str:
        end = time.monotonic() + START_UP_S
        while time.monotonic() < end and self.popen.poll() is None:
            found = re.search(rb"serving m at (http://\S+)/v1", self.log.read_bytes()[seen:])
            if found is not None:
                return found[1].decode()
            time.sleep(0.1)
        raise EngineFailed(f"the server does not listen, see {self.log}")

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """The exit code of the process, which ends within `seconds`. Raises subprocess.TimeoutExpired."""
        return self.popen.wait(seconds)


def chat_checkpoint(folder: Path, made: Path, *, tiny: bool = False) -> Path:
    """The checkpoint of `tools/make_moe.py`, made in `made` if need be, with a chat template: in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in make_checkpoint(made, tiny=tiny).iterdir():
        link = folder / path.name
        if not link.exists():
            link.symlink_to(path.resolve())
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder
