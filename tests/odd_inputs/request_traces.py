# ruff: noqa: SIM222
"""Odd request traces: each format, broken or unusual in one place, read whole and with the broken rows left out."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qllm.traces.requests.generate import generate
from qllm.traces.requests.readers import read_requests
from qllm.traces.requests.trace import RequestTrace, TraceError
from tests.odd_inputs.cases import ACCEPTED, Case, both, command, expect, refused_by_command, tried

AREA = "request traces"
ROWS = [(0, 20, 3), (500, 30, 4), (500, 10, 2), (2000, 25, 3)]  # ms, prompt and output tokens
PLAIN = RequestTrace(
    *(np.array(column) for column in ([0, 0.5, 0.5, 2.0], *list(zip(*ROWS, strict=True))[1:], [0] * 4))
)
CSV = {
    "csv": ("arrival_s", "prompt_tokens", "output_tokens"),
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
}
JSON = {
    "jsonl": ("arrival_s", "prompt_tokens", "output_tokens"),
    "mooncake": ("timestamp", "input_length", "output_length"),
    "bailian": ("timestamp", "input_length", "output_length"),
}
Cells = list[list[str]]
Objects = list[dict[str, Any]]


def time_of(format: str, ms: int) -> str:
    """How the format writes an arrival."""
    if format == "azure":
        return f"2023-11-16 18:15:{46 + ms // 1000}.{ms % 1000:03}0000"
    return str(ms) if format == "mooncake" else str(ms / 1000)


def cells(format: str) -> Cells:
    return [list(CSV[format]), *([time_of(format, ms), str(p), str(o)] for ms, p, o in ROWS)]


def objects(format: str) -> Objects:
    more = {"chat_id": 1, "parent_chat_id": -1, "turn": 1} if format == "bailian" else {}
    numbers = [(json.loads(time_of(format, ms)), p, o) for ms, p, o in ROWS]
    return [dict(zip(JSON[format], row, strict=True)) | more for row in numbers]


def text_of(rows: Cells | Objects) -> str:
    return "".join(
        (",".join(row) if isinstance(row, list) else row if isinstance(row, str) else json.dumps(row)) + "\n"
        for row in rows
    )


def read(content: bytes | str, name: str, *names: str, **options: Any) -> RequestTrace | str:
    """REFUSED, or what the file holds."""
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
        found: RequestTrace | str = tried(lambda: read_requests(name, **options), TraceError, *names)
    return found


def is_refused(content: bytes | str, name: str, *names: str, **options: Any) -> str:
    found = read(content, name, *names, **options)
    expect(isinstance(found, str), f"accepted: {found!r:.200}")
    return str(found)


def is_trace(content: bytes | str, name: str, right: RequestTrace, **options: Any) -> str:
    found = read(content, name, **options)
    expect(isinstance(found, RequestTrace), "refused, and it says what the plain file says")
    expect(found == right, f"{_columns(found)} where {_columns(right)} is right")
    return ACCEPTED


def _columns(trace: Any) -> list[Any]:
    return [getattr(trace, name).tolist() for name in ("arrival", "prompt_tokens", "output_tokens")]


# ---- one cell -------------------------------------------------------------------------------------------------------

BAD_COUNT = [
    *("", "-1", "0", "-0", "3.5", "nan", "NaN", "inf", "1e400", "x", "0x10", "1,5", "true", "None", "9" * 30, "1e19"),
    *("-1e3", "3 4", "\u00bd", "1e-3", "'5'", "[5]"),
]
SAME_COUNT = ["30.0", "3e1", "+30", " 30 ", "030", "30.000", "0.3e2", "3_0"]
BAD_TIME = ["", "-1", "-0.001", "nan", "inf", "-inf", "1e400", "x", "0x10", "true", "0,5", "1:30", "9" * 400]
SAME_TIME = ["0.50", "5e-1", "+0.5", " 0.5 ", ".5", "00.5"]
BAD_DATE = [
    *("", "0.5", "2023-11-16", "2023-02-30 18:15:46", "16/11/2023 18:15:46", "2023-11-16 25:00:00", "x"),
    *("nan", "1700158546"),
    *("2023-11-16 18:15:46.5+02:00", "2023-11-16 18:15:46.5 PM", "2023-11-16 18:15:60", "0000-00-00 00:00:00"),
    *("2023-11-16 18:15:46.12345678901", "٢٠٢٣-11-16 18:15:46", "2023-13-16 18:15:46", "-2023-11-16 18:15:46"),
]  # fmt: skip
SAME_DATE = [
    "2023-11-16T18:15:46.5",
    "2023-11-16 18:15:46.500Z",
    "2023-11-16 18:15:46.5+00:00",
    " 2023-11-16 18:15:46.5 ",
]


def _cell_case(format: str, column: int, text: str, same: bool) -> str:
    rows = cells(format)
    rows[2][column] = f'"{text}"' if "," in text else text
    if same:
        return is_trace(text_of(rows), "t.csv", PLAIN, format=format)
    is_refused(text_of(rows), "t.csv", "line 3", format=format)
    return is_trace(text_of(rows), "t.csv", without(1), format=format, skip_invalid=True)


def without(row: int) -> RequestTrace:
    """The plain trace without one row; its arrivals still begin at 0."""
    left = [i for i in range(4) if i != row]
    found = [getattr(PLAIN, name)[left] for name in ("arrival", "prompt_tokens", "output_tokens", "cls")]
    return RequestTrace(*found)


BAD_VALUE: list[Any] = [None, True, "30", "", -1, 0, 3.5, [], {}, [30], 10**30, "nan", -0.0]
LITERALS = ["NaN", "Infinity", "-Infinity", "1e400", "-1", "0x1E", "1e19", "30,", "+30", "030", ".5e2", "30.5", "3O"]
SAME_LITERAL = ["30.0", "3e1", "0.3e2", "30.000000"]


def _value_case(format: str, column: int, value: Any) -> str:
    rows = objects(format)
    rows[1][JSON[format][column]] = value
    if column == 0 and value in (0, 3.5, -0.0) and not isinstance(value, bool):  # an arrival may be that
        return "accepted" if isinstance(read(text_of(rows), "t.jsonl", format=format), RequestTrace) else "refused"
    if column == 0 and value == 10**30:
        found = read(text_of(rows), "t.jsonl", format=format)
        expect(isinstance(found, str) or float(found.arrival[-1]) > 1e26, "an arrival of 1e30 is another")
        return found if isinstance(found, str) else ACCEPTED
    is_refused(text_of(rows), "t.jsonl", "line 2", format=format)
    return is_trace(text_of(rows), "t.jsonl", without(1), format=format, skip_invalid=True)


def _literal_case(format: str, literal: str, same: bool) -> str:
    lines = text_of(objects(format)).splitlines()
    lines[1] = lines[1].replace(": 30", f": {literal}")
    text = "\n".join(lines)
    if same:
        return is_trace(text, "t.jsonl", PLAIN, format=format)
    is_refused(text, "t.jsonl", "line 2", format=format)
    return is_trace(text, "t.jsonl", without(1), format=format, skip_invalid=True)


# ---- whole files ----------------------------------------------------------------------------------------------------


def _files(format: str) -> Iterator[tuple[str, bytes | str, RequestTrace | tuple[str, ...]]]:
    """Name, content, and either what it holds or what the refusal names."""
    csv = format in CSV
    rows: Any = cells(format) if csv else objects(format)
    text = text_of(rows)
    lines = text.splitlines(keepends=True)
    names = CSV[format] if csv else JSON[format]
    yield "as it is", text, PLAIN
    yield "CRLF", text.replace("\n", "\r\n"), PLAIN
    yield (
        "mixed line ends",
        "".join(line.replace("\n", "\r\n") if i % 2 else line for i, line in enumerate(lines)),
        PLAIN,
    )
    yield "a byte order mark", b"\xef\xbb\xbf" + text.encode(), PLAIN
    yield "no line end", text.rstrip("\n"), PLAIN
    yield "blank lines", text.replace("\n", "\n\n"), PLAIN
    yield "UTF-16", text.encode("utf-16"), ("t.",)
    yield "a stray byte", text.encode() + b"\xff\xfe\n", ("t.",)
    yield "gzip", gzip.compress(text.encode()), ("t.",)
    yield "NUL bytes", text + "\0\0\0\n", ("line",)
    yield "nothing", "", ("t.",)
    yield "blanks", " \n\n", ("t.",)
    yield "a row of junk", text + "junk\n", ("line",)
    yield "another format's row", text + (text_of(objects("jsonl")[:1]) if csv else "0,1,2\n"), ("line",)
    yield (
        "the rows twice",
        text + "".join(lines[1:] if csv else lines),
        RequestTrace(
            *(
                np.repeat(getattr(PLAIN, name), 2)[[0, 1, 2, 4, 3, 5, 6, 7]]
                for name in ("arrival", "prompt_tokens", "output_tokens", "cls")
            )
        ),
    )
    head, body = (lines[:1], lines[1:]) if csv else ([], lines)
    yield "unsorted rows", "".join([*head, body[3], body[1], body[2], body[0]]), PLAIN
    yield "one row", "".join([*head, body[0]]), PLAIN.head(1)
    batch = RequestTrace(np.zeros(3), *(np.repeat(column, 3) for column in ([20], [3], [0])))
    yield "one instant", "".join([*head, body[0] * 3]), batch
    yield "a cut last row", text[: text.rindex("," if csv else ":")], ("line",)
    if not csv:
        yield "an array of the rows", json.dumps(rows), ("t.",)
        yield "a list a line", text + "[1, 2, 3]\n", ("line",)
        yield "a number a line", text + "5\n", ("line",)
        yield "null", text + "null\n", ("line",)
        yield "a key twice", text.replace(f'"{names[1]}": 30', f'"{names[1]}": 30, "{names[1]}": 31'), ("line 2",)
        yield "two objects a line", text.replace("}\n{", "} {", 1), ("line",)
        yield "deep lists", text + "[" * 5000 + "]" * 5000 + "\n", ("line",)
        yield "single quotes", text.replace('"', "'"), ("line",)
        for i, key in enumerate(names):
            fewer = [{k: v for k, v in row.items() if k != key or n != 2} for n, row in enumerate(rows)]
            yield f"a row without {key}", text_of(fewer), ("line 3",)
            renamed = [{f"{k}s" if k == key else k: v for k, v in row.items()} for row in rows]
            yield f"{key} renamed", text_of(renamed), ("line 1",)
            yield f"keys turned by {i}", text_of([dict([*row.items()][i:] + [*row.items()][:i]) for row in rows]), PLAIN
        return
    yield "the header alone", lines[0], ("t.",)
    yield "no header", "".join(body), ("t.",)
    yield "two headers", text + lines[0], ("line",)
    yield "semicolons", text.replace(",", ";"), ("t.",)
    yield "tabs", text.replace(",", "\t"), ("t.",)
    yield "quoted cells", text_of([[f'"{cell}"' for cell in row] for row in rows]), PLAIN
    yield "a quote that stays open", text.replace(",30", ',"30'), ("line", "t.csv")
    yield "blanks around names", text.replace(lines[0], " , ".join(names) + "\n"), PLAIN
    yield "a cell too many", text.replace(",30,", ",30,31,"), ("line 3",)
    yield "a comma at the end", text.replace(",30,4", ",30,4,"), ("line 3",)
    yield "names in capitals", text.replace(lines[0], lines[0].swapcase()), ("t.",)
    for i, name in enumerate(names):
        yield f"no column {name}", text_of([row[:i] + row[i + 1 :] for row in rows]), ("t.", name)
        yield f"column {name} twice", text_of([[*row, row[i]] for row in rows]), (name,)
        yield f"columns turned by {i}", text_of([row[i:] + row[:i] for row in rows]), PLAIN
        short = [row if n != 2 else row[:i] for n, row in enumerate(rows)]
        yield f"a row of {i} cells", text_of(short), without(1) if i == 0 else ("line 3",)


def _file_case(format: str, content: bytes | str, right: RequestTrace | tuple[str, ...], named: bool) -> str:
    name = "t.csv" if format in CSV else "t.jsonl"
    options = {"format": format} if named else {}
    if isinstance(right, tuple):
        return is_refused(content, name, *right, **options)
    return is_trace(content, name, right, **options)


# ---- units ----------------------------------------------------------------------------------------------------------


def _unit_case(format: str, unit: str | None) -> str:
    """The numbers of the plain file as that unit."""
    per_second = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}
    usual = "ms" if format == "mooncake" else "s"
    text = text_of(cells(format)) if format in CSV else text_of(objects(format))
    name = "t.csv" if format in CSV else "t.jsonl"
    if format == "azure" or unit not in per_second:
        return is_refused(text, name, "unit", format=format, unit=unit)
    scale = per_second[usual] / per_second[unit]
    found = read(text, name, format=format, unit=unit)
    expect(isinstance(found, RequestTrace), f"refused: {found}")
    expect(np.allclose(found.arrival, PLAIN.arrival * scale, rtol=1e-12, atol=0), f"arrivals {found.arrival}")
    return ACCEPTED


def _epoch_case(format: str, start: int, right: bool) -> str:
    """Arrivals that count from 1970: exact to the last digit, or refused where the unit is in doubt."""
    offsets = [(0, "000001"), (0, "500001"), (0, "500001"), (2, "000001")]
    key, p, o = CSV.get(format) or JSON[format]
    rows = [(f"{start + whole}.{parts}", row[1], row[2]) for (whole, parts), row in zip(offsets, ROWS, strict=True)]
    if format in CSV:
        text, name = f"{key},{p},{o}\n" + "".join(f"{t},{a},{b}\n" for t, a, b in rows), "t.csv"
    else:
        more = ', "chat_id": 1, "parent_chat_id": -1, "turn": 1' if format == "bailian" else ""
        text = "".join(f'{{"{key}": {t}, "{p}": {a}, "{o}": {b}{more}}}\n' for t, a, b in rows)
        name = "t.jsonl"
    return is_trace(text, name, PLAIN, format=format) if right else is_refused(text, name, "unit", format=format)


def _mixed_up() -> Iterator[tuple[str, Callable[[], str]]]:
    """Formats that are taken for one another."""
    seconds = [row | {"timestamp": row["timestamp"] / 1000} for row in objects("mooncake")]
    yield "Mooncake's keys in fractions of seconds", lambda: is_refused(text_of(seconds), "t.jsonl", "unit")
    yield (
        "Qwen-Bailian's rows called mooncake",
        lambda: is_refused(text_of(objects("bailian")), "t.jsonl", "bailian", format="mooncake"),
    )
    yield (
        "Mooncake's rows after one of Qwen-Bailian's",
        lambda: is_refused(text_of([*objects("bailian")[:1], *objects("mooncake")]), "t.jsonl", "line 2"),
    )
    for right in CSV:
        for wrong in CSV:
            if right != wrong:
                yield (
                    f"{right} called {wrong}",
                    partial(is_refused, text_of(cells(right)), "t.csv", "column", format=wrong),
                )
    for odd in ("", "CSV", "parquet", None, 5, "csv "):
        if odd is not None:
            yield f"format {odd!r}", partial(is_refused, text_of(cells("csv")), "t.csv", "format", format=odd)


def _conversations() -> Iterator[tuple[str, bytes | str, RequestTrace | tuple[str, ...]]]:
    """ShareGPT's list."""
    rows: list[Any] = [{"id": str(i), "prompt_tokens": p, "output_tokens": o} for i, (_, p, o) in enumerate(ROWS)]
    trace = RequestTrace(np.zeros(4), PLAIN.prompt_tokens, PLAIN.output_tokens, PLAIN.cls)
    yield "as it is", json.dumps(rows), trace
    yield "indented", json.dumps(rows, indent=2), trace
    yield "an empty list", "[]", ("t.json",)
    yield "cut short", json.dumps(rows)[:-9], ("t.json",)
    yield "something behind it", json.dumps(rows) + "x", ("t.json",)
    for odd in (None, 5, "x", [], {}, {"id": "x"}, {"prompt_tokens": 5}, {"prompt_tokens": "5", "output_tokens": 5}):
        yield f"the entry {odd!r}", json.dumps([*rows, odd]), ("t.json",)
    for odd in (0, -1, 2.5, True, None, 10**30):
        yield f"output_tokens {odd!r}", json.dumps([*rows, rows[0] | {"output_tokens": odd}]), ("t.json",)
    for odd in ([], [{}], [{"from": "human", "value": "a"}], "x", [{"from": "gpt", "value": "a"}] * 2, [1, 2]):
        yield f"conversations {odd!r}", json.dumps([*rows, {"conversations": odd}]), ("t.json",)


