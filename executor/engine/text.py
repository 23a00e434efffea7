"""From text to tokens and back: a checkpoint's tokenizer, prompts, and the text of tokens as they come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer
from transformers.utils.hub import cached_file

from qllm.executor.errors import LoadError, RequestError
from qllm.executor.model.checks import words
from qllm.executor.sampling.params import is_whole

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
MOST_HELD = 8  #: tokens held back for an unfinished character, which has at most 4 bytes; beyond, they are stray bytes


class Tokenizer(Protocol):
    """What the engine needs of a Hugging Face tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


def prompt_ids(tokenizer: Tokenizer | None, text: str) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer adds, but once. Raises RequestError.

    Text of a chat template begins with them already. vLLM's chat does not add them to such text either, and llama.cpp
    warns.
    """
    if tokenizer is None:
        raise RequestError("prompt is text, but the engine has no tokenizer; allowed: token ids")
    ids = tokenizer.encode(text)
    added = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(tokenizer.encode(""), ids, strict=False))]
    return ids[len(added) :] if ids[: 2 * len(added)] == added * 2 else ids


def load_tokenizer(name_or_path: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint; None where it has none, so that prompts are token ids. Raises LoadError."""
    name = str(name_or_path)
    try:
        if not any(cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in TOKENIZER_FILES):
            return None
    except OSError:  # no checkpoint either, which loading its model says
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        empty = tokenizer.encode("a") == tokenizer.encode("")  # of a file that is missing transformers makes such a one
    except Exception as error:  # whatever transformers makes of a file that anybody may have written
        raise LoadError(
            f"{name}: its tokenizer cannot be loaded: {words(error)}; without one, load_model and Engine take token ids"
        ) from error
    return None if empty else tokenizer


def token_ids(name: str, given: Any, vocabulary: int) -> list[int]:
    """Token ids from an iterable, a tensor, or what a tokenizer or a chat template returns. Raises RequestError."""
    if isinstance(given, Mapping) and "input_ids" in given:
        given = given["input_ids"]
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise RequestError(f"{name} is {given!r:.80}; allowed: token ids")
    tokens = list(given)
    if len(tokens) == 1 and isinstance(tokens[0], list):  # a batch of one
        tokens = tokens[0]
    # The engine waits while a client's thread is in here: the usual case is to be quick for long prompts.
    if set(map(type, tokens)) == {int} and min(tokens) >= 0 and max(tokens) < vocabulary:
        return list(tokens)
    for token in tokens:
        if not is_whole(token) or not 0 <= token < vocabulary:
            raise RequestError(f"{name} holds {token!r:.80}; allowed: token ids from 0 to {vocabulary - 1}")
    return [int(token) for token in tokens]


def chat_ids(tokenizer: Any, messages: Any, settings: Mapping[str, Any]) -> Any:
    """What the tokenizer's chat template makes of a conversation: token ids in some form. Raises RequestError."""
    if not getattr(tokenizer, "chat_template", None):
        has = "the engine has no tokenizer" if tokenizer is None else "the tokenizer has no chat template"
        raise RequestError(f"messages are given, but {has}; allowed: a prompt")
    if not isinstance(messages, Sequence) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise RequestError(f"messages is {messages!r:.80}; allowed: a list of messages, each with its role and content")
    try:
        return tokenizer.apply_chat_template(
            [dict(m) for m in messages], **{"add_generation_prompt": True, **settings, "tokenize": True}
        )
    except Exception as error:  # whatever a template of anybody's makes of anybody's messages
        raise RequestError(f"messages do not fit the chat template: {words(error)}") from error


class Detokenizer:
    """Text from tokens one by one; a few are decoded together, as a token's text depends on its neighbours.

    Args:
        tokenizer: decodes.
        skip_special_tokens: whether special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._prefix = 0  # decoded again each time
        self._told = 0  # number of tokens whose text was given out

    def add(self, token: int, last: bool) -> str:
        """The text that `token` adds; an unfinished character waits, but not beyond the `last` one."""
        self._ids.append(token)
        before = self.decode(self._ids[self._prefix : self._told])
        now = self.decode(self._ids[self._prefix :])
        held = len(self._ids) - self._told
        if not last and (len(now) <= len(before) or (now.endswith("\ufffd") and held < MOST_HELD)):
            return ""
        self._prefix, self._told = self._told, len(self._ids)
        return now[len(before) :]

    def decode(self, ids: list[int]) -> str:
        """The text of these tokens alone."""
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class StopStrings:
    """Text from tokens one by one, up to where it holds one of some strings.

    Text that may be the beginning of such a string waits until it is known not to be.

    Args:
        decoder: gives the text.
        strings: none of them empty.
        min_tokens: a string that ends within the text of so many first tokens does not count.

    Attributes:
        found: whether the text holds one.
    """

    def __init__(self, decoder: Detokenizer, strings: Sequence[str], min_tokens: int = 0):
        self.found = False
        self._decoder = decoder
        self._strings = strings
        self._kept = max(map(len, strings)) - 1  # characters in which a string may begin that ends later
        self._not_yet = min_tokens  # tokens
        self._tail = ""  # these last characters of the text so far
        self._held = 0  # how many of them wait

    def add(self, token: int, last: bool) -> str:
        """The text that `token` adds, before the first of the strings; nothing waits beyond the `last` one."""
        text = self._tail + self._decoder.add(token, last)
        searched = len(self._tail)
        told = searched - self._held
        self._not_yet -= 1
        if self._not_yet < 0:
            found = [text.find(string, max(0, searched - len(string) + 1)) for string in self._strings]
            if begins := [at for at in found if at >= 0]:
                self.found = True
                return text[told : min(begins)]
        self._held = 0 if last else max(_overlap(text, string) for string in self._strings)
        self._tail = text[max(0, len(text) - self._kept) :]
        return text[told : len(text) - self._held]


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of `text` may be the beginning of `string`, not all of it."""
    return next((n for n in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:n])), 0)
