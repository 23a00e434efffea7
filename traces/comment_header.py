"""The header of a data file: `# key: value` lines, which are YAML behind '# '."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml


class HeaderError(ValueError):
    """A header that is no YAML mapping; `row` is the line from 1 where that is known."""

    def __init__(self, problem: str, row: int | None = None) -> None:
        super().__init__(problem)
        self.row = row


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML in which no key stands twice and nothing holds itself."""

    def mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        """A mapping, built at once, with its values: a node that holds itself is an error of the loader's."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        self.flatten_mapping(node)
        built: dict[Any, Any] = self.construct_mapping(node, deep=True)
        return built


def numbers_as_written(loader: Any) -> None:
    """Have a YAML loader read 1e-3 as a number (YAML 1.2), as people write it, and 010 or 1:30 as text."""
    numbers = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int")
    loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in numbers]
        for first, resolvers in loader.yaml_implicit_resolvers.items()
    }
    loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
            r"|\.(?:inf|Inf|nan|NaN))$"
        ),
        list("-+0123456789."),
    )
    loader.add_implicit_resolver(
        "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
    )


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)
numbers_as_written(_Loader)


def read_yaml(text: str) -> Any:
    """What a YAML text holds. HeaderError where it is none, a key stands twice, or something holds itself."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-02-31
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error) or "nested too deeply"
        raise HeaderError(str(problem), mark.line + 1 if mark else None) from None


def read_header(lines: Sequence[str]) -> tuple[dict[str, Any], int]:
    """The YAML mapping in the `# ` lines that a file begins with, and how many lines those are. Raises HeaderError."""
    count = next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))
    try:
        header = read_yaml("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:count]))
    except HeaderError as error:
        raise HeaderError(f"the header is not YAML after '# ': {error}", error.row) from None
    if header is None:
        return {}, count
    if not isinstance(header, dict):
        raise HeaderError("the header must be '# key: value' lines")
    return header, count


class _Dumper(yaml.SafeDumper):
    """YAML with numbers of a list in one line."""

    def sequence(self, values: list[Any]) -> yaml.Node:
        """A list: within brackets where it holds numbers."""
        inline = all(isinstance(value, int | float) for value in values)
        return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=inline)


_Dumper.add_representer(list, _Dumper.sequence)


def render_header(header: Mapping[str, Any]) -> str:
    """`header` as YAML behind '# ', a line or more per key, in its order."""
    text = yaml.dump(dict(header), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return "".join(f"# {line}\n" for line in text.splitlines())
