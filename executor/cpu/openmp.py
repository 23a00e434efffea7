"""OpenMP's threads, where PyTorch computes with GNU's runtime on a CPU.

Each computing thread keeps a team. Once all teams exceed the cores, waiting helpers sleep instead of spin, and each
small operation pays for waking them: an engine decoded half as fast after another thread had loaded a model.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

_SOFT = 1  # omp_pause_soft, OpenMP 5.0 section 3.2.44: give up the threads, keep the settings


def runtime() -> ctypes.CDLL | None:
    """GNU's OpenMP runtime that this process has loaded; None where it has not, or on another system than Linux."""
    try:
        maps = Path("/proc/self/maps").read_text()
        return ctypes.CDLL(next(line.split()[-1] for line in maps.splitlines() if "/libgomp" in line))
    except (OSError, StopIteration):
        return None


def release_team() -> bool:
    """End the helpers of the calling thread; they come back when it computes again. False where that cannot be done."""
    openmp = runtime()
    return (
        openmp is not None and hasattr(openmp, "omp_pause_resource_all") and openmp.omp_pause_resource_all(_SOFT) == 0
    )