def _sharegpt_case(content: str, right: RequestTrace | tuple[str, ...]) -> str:
    return (
        is_trace(content, "t.json", right) if isinstance(right, RequestTrace) else is_refused(content, "t.json", *right)
    )


# ---- classes, commands, recipes -------------------------------------------------------------------------------------


def _classes_case(name: str, right: bool) -> str:
    text = "arrival_s,prompt_tokens,output_tokens,class\n0,5,1,a\n1,6,2," + name + "\n"
    if not right:
        return is_refused(text, "t.csv", "class", "line")
    found = read(text, "t.csv")
    expect(isinstance(found, RequestTrace), f"refused: {found}")
    both("classes", ("a", name.strip('"')), found.classes)
    return ACCEPTED


def _command_case(arguments: tuple[str, ...], right: int | None) -> str:
    """`qllm trace ...` on the plain file; `right`: requests that the written file has."""
    Path("t.csv").write_text(text_of(cells("csv")))
    Path("folder").mkdir()
    Path("closed").mkdir(0o500)
    ended = command("trace", *arguments)
    if right is None:
        named = [one.strip("-") for one in arguments if one.startswith("--")]
        return refused_by_command(ended, *named, *arguments[1:2])
    expect(ended.code == 0, f"exit code {ended.code}: {ended.err[-300:]}")
    found = read_requests(arguments[1])
    both("requests", right, len(found))
    return ACCEPTED


