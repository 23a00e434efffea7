"""YAML with line numbers, so that a mistake in a configuration is answered in one line that names the place."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qllm.traces.comment_header import numbers_as_written
from qllm.traces.files import not_regular
from qllm.traces.messages import KeyPath, clipped, dotted, first_line, kind


class ConfigError(ValueError):
    """A mistake in a configuration; the message is one line: file, line, key, the line's content, what is allowed."""


MAX_BYTES = 1 << 20  #: of a configuration's text
_MAX_VALUES = 100_000  #: of a configuration, aliases written out


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads numbers as people write them, and says where a value is broken."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError) as error:  # a date without such a day, a number of 5,000 digits
            raise yaml.constructor.ConstructorError(None, None, first_line(error), node.start_mark) from None


numbers_as_written(_Loader)


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
            line = self.lines.get(key[:length]) or self.lines.get(tuple(map(str, key[:length])))
            if line is not None:
                return ConfigError(f"{self.path}:{line}: {name}: {problem}{_content(self.text, line)}")
        return ConfigError(f"{self.path}: {name}: {problem}" if name else f"{self.path}: {problem}")

    def override(self, assignment: str) -> None:
        """Apply one `key.path=value` of the command line; the value is YAML. ConfigError where it cannot be read."""
        name, separator, text = assignment.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"--set {clipped(assignment, 120)}: expected key=value, e.g. --set 'sweep.rate=[1,2,4]'")
        value, _ = _parse(text, f"--set {clipped(assignment, 120)}")
        key = parse_dotted(name.strip())
        # The sweep's own keys are dotted paths, so that `sweep.limits.max_seqs` is one key of the mapping `sweep`.
        if key[0] == "sweep" and len(key) > 1:
            key = ("sweep", dotted(key[1:]))
        try:
            set_path(self.data, key, value)
        except ConfigError as error:
            raise ConfigError(f"--set {clipped(assignment, 120)}: {error}") from None
        self.overrides[key] = clipped(assignment, 120)


def load_yaml(path: str | Path) -> YamlFile:
    """Read a YAML mapping. ConfigError where the file is missing, is no YAML, is no mapping or repeats a key."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: {not_regular(path)}; expected a YAML configuration such as configs/paper.yaml")
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{path}: {path.stat().st_size / MAX_BYTES:.3g} MiB; allowed: a YAML configuration of at most 1 MiB"
            )
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a YAML configuration such as configs/paper.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        told = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {told}") from None
    data, lines = _parse(text, str(path), with_lines=True)
    rows = text.splitlines()
    if not rows or (data is None and not lines):
        raise ConfigError(f"{path}: the file is empty; expected a mapping of keys")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: expected a mapping of keys, got {kind(data)}{_content(rows, 1)}")
    return YamlFile(path, rows, data, lines)


def _parse(text: str, where: str, with_lines: bool = False) -> tuple[Any, dict[KeyPath, int]]:
    """The value that `text` is, and the line of every key. ConfigError begins with `where`, a file or an option."""
    rows, lines = text.splitlines(), dict[KeyPath, int]()
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _index(node, (), lines, ())
        return _apart(loader.construct_document(node)), lines
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or first_line(error)
        if isinstance(error, RecursionError):
            problem = "lists and mappings lie too deep in one another"
        elif not isinstance(error, _Unusable):
            problem = f"not valid YAML: {problem}"
        if not with_lines:
            raise ConfigError(f"{where}: {problem}") from None
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: {problem}{_content(rows, mark.line + 1) if mark else ''}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _apart(value: Any) -> Any:
    """A copy in which aliases are values of their own, so that one can be changed without the other."""
    if isinstance(value, dict):
        return {key: _apart(item) for key, item in value.items()}
    return [_apart(item) for item in value] if isinstance(value, list) else value


def _content(rows: list[str], line: int) -> str:
    """What stands on that line, for the end of a message."""
    row = rows[line - 1].strip() if line <= len(rows) else ""
    return f" [line: {row if len(row) <= 120 else row[:119] + '…'}]" if row else ""


class _Unusable(yaml.MarkedYAMLError):
    """Valid YAML that no configuration is."""


def _index(node: yaml.Node, key: KeyPath, lines: dict[KeyPath, int], above: tuple[yaml.Node, ...]) -> None:
    """Note the line of every key below `node`, which stands in `above`.

    Refuses keys that stand there twice (YAML would drop the first), aliases of what they stand in, and aliases of
    aliases that grow without measure.
    """
    if len(lines) > _MAX_VALUES:
        raise _Unusable(problem=f"more than {_MAX_VALUES:,} values with its aliases (*) written out")
    if any(node is one for one in above):
        problem = f"{dotted(key)}: an alias (*) of what it stands in; allowed: aliases of what stands elsewhere"
        raise _Unusable(problem=problem, problem_mark=node.start_mark)
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            child = (*key, str(name.value))
            if child in lines:
                problem = f"{dotted(child)}: this key stands on line {lines[child]} already"
                raise _Unusable(problem=problem, problem_mark=name.start_mark)
            lines[child] = name.start_mark.line + 1
            _index(value, child, lines, (*above, node))
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            lines[(*key, position)] = value.start_mark.line + 1
            _index(value, (*key, position), lines, (*above, node))


def parse_dotted(name: str) -> KeyPath:
    """'policies.3.name' -> ('policies', 3, 'name'); numbers index lists."""
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in name.split("."))


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
            place[part] = place = _in_full((*key[:depth], part), place[part])


def _in_full(key: KeyPath, value: Any) -> Any:
    """The mapping that a name or a number alone stands for at `key`."""
    if isinstance(value, dict | list):
        return value
    match key:
        case ("policies", _):
            return {"name": value}
        case ("arrival",):
            return {"process": value}
        case ("classes", _, "prompt" | "output"):
            return {"quantiles" if isinstance(value, str) else "fixed": value}
    return value
