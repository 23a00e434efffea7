"""What a measurement depends on besides the model: the device, its clocks, the versions of the software."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers


def device_name(device: torch.device) -> str:
    """The device as timing traces name it: an accelerator by its product name, a CPU with the threads in use."""
    if device.type != "cpu":
        return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of the software that a measurement depends on."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    return found | ({"cuda": str(torch.version.cuda)} if torch.version.cuda else {})


def conditions(device: torch.device) -> dict[str, Any]:
    """Clocks (MHz) and power limit (W) of a GPU at this moment, where nvidia-smi tells them; threads on a CPU."""
    if device.type == "cpu":
        return {"threads": torch.get_num_threads(), "load_average": round(os.getloadavg()[0], 2)}
    query = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "driver_version")
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(query)}",
        "--format=csv,noheader,nounits",
        "-i",
        str(_index(device)),
    ]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {"clocks": "not stated: nvidia-smi does not answer"}
    return dict(zip(query, (cell.strip() for cell in told.splitlines()[0].split(",")), strict=False))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
