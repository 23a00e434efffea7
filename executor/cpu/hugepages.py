"""Huge pages for what a process holds in memory, on Linux."""

from __future__ import annotations

import ctypes
from pathlib import Path

SIZE = 2 << 20  # bytes of a huge page on x86-64 and, with pages of 4 KiB, on arm64
_MADV_COLLAPSE = 25  # Linux 6.1; also where transparent huge pages are left to "madvise"


def collapse_anonymous() -> int:
    """Put the process's anonymous memory into huge pages; the bytes asked for. Does nothing on other systems.

    A decode step reads its weights once, and with small pages spends part of its time on looking them up. Takes about
    two seconds a GB, once.
    """
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return 0
    done = 0
    for line in maps:
        addresses, permissions, *_, inode = line.split()[:5]
        if inode != "0" or not permissions.startswith("rw-p") or "[stack" in line:
            continue
        low, high = (int(part, 16) for part in addresses.split("-"))
        low, high = -(-low // SIZE) * SIZE, high // SIZE * SIZE
        if low < high and madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), _MADV_COLLAPSE) == 0:
            done += high - low
    return done
