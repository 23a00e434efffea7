"""Structured output: what a request's text has to be, as a JSON schema, any JSON object, or a regular expression."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qllm.executor.errors import SamplingError

Kind = Literal["json_schema", "regex"]


@dataclass(frozen=True)
class Grammar:
    """What the text of a request has to be. Made by `json_schema`, `json_object`, `regex` or `response_format`.

    Attributes:
        kind: what `text` is.
        text: a JSON schema as JSON, or a regular expression.
    """

    kind: Kind
    text: str

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any] | bool) -> Grammar:
        """Text that is JSON by this schema (draft 2020-12). Raises SamplingError where the schema is no JSON."""
        try:
            found = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(found, allow_nan=False)  # properties keep their order: that of the output
        except (TypeError, ValueError, RecursionError) as error:
            raise SamplingError(f"grammar: the JSON schema {schema!r:.80} is no JSON: {error}") from error
        if not isinstance(found, Mapping | bool):
            raise SamplingError(f"grammar: the JSON schema is {schema!r:.80}; allowed: an object, true or false")
        return cls("json_schema", text)

    @classmethod
    def json_object(cls) -> Grammar:
        """Text that is one JSON object, whatever is in it."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that matches this regular expression (the syntax of Rust's regex crate) as a whole."""
        if not isinstance(pattern, str):
            raise SamplingError(f"grammar: the regular expression is {pattern!r:.80}; allowed: text")
        return cls("regex", pattern)

    @classmethod
    def response_format(cls, given: Any) -> Grammar | None:
        """The grammar of a `response_format` of OpenAI's API; None where it allows any text. Raises SamplingError."""
        kind = given.get("type") if isinstance(given, Mapping) else None
        if given is None or kind == "text":
            return None
        if kind == "json_object":
            return cls.json_object()
        if kind == "json_schema" and isinstance(given.get("json_schema"), Mapping) and "schema" in given["json_schema"]:
            return cls.json_schema(given["json_schema"]["schema"])
        if kind == "regex" and isinstance(given.get("regex"), str):
            return cls.regex(given["regex"])
        raise SamplingError(
            f"response_format is {given!r:.80}; allowed: type text, json_object, json_schema (with json_schema.schema) "
            "or regex (with regex)"
        )
