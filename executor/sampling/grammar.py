"""Structured output: what a request's text has to be, as a JSON schema, any JSON object, or a regular expression."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from qllm.executor.errors import GrammarError, SamplingError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Kind = Literal["json_schema", "regex"]

MOST_COMPILED = 64  # grammars kept for the next request that brings the same one
# Whitespace between two parts of JSON, by default; without a limit a model may write nothing else. A schema that wants
# another says so: {"x-guidance": {"whitespace_pattern": ...}}
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,32}"


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
    def json_schema(cls, schema: str | Mapping[str, Any]) -> Grammar:
        """Text that is JSON by this schema (draft 2020-12). Raises SamplingError where the schema is no JSON."""
        try:
            found = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(found, allow_nan=False)  # properties keep their order: that of the output
        except (TypeError, ValueError, RecursionError) as error:
            raise SamplingError(f"grammar: the JSON schema {schema!r:.80} is no JSON: {error}") from error
        if not isinstance(found, Mapping):
            raise SamplingError(f"grammar: the JSON schema is {schema!r:.80}; allowed: an object")
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


class Matcher:
    """Where one request stands in its grammar. Only the engine's thread calls it."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens were chosen; one that the grammar does not allow is an error of `bits`."""
        self._matcher.consume_tokens([*tokens])

    def bits(self) -> bytes:
        """The tokens allowed now, a bit each, the lowest first; where the grammar is at its end, those that end text.

        Raises:
            GrammarError: the grammar has become too much work, or the tokens did not follow it.
        """
        if self._matcher.is_error():
            raise GrammarError(f"grammar: {_first_line(self._matcher.get_error())}")
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarError(f"grammar: {_first_line(self._matcher.get_error())}")
        return bits


class Grammars:
    """Grammars compiled for one tokenizer, by llguidance; a bounded number is kept. Any thread may call it.

    The first one has the tokenizer read. For a large vocabulary that takes a second or two, in which Python runs no
    other thread: an engine stands still. So whoever serves compiles one before.

    Args:
        tokenizer: a fast tokenizer of transformers; None where the engine has none.
        vocabulary: number of token ids of the model.
        ends: token ids that end text; those that are ordinary text to the tokenizer do not count. By default the
            tokenizer's.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int] = frozenset()):
        self.vocabulary = vocabulary
        own = getattr(tokenizer, "eos_token_id", None)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.ends = frozenset(ends.intersection(added)) or frozenset(() if own is None else (own,))
        self._tokenizer = tokenizer
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = Lock()  # of what was compiled
        self._tokenizer_lock = Lock()

    def matcher(self, grammar: Grammar) -> Matcher:
        """The beginning of `grammar`, for one request.

        Raises:
            GrammarError: the grammar cannot be compiled, the engine has no tokenizer that it could be compiled for, or
                llguidance is not installed.
        """
        with self._lock:
            known = self._compiled.get(grammar)
            if known is not None:
                self._compiled.move_to_end(grammar)
                return Matcher(known.deep_copy())
        made = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = made
            while len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
            return Matcher(made.deep_copy())

    def _compile(self, grammar: Grammar) -> LLMatcher:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise GrammarError(
                "grammar: llguidance is not installed; install it with: pip install 'qllm-moe[grammar]'"
            ) from None
        with self._tokenizer_lock:
            tokenizer = self._own_tokenizer
        try:
            if grammar.kind == "json_schema":
                source = LLMatcher.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": WHITESPACE})
            else:
                source = LLMatcher.grammar_from_regex(grammar.text)
        except ValueError as error:
            raise GrammarError(
                f"grammar: {grammar.text!r:.80} cannot be compiled: {_first_line(str(error))}"
            ) from error
        made = LLMatcher(tokenizer, source, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if not made.is_error():
            made.compute_bitmask()  # one that allows no text breaks here
        if made.is_error():
            raise GrammarError(f"grammar: {grammar.text!r:.80} cannot be compiled: {_first_line(made.get_error())}")
        return made

    @cached_property
    def _own_tokenizer(self) -> LLTokenizer:
        """Takes a second or two for a large vocabulary."""
        from llguidance.hf import from_tokenizer

        if self._tokenizer is None or not self.ends:
            raise GrammarError("grammar: needs an engine with a tokenizer, and with a token that ends text")
        try:
            return from_tokenizer(self._tokenizer, max(self.vocabulary, len(self._tokenizer)), sorted(self.ends))
        except Exception as error:  # what llguidance makes of a tokenizer that it does not know
            raise GrammarError(f"grammar: the tokenizer cannot be used: {_first_line(str(error))}") from error


def _first_line(text: str) -> str:
    return " ".join(text.split())[:200]
