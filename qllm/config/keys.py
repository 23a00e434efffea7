"""All keys of a configuration, made from its models: types, defaults and what they mean."""

from __future__ import annotations

import inspect
import re
import types
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from qllm.config.config import Config
from qllm.scheduler import POLICIES

#: What stands for the names and numbers that a user chooses.
_PLACES = {"classes": "NAME", "policies": "N"}
_BASIC = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}


class Key(NamedTuple):
    """One key: its dotted path, what it may be, its default and what it is for."""

    name: str
    allowed: str
    default: str
    meaning: str


def config_keys() -> list[Key]:
    """Every key of a configuration, in the order of the models, then the settings of each policy that ships."""
    return [*_keys_of(Config, ""), *_settings()]


def _keys_of(model: type[BaseModel], prefix: str) -> list[Key]:
    found: list[Key] = []
    comments = _comments(model)
    for name, info in model.model_fields.items():
        if name == "provenance":  # of results: nobody writes it
            continue
        key = f"{prefix}{info.alias or name}"
        parts = _models(info.annotation)
        meaning = comments.get(name) or (inspect.getdoc(parts[0]) or "" if parts else "").split("\n")[0]
        found.append(Key(key, _allowed(info.annotation, info.metadata), _default(info), meaning))
        inner = f"{key}.{_PLACES[name]}." if name in _PLACES else f"{key}."
        seen: dict[str, Key] = {}
        for part in parts:
            for one in _keys_of(part, inner):
                known = seen.setdefault(one.name, one)
                if known.allowed != one.allowed:  # `process` of each arrival process
                    seen[one.name] = known._replace(allowed=f"{known.allowed} | {one.allowed}")
        found += seen.values()
    return found


def _settings() -> list[Key]:
    """The keyword arguments of each policy, explained by the docstring of the class."""
    found = []
    for name, policy in POLICIES.items():
        for key, parameter in inspect.signature(policy).parameters.items():
            told = [_explained(cls, key) for cls in policy.__mro__]
            meaning = next((one for one in told if one and not one.startswith("As for")), "")
            allowed = _text_type(str(parameter.annotation))
            found.append(Key(f"policies.N.{key} ({name})", allowed, _shown(parameter.default), meaning))
    return found


def _explained(cls: type, key: str) -> str:
    """What a class's docstring says of an argument, on one line."""
    told = re.search(rf"^( *){key}: (.*(?:\n\1 +.*)*)", cls.__dict__.get("__doc__") or "", re.MULTILINE)
    return " ".join(told[2].split()).replace("None:", "null:") if told else ""


def _text_type(annotation: str) -> str:
    words = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false", "None": "null"}
    parts = ("mapping" if part.strip().startswith("dict[") else part.strip() for part in annotation.split("|"))
    return " | ".join(words.get(part, part) for part in parts)


def _comments(model: type[BaseModel]) -> dict[str, str]:
    """The `#:` comments of the fields, behind them or above them, of the bases too."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not (isinstance(cls, type) and issubclass(cls, BaseModel)) or cls.__module__.startswith("pydantic"):
            continue
        above = ""
        for line in inspect.getsource(cls).splitlines():
            field = re.match(r"    (\w+): [^#]*(?:#: (.*))?", line)
            comment = re.match(r"    #: (.*)", line)
            if field:
                found[field[1]] = field[2] or above
            above = f"{above} {comment[1]}".strip() if comment else ""
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models somewhere in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _allowed(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """A type in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(parts[0], parts[1:])
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_allowed(part, metadata) for part in parts if part is not type(None)))
    if origin is list:
        return f"list of {_allowed(parts[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return f"{_BASIC.get(annotation, 'anything')}{_bounds(metadata)}"


def _bounds(metadata: list[Any] | tuple[Any, ...]) -> str:
    signs = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}
    flat = [part for one in metadata for part in (one.metadata if isinstance(one, FieldInfo) else (one,))]
    told = [f"{sign} {getattr(one, name):g}" for one in flat for of, (sign, name) in signs.items() if type(one) is of]
    told = [one for one in told if "e+15" not in one and "e+18" not in one]  # what float64 and int64 hold
    return f" {', '.join(told)}" if told else ""


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    return "" if value is PydanticUndefined else _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        return getattr(value, "process", "the defaults of its keys")
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


PAGE = """\
# Configuration keys

Made from the models by `python tools/config_page.py`; `qllm config keys` prints the same. Times are seconds, lengths
tokens, rates requests per second, memory bytes. `NAME` is a class of requests, `N` the number of a policy, from 0.

Short forms: `arrival: poisson`, `prompt: 500` (fixed), `prompt: azure_conv` (quantiles), `policies: [fcfs]`. `null` is
a key left out.

| key | allowed | default | what it is |
|---|---|---|---|
"""


def markdown() -> str:
    """The page of all keys."""
    rows = ["| " + " | ".join(_escaped(cell) for cell in (f"`{key.name}`", *key[1:])) + " |" for key in config_keys()]
    return PAGE + "\n".join(rows) + "\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