COMMANDS: list[tuple[tuple[str, ...], int | None]] = [
    (("describe", "missing.csv"), None),
    (("describe", "folder"), None),
    (("describe", "/dev/null"), None),
    (("describe", ""), None),
    (("describe", "t.csv", "--format", "azure"), None),
    (("describe", "t.csv", "--format", "nonsense"), None),
    (("describe", "t.csv", "--unit", "h"), None),
    (("describe", "t.csv", "--tokenizer", "missing.json"), None),
    (("describe", "t.csv", "--tokenizer", "t.csv"), None),
    (("make", "o.csv", "--from", "t.csv"), 4),
    (("make", "o.jsonl", "--from", "t.csv"), 4),
    (("make", "o.csv", "--from", "t.csv", "--requests", "2"), 2),
    (("make", "o.csv", "--from", "t.csv", "--requests", "5"), None),
    (("make", "o.csv", "--from", "t.csv", "--requests", "-1"), None),
    (("make", "o.csv", "--from", "t.csv", "--requests", "0"), None),
    (("make", "o.csv", "--from", "t.csv", "--rate", "0"), None),
    (("make", "o.csv", "--from", "t.csv", "--rate", "nan"), None),
    (("make", "o.csv", "--from", "t.csv", "--rate", "inf"), None),
    (("make", "o.csv", "--from", "t.csv", "--rate", "-5"), None),
    (("make", "o.csv", "--from", "t.csv", "--rate", "5"), 4),
    (("make", "o.csv", "--from", "t.csv", "--arrival", "poisson"), None),
    (("make", "o.csv", "--from", "t.csv", "--arrival", "poisson", "--rate", "5"), 4),
    (("make", "o.csv", "--from", "t.csv", "--arrival", "[", "--rate", "5"), None),
    (("make", "o.csv", "--from", "t.csv", "--arrival", "5", "--rate", "5"), None),
    (("make", "o.csv", "--from", "t.csv", "--arrival", "{process: gamma}", "--rate", "5"), None),
    (("make", "o.csv", "--from", "t.csv", "--arrival", "{process: gamma, cv: .nan}", "--rate", "5"), None),
    (("make", "o.csv", "--from", "t.csv", "--prompt", "5"), None),
    (("make", "o.csv", "--from", "t.csv", "--classes", "5"), None),
    (("make", "o.csv", "--from", "t.csv", "--classes", "[a, b]"), None),
    (("make", "o.csv", "--from", "t.csv", "--classes", "{a: 5}"), None),
    (("make", "o.csv", "--from", "t.csv", "--classes", "{a: [share]}"), None),
    (("make", "o.csv", "--from", "t.csv", "--classes", "{a: {share: 2}}"), None),
    (("make", "o.csv", "--from", "t.csv", "--classes", "{a: {share: 0.5}, b: {}}"), 4),
    (("make", "o.csv", "--from", "t.csv", "--classes", "{1: {share: 0.5}, b: {}}"), None),
    (("make", "o.csv", "--from", "t.csv", "--classes", "{}"), None),
    (("make", "o.csv", "--from", "t.csv", "--classes", "&a {b: *a}"), None),
    (("make", "o.csv", "--from", "t.csv", "--spread"), 4),
    (("make", "o.csv", "--spread", "--rate", "5", "--requests", "3"), None),
    (("make", "o.csv", "--rate", "5", "--requests", "3", "--output", "2"), None),
    (("make", "o.csv", "--rate", "5", "--requests", "3", "--prompt", "5", "--output", "2"), 3),
    (("make", "o.csv", "--rate", "5", "--requests", "3", "--prompt", "5.5", "--output", "2"), None),
    (("make", "o.csv", "--rate", "5", "--requests", "3", "--prompt", "nan", "--output", "2"), None),
    (("make", "o.csv", "--rate", "5", "--requests", "3", "--prompt", "", "--output", "2"), None),
    (("make", "o.csv", "--rate", "5", "--requests", "3", "--prompt", "[5]", "--output", "2"), None),
    (("make", "o.csv", "--rate", "5", "--requests", "3", "--prompt", "{uniform: [5, 1]}", "--output", "2"), None),
    (("make", "o.csv", "--rate", "5", "--requests", "99999999999", "--prompt", "5", "--output", "2"), None),
    (("make", "o.csv", "--rate", "1e-320", "--requests", "3", "--prompt", "5", "--output", "2"), None),
    (("make", "o.csv", "--rate", "1e300", "--requests", "3", "--prompt", "5", "--output", "2"), 3),
    (("make", "o.csv", "--rate", "5", "--requests", "3", "--prompt", "5", "--output", "2", "--seed", "-1"), None),
    (("make", "o.csv", "--rate", "5", "--requests", "3", "--prompt", "5", "--output", "2", "--unit", "s"), None),
    (("make", "o.txt", "--from", "t.csv"), None),
    (("make", "folder", "--from", "t.csv"), None),
    (("make", "folder/o.csv", "--from", "t.csv"), 4),
    (("make", "missing/o.csv", "--from", "t.csv"), None),
    (("make", "t.csv/o.csv", "--from", "t.csv"), None),
    (("make", "", "--from", "t.csv"), None),
    (("make", "t.csv", "--from", "t.csv"), 4),
]


