"""The header of a data file: `# key: value` lines, which are YAML behind '# '."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


class HeaderError(ValueError):
    """A header that is no YAML mapping; `row` is the line from 1 where that is known."""

    def __init__(self, problem: str, row: int | None = None) -> None:
        super().__init__(problem)
        self.row = row


def read_header(lines: Sequence[str]) -> tuple[dict[str, Any], int]:
    """The YAML mapping in the `# ` lines that a file begins with, and how many lines those are. Raises HeaderError."""
    count = next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        header = yaml.load("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:count]), Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = f"the header is not YAML after '# ': {getattr(error, 'problem', error)}"
        raise HeaderError(problem, mark.line + 1 if mark else None) from None
    if header is None:
        return {}, count
    if not isinstance(header, dict):
        raise HeaderError("the header must be '# key: value' lines")
    return header, count


def render_header(header: Mapping[str, Any]) -> str:
    """`header` as YAML behind '# ', a line or more per key, in its order."""
    text = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True, width=110)
    return "".join(f"# {line}\n" for line in text.splitlines())
