"""What files are, and when they changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def file_stamp(path: str | Path) -> tuple[int, int] | None:
    """What changes with a file's content (nanoseconds, bytes); None where there is no such file."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def not_regular(path: str | Path) -> str:
    """What is there in place of a regular file: nothing, a folder, or a device or pipe, which is not read."""
    return "is a folder" if os.path.isdir(path) else "not a regular file" if os.path.exists(path) else "no such file"


def is_input_path(value: Any) -> bool:
    """Whether a configuration's value is the absolute path of a file, or of a folder with clients of ServeGen."""
    if not (isinstance(value, str) and os.path.isabs(value)):
        return False
    return os.path.isfile(value) or any(Path(value).glob("chunk-*-trace.csv"))


def portable_path(path: str, start: str | Path) -> str:
    """An absolute path as others may read it: relative to the folder `start`, or to "~", which names no home."""
    home = Path(os.path.expanduser("~"))
    inside = Path(path).is_relative_to(home) and not Path(os.path.abspath(start)).is_relative_to(home)
    return str("~" / Path(path).relative_to(home)) if inside else os.path.relpath(path, start)
