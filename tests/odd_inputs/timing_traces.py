# ruff: noqa: RUF007
"""Odd timing traces: header keys missing, doubled, impossible, and points that are missing, doubled or no numbers."""

from __future__ import annotations

import gzip
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from qllm.traces.step_times.file_format import STEPS, Point, TimingError, TimingHeader, TimingWarning, render
from qllm.traces.step_times.testing import affine_timings
from qllm.traces.step_times.timings import Timings
from tests.odd_inputs.cases import ACCEPTED, Case, both, command, expect, refused_by_command, tried

AREA = "timing traces"
PLAIN = affine_timings(layers=4, experts=8, top_k=2, hidden=64, tokens=64, context=128, launch=(1e-6, 1e-9))
TEXT = render(PLAIN, list(PLAIN.points))
ODD: list[Any] = [
    *(None, "", "x", True, -1, 0, 1, 2.5, math.nan, math.inf, -math.inf, 10**30, 10**400, 1e308, [], [1], {}, {"a": 1}),
    *("[red]x[/red]", "日本語", "x" * 3000),
]


def load(text: str | bytes, *names: str) -> Timings | str:
    """REFUSED, or the timing trace that the file is."""
    Path("t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("ignore", TimingWarning)
        found: Timings | str = tried(lambda: Timings.load("t.csv"), TimingError, *names)
    if isinstance(found, Timings):
        _usable(found)
    return found


def _usable(timings: Timings) -> None:
    """Raise Fault unless each step gives finite seconds that do not fall, and what it says of itself can be made."""
    for step in STEPS:
        more = [()] if not step.startswith("attention") else [(0,), (64,), (128,)]
        for context in more:
            seconds = [float(getattr(timings, step)(n, *context)) for n in (0, 1, 2, 33, 64)]
            expect(all(math.isfinite(one) for one in seconds), f"{step} takes {seconds}")
            expect(all(a <= b for a, b in zip(seconds, seconds[1:], strict=False)), f"{step} falls: {seconds}")
    timings.describe()


def same(timings: Timings) -> None:
    """Raise Fault unless every point is as in the plain trace."""
    for point in PLAIN.points:
        at = (point.tokens,) if point.context is None else (point.tokens, point.context)
        found = float(getattr(timings, point.step)(*at))
        expect(math.isclose(found, point.seconds, rel_tol=1e-5), f"{point.step}{at} takes {found}, not {point.seconds}")


def is_refused(text: str | bytes, *names: str) -> str:
    found = load(text, *names)
    expect(isinstance(found, str), "accepted")
    return str(found)


def is_same(text: str | bytes) -> str:
    found = load(text)
    expect(isinstance(found, Timings), f"refused, and it says what the plain file says: {found}")
    same(found)  # type: ignore[arg-type]
    return ACCEPTED


# ---- the header -----------------------------------------------------------------------------------------------------


def _key_case(key: str, value: Any) -> str:
    """A header key with an odd value."""
    line = yaml.safe_dump({key: value}, width=10**6, allow_unicode=True).splitlines()
    odd = "".join(f"# {part}\n" for part in line)
    text = _without(key).replace("# points", odd + "# points", 1)
    found = load(text, key)
    if isinstance(found, str):
        return found
    kind = {f.name: str(f.type) for f in fields(TimingHeader)}[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind.startswith(("int", "float")) and value is not None:
        expect(number and math.isfinite(value) and value >= 0, f"accepted {key}: {value!r}")
        both(key, float(value), float(getattr(found, key)))
        both(key, int(value) if kind.startswith("int") else float(value), getattr(found, key))
    elif kind == "str":
        both(key, str(value), getattr(found, key))
    same(found)
    return ACCEPTED


def _without(key: str) -> str:
    """The plain file without a header key."""
    return re.sub(rf"^# {key}:.*\n(#  .*\n)*", "", TEXT, flags=re.MULTILINE)


def _headers() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for f in fields(TimingHeader):
        if f.default is MISSING and f.default_factory is MISSING:
            yield f"no {f.name}", _without(f.name), (f.name,)
            yield f"{f.name} twice", re.sub(rf"(# {f.name}:.*\n)", r"\1\1", TEXT), (f.name,)
            yield (
                f"{f.name} in capitals",
                TEXT.replace(f"# {f.name}:", f"# {f.name.upper()}:"),
                (f.name.upper(), f.name),
            )
    for key, value in (
        ("format", "qllm-timings 2"),
        ("format", "null"),
        ("points", "5"),
        ("points", "-1"),
        ("points", "true"),
        ("points", "18.0"),
        ("points", ".nan"),
        ("points", "many"),
        ("top_k", "9"),
        ("experts", "100000000"),
        ("layers", "100000000"),
        ("source", "guessed"),
        ("expert_mode", "both"),
        ("layers", "4 # four\n# layers: 5"),
        ("layers", "&a [*a]"),
        ("layers", "2026-02-31"),
        ("layers", "{"),
        ("layers", "010"),
        ("layers", "!!python/name:os.system"),
        ("host_s", "0.5\n# engine_loop_s: 0.6"),
        ("wake_s", "0.0\n# least_s: {nothing: [1, 2]}"),
        ("wake_s", "0.0\n# least_s: {expert: [1]}"),
        ("wake_s", "0.0\n# least_s: {expert: [.nan, 1]}"),
        ("wake_s", "0.0\n# least_s: [1, 2]"),
        ("wake_s", "0.0\n# more: 5"),
    ):
        names = (key, "layers", "engine", "least_s", "more", "row", "header")
        yield f"{key}: {value!r}", re.sub(rf"# {key}:.*", lambda _, k=key, v=value: f"# {k}: {v}", TEXT), names


# ---- the points -----------------------------------------------------------------------------------------------------

TABLE = TEXT[TEXT.index("step,") :].splitlines(keepends=True)
HEADER = TEXT[: TEXT.index("step,")]


def with_rows(rows: list[str]) -> str:
    """The plain header over these rows, their number told rightly."""
    return re.sub(r"# points: \d+", f"# points: {len(rows)}", HEADER) + TABLE[0] + "".join(rows)


def _tables() -> Iterator[tuple[str, str | bytes, tuple[str, ...] | None]]:
    """Name, content, and what the refusal names; None: it says what the plain file says."""
    rows = TABLE[1:]
    yield "as it is", TEXT, None
    yield "CRLF", TEXT.replace("\n", "\r\n"), None
    yield "unsorted rows", with_rows(rows[::-1]), None
    yield "no line end", TEXT.rstrip("\n"), None
    yield "blanks around cells", with_rows([row.replace(",", " , ") for row in rows]), None
    yield "quoted cells", with_rows([re.sub(r"[^,\n]+", r'"\g<0>"', row) for row in rows]), None
    yield "a byte order mark", b"\xef\xbb\xbf" + TEXT.encode(), ("t.csv",)
    yield "UTF-16", TEXT.encode("utf-16"), ("t.csv",)
    yield "gzip", gzip.compress(TEXT.encode()), ("t.csv",)
    yield "nothing", "", ("t.csv",)
    yield "the header alone", HEADER, ("t.csv",)
    yield "the table alone", "".join(TABLE), ("t.csv",)
    yield "no rows", with_rows([]), ("t.csv",)
    yield "a blank line", TEXT + "\n", ("row",)
    yield "NUL bytes", TEXT + "\0\n", ("row", "t.csv")
    yield "a comment between", TEXT.replace(rows[3], "# x\n" + rows[3]), ("row",)
    yield "a cut last row", TEXT[: TEXT.rindex(",")], ("row",)
    yield "rows cut off", HEADER + "".join(TABLE[:-2]), ("t.csv",)
    yield "semicolons", HEADER + "".join(TABLE).replace(",", ";"), ("row", "columns")
    yield "tabs", HEADER + "".join(TABLE).replace(",", "\t"), ("row", "columns")
    yield "an open quote", with_rows([*rows[:-1], f'"{rows[-1]}']), ("row", "t.csv")
    yield (
        "columns in another order",
        HEADER + TABLE[0].replace("step,tokens", "tokens,step") + "".join(rows),
        ("columns",),
    )
    yield "a column twice", HEADER + TABLE[0].replace("context", "tokens") + "".join(rows), ("columns",)
    yield "a column more", HEADER + TABLE[0].replace("\n", ",x\n") + "".join(rows), ("columns",)
    for i, row in enumerate(rows):
        step = row.split(",")[0]
        yield f"without {row.rsplit(',', 4)[0]}", with_rows(rows[:i] + rows[i + 1 :]), (step,)
        yield f"{row.rsplit(',', 4)[0]} twice", with_rows([*rows, row]), ("row",)
    for column, bad in (
        (0, ["", "Expert", "experts", "head "[:3], "日本"]),
        (1, ["", "0", "-1", "1.5", "nan", "1e3", "x", "9" * 25]),
        (2, ["", "-1", "1.5", "nan", "x", "9" * 25]),
        (3, ["", "-1e-6", "nan", "inf", "x", "1e400", "1,5", "5 us"]),
        (4, ["-1", "nan", "inf", "x"]),
        (5, ["0", "-1", "1.5", "x"]),
        (6, ["", "guessed", "Measured"]),
    ):
        for text in bad:
            parts = rows[4].rstrip("\n").split(",")
            parts[column] = f'"{text}"' if "," in text else text
            odd = [*rows[:4], ",".join(parts) + "\n", *rows[5:]]
            yield f"{TABLE[0].split(',')[column].strip()} {text[:30]!r}", with_rows(odd), ("row", "grid")
    yield "a context where none is", with_rows([rows[0].replace(",,", ",0,", 1), *rows[1:]]), ("row",)


def _table_case(text: str | bytes, names: tuple[str, ...] | None) -> str:
    return is_same(text) if names is None else is_refused(text, *names)


# ---- plausible or not -----------------------------------------------------------------------------------------------


def _scale_case(step: str, factor: float) -> str:
    """A step of a real GPU's trace that takes so many times as long: the load has to say so."""
    real = Timings.load("a100-mixtral-8x7b-int4")
    points = [p._replace(seconds=p.seconds * factor) if step in (p.step, "all") else p for p in real.points]
    header = {f.name: getattr(real, f.name) for f in fields(TimingHeader)}
    Timings(points=tuple(points), **header).save("t.csv")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = Timings.load("t.csv")
    expect(bool(told), f"{step} takes {factor:g} times as long, and nothing is said of it")
    text = " ".join(str(one.message) for one in told)
    expect(step in text or step == "all", f"{step} is not named: {text[:300]}")
    both("what describe says", [str(one.message).split(": ", 1)[1] for one in told], loaded.describe()["implausible"])
    return ACCEPTED


def _object_case(change: dict[str, Any]) -> str:
    """The same checks where a trace is made in Python."""
    header = {f.name: getattr(PLAIN, f.name) for f in fields(TimingHeader)}
    found = tried(lambda: Timings(**{**header, "points": PLAIN.points, **change}), TimingError)
    if isinstance(found, Timings):
        _usable(found)
        return ACCEPTED
    return str(found)


def _commands() -> Iterator[tuple[tuple[str, ...], bool]]:
    """`qllm timings ...`, and whether it is right."""
    for name in ("missing.csv", "folder", "/dev/null", "a100", "", "..", "r.csv", "closed.csv", "pipe.csv"):
        yield ("describe", name), False
    yield ("describe", "t.csv"), True
    yield ("describe", "t.csv", "--json"), True
    yield ("describe",), True
    base = ("import", "o.csv", "--source", "folder")
    for model in ("nonsense", "", "[", "{}", "{layers: 5}", "{name: x, layers: many}", "&a {name: *a}", "5", "null"):
        yield (*base, "--model", model), False
    for more in (
        ("--launch-s", "-1"),
        ("--launch-s", "nan"),
        ("--host-s", "x"),
        ("--gpu", "h9000"),
        ("--moe", "a:b:c:d"),
    ):
        yield (*base, "--model", "mixtral-8x7b", *more), False
    yield ("import", "o.csv", "--model", "mixtral-8x7b", "--source", "missing"), False
    yield ("import", "o.csv", "--model", "mixtral-8x7b", "--source", "t.csv"), False
    yield ("import",), False


def _command_case(arguments: tuple[str, ...], right: bool) -> str:
    import os

    Path("t.csv").write_text(TEXT)
    Path("r.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n")
    Path("folder").mkdir()
    Path("closed.csv").touch(0)
    os.mkfifo("pipe.csv")
    ended = command("timings", *arguments)
    if not right:
        return refused_by_command(ended)
    expect(ended.code == 0, f"exit code {ended.code}: {ended.err[-300:]}")
    return ACCEPTED


def cases() -> Iterator[Case]:
    """All of them."""
    for f in fields(TimingHeader):
        for value in ODD:
            yield Case(AREA, f"{f.name}: {value!r:.40}", partial(_key_case, f.name, value))
    for name, text, names in _headers():
        yield Case(AREA, name, partial(is_refused, text, *names))
    for name, content, wanted in _tables():
        yield Case(AREA, name, partial(_table_case, content, wanted))
    for step in (*STEPS, "all"):
        for factor in (1e-3, 1e3, 1e6):
            yield Case(AREA, f"{step} times {factor:g}", partial(_scale_case, step, factor))
    for change in (
        *({"points": value} for value in ((), PLAIN.points[1:], list(PLAIN.points))),
        {"points": (*PLAIN.points, Point("expert", 32, None, math.nan))},
        {"points": (*PLAIN.points, Point("expert", 32, 0, 1.0))},
        *({"layers": value} for value in (None, "x", 0, -1, math.nan, 2.5, True)),
    ):
        yield Case(AREA, f"Timings({change!r:.60})", partial(_object_case, change))
    for arguments, right in _commands():
        yield Case(AREA, f"qllm timings {' '.join(arguments)}", partial(_command_case, arguments, right))
