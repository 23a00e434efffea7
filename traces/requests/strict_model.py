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

from qllm.traces.messages import KeyPath, dotted, kind, suggestion
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
        if isinstance(data, dict) and cls.model_config.get("extra") == "forbid":
            for key in data:
                if key not in cls.model_fields:
                    hint = suggestion(str(key), cls.model_fields)
                    raise PydanticCustomError("unknown_key", "{message}", {"key": str(key), "message": hint})
        return data


def existing_file(value: str, info: ValidationInfo) -> str:
    """An absolute path; relative ones start at the configuration's folder, or else where the program runs."""
    base = (info.context or {}).get("base")
    path = Path(os.path.abspath((base or Path.cwd()) / Path(value).expanduser()))
    if not path.is_file():
        where = " (paths start at the configuration's folder)" if base else ""
        hint = ""
        if "azure" in path.name.lower():
            hint = "; download it from https://github.com/Azure/AzurePublicDataset (data/)"
        raise ValueError(f"no such file: {os.path.relpath(path)}{where}{hint}")
    return str(path)


def looks_like_path(value: str) -> bool:
    """Whether `value` names a file, and not something that ships."""
    return "/" in value or os.sep in value or value.endswith((".csv", ".json", ".jsonl", ".py", ".gz"))


InputFile = Annotated[str, AfterValidator(existing_file)]


def checked(kind_of: type[_T] | TypeAdapter[_T], given: Any, where: KeyPath = ()) -> _T:
    """`given`, which stands at the key `where`, as that model. TraceError: one line with key and what is allowed."""
    adapter = kind_of if isinstance(kind_of, TypeAdapter) else TypeAdapter(kind_of)
    try:
        return adapter.validate_python(dict(given) if isinstance(given, Mapping) else given)
    except ValidationError as error:
        key, text = explain(error.errors()[0], given)
        key = (*where, *key)
        raise TraceError(f"{dotted(key)}: {text}" if key else text) from None


def explain(detail: ErrorDetails, data: Any) -> tuple[KeyPath, str]:
    """The key in `data` that one finding of pydantic is about, and what is wrong there."""
    context = detail.get("ctx", {})
    problem, value = detail["type"], detail["input"]
    key = _key_path(detail["loc"], data)
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
        text = f"{given!r} is unknown; {suggestion(str(given), names)}"
    elif problem == "union_tag_not_found":
        text = f"the key {context['discriminator']} is missing"
    elif problem in ("model_type", "dict_type", "model_attributes_type"):
        text = f"expected a mapping of keys, got {kind(value)}"
    else:
        said = detail["msg"][:1].lower() + detail["msg"][1:]
        shown = kind(value) if isinstance(value, dict | list) or value is None else repr(value)
        text = f"{said.replace('input should be', 'must be')}, got {shown}"
    return key, text


def _key_path(loc: tuple[int | str, ...], data: Any) -> KeyPath:
    """The part of pydantic's location that stands in the data (it also holds names of the models tried)."""
    key: list[int | str] = []
    for part in loc:
        size = len(data) if isinstance(data, list) else 0
        if part in data if isinstance(data, Mapping) else isinstance(part, int) and part < size:
            key.append(part)
            data = data[part]
    return tuple(key)