def _recipe_case(recipe: Any, rate: Any, requests: Any, seed: Any) -> str:
    found = tried(lambda: generate(recipe, rate=rate, requests=requests, seed=seed), TraceError)
    if isinstance(found, str):
        return found
    both("requests", requests, len(found))
    return ACCEPTED


def _recipes() -> Iterator[tuple[Any, Any, Any, Any]]:
    good = {"prompt": {"fixed": 5}, "output": {"fixed": 2}}
    odd: list[Any] = [
        None,
        "",
        "x",
        -1,
        0,
        True,
        2.5,
        float("nan"),
        float("inf"),
        10**400,
        [],
        {},
        b"x",
        1e308,
        np.int64(3),
    ]
    yield from ((good, rate, 3, 0) for rate in odd)
    yield from ((good, 5.0, requests, 0) for requests in odd)
    yield from ((good, 5.0, 3, seed) for seed in odd)
    yield from ((recipe, 5.0, 3, 0) for recipe in odd)
    yield from (({**good, "prompt": value}, 5.0, 3, 0) for value in odd)
    yield from (({**good, "classes": value}, 5.0, 3, 0) for value in odd)


def cases() -> Iterator[Case]:
    """All of them."""
    for format in CSV:
        dates = format == "azure"
        for column in (0, 1, 2):
            bad, same = (BAD_COUNT, SAME_COUNT) if column else (BAD_DATE, SAME_DATE) if dates else (BAD_TIME, SAME_TIME)
            wanted = [(text, False) for text in bad] + [(text, True) for text in same if column != 2]
            for text, right in wanted:
                yield Case(
                    AREA,
                    f"{format}, {CSV[format][column]} {text[:30]!r}",
                    partial(_cell_case, format, column, text, right),
                )
    for format in JSON:
        for column in (0, 1, 2):
            for value in BAD_VALUE:
                yield Case(
                    AREA, f"{format}, {JSON[format][column]} {value!r:.30}", partial(_value_case, format, column, value)
                )
        for literal in (*LITERALS, *SAME_LITERAL):
            yield Case(
                AREA,
                f"{format}, the literal {literal}",
                partial(_literal_case, format, literal, literal in SAME_LITERAL),
            )
    for format in (*CSV, *JSON):
        for name, content, right in _files(format):
            named = name in ("nothing", "blanks", "no header") or "renamed" in name or "no column" in name
            yield Case(AREA, f"{format}, {name}", partial(_file_case, format, content, right, False))
            yield Case(AREA, f"{format} by name, {name}", partial(_file_case, format, content, right, True or named))
        for unit in ("s", "ms", "us", "ns", "h", "", "S"):
            yield Case(AREA, f"{format}, unit {unit!r}", partial(_unit_case, format, unit))
    for format, start, right in (
        ("csv", 1_700_000_000, True),
        ("burstgpt", 1_700_000_000, True),
        ("jsonl", 1_700_000_000, True),
        ("bailian", 1_700_000_000, True),
        ("csv", 1_700_000_000_000, False),
        ("jsonl", 1_700_000_000_000_000, False),
        ("bailian", 1_700_000_000_000, False),
        ("mooncake", 1_700_000_000, False),
    ):
        yield Case(AREA, f"{format}, arrivals from {start}", partial(_epoch_case, format, start, right))
    for name, run in _mixed_up():
        yield Case(AREA, name, run)
    for name, text, held in _conversations():
        yield Case(AREA, f"sharegpt, {name}", partial(_sharegpt_case, text, held))
    for name, good in (("b", True), ("ä", True), ('"b,c"', True), ("", False), (" b", False), ("\x07", False)):
        yield Case(AREA, f"class {name!r}", partial(_classes_case, name, good))
    for arguments, requests in COMMANDS:
        yield Case(AREA, f"qllm trace {' '.join(arguments)}", partial(_command_case, arguments, requests))
    for given in _recipes():
        yield Case(AREA, f"generate{given!r:.80}", partial(_recipe_case, *given))
