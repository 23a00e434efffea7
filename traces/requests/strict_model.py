"""Models that refuse unknown keys, for recipes and configurations alike, and one line for whatever pydantic finds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from qllm.traces.files import not_regular
from qllm.traces.messages import KeyPath, dotted, shown, suggestion
from qllm.traces.requests.trace import TraceError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=1 << 53)]  #: beyond, float64 skips whole numbers

_T = TypeVar("_T")


class StrictModel(BaseModel):
    """A mapping with these keys and no others; a number written as text is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if data is None:  # a key with nothing behind it
            return {}
        if not isinstance(data, dict | BaseModel):
            raise ValueError(f"must be a mapping with keys of {', '.join(cls.model_fields)}; got {shown(data)}")
        if isinstance(data, dict) and cls.model_config.get("extra") == "forbid":
            for key in data:
                if key not in cls.model_fields:
                    hint = suggestion(str(key), cls.model_fields)
                    raise PydanticCustomError("unknown_key", "{message}", {"key": str(key), "message": hint})
        return data


def existing_file(value: str, info: ValidationInfo) -> str:
    """An absolute path; relative ones start at the configuration's folder, or else where the program runs."""
    path, where = _absolute(value, info)
    if not os.path.isfile(path):  # pathlib raises where a name is too long
        hint = ""
        if "azure" in path.name.lower():
            hint = "; download it from https://github.com/Azure/AzurePublicDataset (data/)"
        raise ValueError(f"{not_regular(path)}: {os.path.relpath(path):.80}{where}{hint}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"cannot be read, for lack of permission: {os.path.relpath(path)}")
    return str(path)


def existing_folder(value: str, info: ValidationInfo) -> str:
    """The same of a folder."""
    path, where = _absolute(value, info)
    if not os.path.isdir(path):
        what = "is no folder" if os.path.exists(path) else "no such folder"
        raise ValueError(f"{what}: {os.path.relpath(path):.80}{where}")
    if not os.access(path, os.R_OK | os.X_OK):
        raise ValueError(f"cannot be read, for lack of permission: {os.path.relpath(path)}")
    return str(path)


def _absolute(value: str, info: ValidationInfo) -> tuple[Path, str]:
    """The path, and what an error says of where paths start."""
    base = (info.context or {}).get("base")
    path = Path(os.path.abspath((base or Path.cwd()) / Path(value).expanduser()))
    return path, " (paths start at the configuration's folder)" if base else ""


def looks_like_path(value: str) -> bool:
    """Whether `value` names a file, and not something that ships."""
    return "/" in value or os.sep in value or value.endswith((".csv", ".json", ".jsonl", ".py", ".gz"))


InputFile = Annotated[str, AfterValidator(existing_file)]
InputFolder = Annotated[str, AfterValidator(existing_folder)]


def checked(kind_of: type[_T] | TypeAdapter[_T], given: Any, where: KeyPath = ()) -> _T:
    """`given`, which stands at the key `where`, as that model. TraceError: one line with key and what is allowed."""
    adapter = kind_of if isinstance(kind_of, TypeAdapter) else TypeAdapter(kind_of)
    try:
        return adapter.validate_python(dict(given) if isinstance(given, Mapping) else given)
    except ValidationError as error:
        key, text = explain(error, given)
        key = (*where, *key)
        raise TraceError(f"{dotted(key)}: {text}" if key else text) from None


#: What pydantic calls a mistake -> what is said of it. Where several are found at one key, all of them are allowed.
_MUST_BE = {
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "finite_number": "a finite number",
    **dict.fromkeys(("string_type", "string_sub_type", "string_unicode"), "text"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "list_type": "a list such as [1, 2]",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "greater than or equal to {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "less than or equal to {le}",
    **dict.fromkeys(("dict_type", "model_type"), "a mapping such as {{name: value}}"),
    "invalid_key": "under a key that is text",
}


def explain(error: ValidationError, data: Any) -> tuple[KeyPath, str]:
    """The key in `data` that pydantic's first finding is about, and what is wrong there, in one line."""
    found = [(_key_path(detail["loc"], data), detail) for detail in error.errors()]
    first = found[0][0]
    inner = [(key, detail) for key, detail in found if key[: len(first)] == first]
    deepest = max(len(key) for key, _ in inner)  # of the kinds that a value may have, the one that it comes closest to
    key, detail = next((key, detail) for key, detail in inner if len(key) == deepest)
    context, problem, value = detail.get("ctx", {}), detail["type"], detail["input"]
    if problem == "unknown_key":
        key = (*key, context["key"])
        text = f"unknown key {context['key']!r}; {context['message']}"
    elif problem == "missing":
        key = (*key, detail["loc"][-1])
        text = "this key is missing"
    elif problem == "value_error":
        text = str(context["error"])
    elif problem in ("union_tag_invalid", "literal_error"):
        given = context.get("tag", value)
        options = context.get("expected_tags") or context["expected"]
        names = [name.strip().strip("'") for name in options.replace(" or ", ", ").split(",")]
        key = (*key, context["discriminator"].strip("'")) if "discriminator" in context else key
        text = f"{shown(given)} is unknown; {suggestion(str(given), names)}"
    elif problem == "union_tag_not_found":
        text = f"the key {context['discriminator']} is missing"
    else:
        details = [other for of, other in inner if of == key]
        wanted = (_MUST_BE[d["type"]].format(**_bounds(d)) for d in details if d["type"] in _MUST_BE)
        text = f"must be {' or '.join(dict.fromkeys(wanted)) or 'another value'}, got {shown(value)}"
    return key, text


def _bounds(detail: ErrorDetails) -> dict[str, Any]:
    """What pydantic says of the bounds, whole numbers without a point."""
    given = detail.get("ctx", {})
    return {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in given.items()}


def _key_path(loc: tuple[int | str, ...], data: Any) -> KeyPath:
    """The part of pydantic's location that stands in the data (it also holds names of the models tried)."""
    key: list[int | str] = []
    for part in loc:
        size = len(data) if isinstance(data, list) else 0
        if part in data if isinstance(data, Mapping) else isinstance(part, int) and part < size:
            key.append(part)
            data = data[part]
    return tuple(key)
