"""YAML with line numbers, so that a mistake in a configuration is answered in one line that names the place."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qllm.traces.messages import KeyPath, dotted, first_line, kind


class ConfigError(ValueError):
    """A mistake in a configuration; the message is one line: file, line, key, the line's content, what is allowed."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.2), as people write it."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|nan|NaN))$"
    ),
    list("-+0123456789."),
)


@dataclass
class YamlFile:
    """A parsed YAML file: `data`, the line (from 1) of every key path, and the overrides made on the command line."""

    path: Path
    text: list[str]
    data: dict[str, Any]
    lines: dict[KeyPath, int]
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    def error(self, key: KeyPath, problem: str) -> ConfigError:
        """One line for `problem` at `key`; the nearest enclosing key that the file holds gives the line number."""
        name = dotted(key)
        for length in range(len(key), 0, -1):
            if key[:length] in self.overrides:
                return ConfigError(f"--set {self.overrides[key[:length]]}: {name}: {problem}")
        for changed, assignment in self.overrides.items():
            if key and changed[: len(key)] == key:
                return ConfigError(f"--set {assignment}: {name}: {problem}")
        for length in range(len(key), 0, -1):
            line = self.lines.get(key[:length])
            if line is not None:
                return ConfigError(f"{self.path}:{line}: {name}: {problem} [line: {self.text[line - 1].strip()}]")
        return ConfigError(f"{self.path}: {name}: {problem}" if name else f"{self.path}: {problem}")

    def override(self, assignment: str) -> None:
        """Apply one `key.path=value` of the command line; the value is YAML. ConfigError where it cannot be read."""
        name, separator, text = assignment.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"--set {assignment}: expected key=value, e.g. --set sweep.rate=[1,2,4]")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {assignment}: the value is not valid YAML: {first_line(error)}") from None
        key = parse_dotted(name.strip())
        # The sweep's own keys are dotted paths, so that `sweep.limits.max_seqs` is one key of the mapping `sweep`.
        if key[0] == "sweep" and len(key) > 1:
            key = ("sweep", dotted(key[1:]))
        try:
            set_path(self.data, key, value)
        except ConfigError as error:
            raise ConfigError(f"--set {assignment}: {error}") from None
        self.overrides[key] = assignment


def load_yaml(path: str | Path) -> YamlFile:
    """Read a YAML mapping. ConfigError where the file is missing, is no YAML, is no mapping or repeats a key."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a YAML configuration such as configs/paper.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {first_line(error)}") from None
    lines: dict[KeyPath, int] = {}
    rows = text.splitlines()
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{path}: the file is empty; expected a mapping of keys")
        _index(path, rows, node, (), lines)
        data = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        content = f" [line: {rows[mark.line].strip()}]" if mark and mark.line < len(rows) else ""
        raise ConfigError(
            f"{where}: not valid YAML: {getattr(error, 'problem', None) or first_line(error)}{content}"
        ) from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: expected a mapping of keys, got {kind(data)} [line: {rows[0].strip()}]")
    return YamlFile(path, rows, data, lines)


def _index(path: Path, rows: list[str], node: yaml.Node, key: KeyPath, lines: dict[KeyPath, int]) -> None:
    """Note the line of every key below `node`, refusing keys that stand there twice (YAML would drop the first)."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            child = (*key, str(name.value))
            line = name.start_mark.line + 1
            if child in lines:
                raise ConfigError(
                    f"{path}:{line}: {dotted(child)}: this key stands on line {lines[child]} already"
                    f" [line: {rows[line - 1].strip()}]"
                )
            lines[child] = line
            _index(path, rows, value, child, lines)
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            lines[(*key, position)] = value.start_mark.line + 1
            _index(path, rows, value, (*key, position), lines)


def parse_dotted(name: str) -> KeyPath:
    """'policies.3.name' -> ('policies', 3, 'name'); numbers index lists."""
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def set_path(data: dict[str, Any], key: KeyPath, value: Any) -> None:
    """Set `data[key[0]][key[1]]... = value`, making missing mappings on the way; ConfigError where there is no way."""
    place: Any = data
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(place, list):
            if not isinstance(part, int) or part >= len(place):
                raise ConfigError(
                    f"{dotted(key[:depth])} is a list of {len(place)}; index it with 0 to {len(place) - 1}"
                )
        elif isinstance(place, dict):
            part = str(part)
            if not last and place.get(part) is None:
                place[part] = {}
        else:
            raise ConfigError(f"{dotted(key[:depth])} is {kind(place)} and holds no key {part!r}")
        if last:
            place[part] = value
        else:
            place = place[part]
