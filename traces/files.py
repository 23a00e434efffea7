"""When a file changed."""

from __future__ import annotations

from pathlib import Path


def file_stamp(path: str | Path) -> tuple[int, int] | None:
    """What changes with a file's content (nanoseconds, bytes); None where there is no such file."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
