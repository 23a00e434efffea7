"""Logarithms of probabilities as OpenAI's two kinds of answers tell them."""

from __future__ import annotations

from typing import Any

from qllm.executor import Token


class TokenTexts:
    """The text of single tokens; one that holds a part of a character has a replacement character."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __getitem__(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        return str(self._tokenizer.decode([token]))


def of_completion(tokens: list[Token], texts: TokenTexts, offset: int) -> dict[str, Any]:
    """Those of tokens that were generated, `offset` characters of text after the beginning."""
    told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        if token.logprobs is None:
            continue
        text, chosen, top = texts[token.id], token.logprobs.chosen, token.logprobs.top
        told["tokens"].append(text)
        told["token_logprobs"].append(_finite(chosen))
        told["top_logprobs"].append({texts[t]: _finite(p) for t, p in ((token.id, chosen), *top)} if top else None)
        told["text_offset"].append(offset)
        offset += len(token.text or "")
    return told


def of_chat(tokens: list[Token], texts: TokenTexts) -> dict[str, Any]:
    """Those of tokens that were generated."""
    content = []
    for token in tokens:
        if token.logprobs is None:
            continue
        top = [_entry(texts[t], p) for t, p in token.logprobs.top]
        content.append(_entry(texts[token.id], token.logprobs.chosen) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": [*text.encode("utf-8")]}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's API says this of what is all but impossible."""
    return max(logprob, -9999.0)
