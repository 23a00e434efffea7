"""Huge pages for what a process holds in memory, on Linux."""

from __future__ import annotations

import ctypes
from pathlib import Path

SIZE = 2 << 20  # bytes of a huge page on x86-64 and, with pages of 4 KiB, on arm64
_MADV_COLLAPSE = 25  # Linux 6.1; also where transparent huge pages are left to "madvise"


def collapse_anonymous() -> int:
    """Put the process's anonymous memory into huge pages, as far as the kernel does so.

    A decode step reads all the weights that it needs once, and with small pages a part of its time goes into looking
    them up. Takes about two seconds a GB, once. Does nothing on other systems.

    Returns:
        The bytes for which the kernel was asked.
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
