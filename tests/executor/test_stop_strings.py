"""Stop strings in text that comes token by token, against a search in the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor.engine.text import Detokenizer, StopStrings


class Pieces:
    """A tokenizer whose token i is the i-th of some pieces of bytes; 0 is special."""

    def __init__(self, pieces: list[bytes]):
        self.pieces = pieces

    def decode(self, ids, *, skip_special_tokens):
        return b"".join(self.pieces[i] for i in ids if i or not skip_special_tokens).decode(errors="replace")


pieces = st.lists(st.text("ab\u00e9", min_size=0, max_size=3), min_size=1, max_size=12)
strings = st.lists(st.text("ab\u00e9", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=500, deadline=None)
@given(pieces, strings, st.integers(0, 4))
def test_the_text_ends_where_a_search_in_all_of_it_finds_the_first_string(given, stops, min_tokens):
    """Tokens of whole characters: so their text is the tokens' texts in a row."""
    tokenizer = Pieces([b"<special>", *(piece.encode() for piece in given)])
    matcher = StopStrings(Detokenizer(tokenizer), stops, min_tokens)
    told, text, searched = "", "", 0
    for i, piece in enumerate(given):
        text += piece
        told += matcher.add(i + 1, i == len(given) - 1)
        ends = [(at, at + len(s)) for s in stops for at in range(len(text)) if text.startswith(s, at)]
        counting = [at for at, end in ends if end > searched] if i >= min_tokens else []
        searched = len(text)
        assert matcher.found == bool(counting)
        if counting:
            assert told == text[: min(counting)]
            return
        assert text.startswith(told)
        held = text[len(told) :]
        assert not held or any(s.startswith(held) for s in stops), "what waits may be the beginning of a string"
    assert told == text


def test_a_string_is_found_across_bytes_of_characters():
    data = "na\u00efve \u65e5\u672c\u8a9e ###".encode()
    tokenizer = Pieces([b"", *(bytes([byte]) for byte in data)])
    for stop in ("\u672c", "\u00efve \u65e5", "##", "e"):
        matcher = StopStrings(Detokenizer(tokenizer), [stop])
        told = ""
        for token in range(1, len(data) + 1):
            told += matcher.add(token, token == len(data))
            if matcher.found:
                break
        assert told == data.decode().split(stop)[0]


def test_special_tokens_have_text_where_that_is_wanted():
    tokenizer = Pieces([b"<special>", b"a"])
    assert [Detokenizer(tokenizer, skip).add(0, True) for skip in (True, False)] == ["", "<special>"]
