"""Bounds, tenants and tags of requests: read, written, and kept by whatever makes one trace of another."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.scheduler import Request
from qllm.traces.prefixes import Prefixes
from qllm.traces.requests import generate, lengths, readers
from qllm.traces.requests.generate import assign_arrivals, assign_classes
from qllm.traces.requests.readers import detect_format, read_requests
from qllm.traces.requests.trace import RequestTrace, TraceError, TraceWarning
from qllm.traces.requests.writers import write_requests
from qllm.traces.sessions import Sessions
from qllm.traces.wants import MOST_TAGS, MOST_TEXT, WANTS

OWN = "arrival_s,prompt_tokens,output_tokens"


def is_printable(text: str) -> bool:
    return text.isprintable() and text == text.strip()


texts = st.text(min_size=1, max_size=12).filter(is_printable)
values = texts.map(lambda text: text.replace(";", "").strip()).filter(bool)
tag_names = values.map(lambda text: text.replace("=", "").strip()).filter(bool)
bounds = st.just(math.inf) | st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False)


@st.composite
def traces(draw: st.DrawFn, least: int = 1) -> RequestTrace:
    """Any of the columns may be there, and say nothing of some requests."""
    n = draw(st.integers(least, 12))

    def column(of: st.SearchStrategy) -> list | None:
        return draw(st.none() | st.lists(of, min_size=n, max_size=n))

    wants = {name: column(bounds) for name in ("max_ttft_s", "max_tpot_s")}
    wants = {name: None if found is None else np.array(found) for name, found in wants.items()}
    wants |= {"tenants": column(st.just("") | texts), "tags": column(st.dictionaries(tag_names, values, max_size=3))}
    arrival = np.sort(draw(st.lists(st.floats(0, 1e6), min_size=n, max_size=n)))
    arrival[-1] += 1  # not all at one instant
    classes = np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))
    # Every request has another prompt: that says which one it is.
    follows = [draw(st.integers(-1, i - 1)) for i in range(n)]
    think_s = draw(st.lists(st.floats(0, 1e6), min_size=n, max_size=n))
    said = draw(st.sampled_from([None, Sessions(np.array(follows), np.array(think_s))]))
    return RequestTrace(arrival, np.arange(n) + 1, np.full(n, 2), classes, ("ls", "be"), sessions=said, **wants)


def full(n: int = 6) -> RequestTrace:
    return RequestTrace(
        np.arange(n) // 2 * 1.0,
        np.arange(n) + 1,
        np.full(n, 2),
        np.arange(n) % 2,
        ("ls", "be"),
        max_ttft_s=np.arange(n) + 0.5,
        max_tpot_s=np.where(np.arange(n) % 2, 0.1, math.inf),
        tenants=tuple("abc"[i % 3] for i in range(n)),
        tags=tuple({"lane": str(i)} for i in range(n)),
        prefixes=Prefixes(np.arange(n), np.ones(n), 2),
        sessions=Sessions(np.maximum(np.arange(n) - 2, -1), np.arange(n) / 7),
    )


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@settings(max_examples=150, deadline=None)
@given(trace=traces())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, suffix: str, trace: RequestTrace) -> None:
    path = tmp_path_factory.getbasetemp() / f"wants.{suffix}"
    write_requests(trace, path)
    again = read_requests(path)
    assert again == trace
    for name in fields(trace):
        if name.name != "source":
            mine, read = getattr(trace, name.name), getattr(again, name.name)
            assert (mine is None) == (read is None)
            assert mine is None or (mine == read if name.name == "sessions" else list(mine) == list(read)), name.name


def test_both_formats_as_people_write_them(tmp_path) -> None:
    csv = f"{OWN},tenant,max_ttft_s,tags,max_tpot_s\n2,3,1,,,,\n1,2,1,a,0.5,lane=batch;region=eu,5e-2\n"
    jsonl = (
        '{"arrival_s": 2, "prompt_tokens": 3, "output_tokens": 1, "tenant": null, "tags": {}}\n'
        '{"arrival_s": 1, "prompt_tokens": 2, "output_tokens": 1, "tenant": "a", "max_ttft_s": 0.5, "max_tpot_s": 0.05,'
        ' "tags": {"lane": "batch", "region": "eu"}}\n'
    )
    for name, text in (("t.csv", csv), ("t.jsonl", jsonl)):
        path = tmp_path / name
        path.write_text(text)
        assert detect_format(path) == name.partition(".")[2]
        trace = read_requests(path)
        assert trace.max_ttft_s is not None
        assert trace.max_tpot_s is not None
        assert (trace.max_ttft_s.tolist(), trace.max_tpot_s.tolist()) == ([0.5, math.inf], [0.05, math.inf])
        assert trace.tenants == ("a", "")
        assert trace.tags == ({"lane": "batch", "region": "eu"}, {})
        assert trace.wants(0) == {"max_ttft_s": 0.5, "max_tpot_s": 0.05, "tenant": "a", "tags": trace.tags[0]}


BAD_BOUND = ["0", "-1", "nan", "inf", "1e400", "1e-400", "x", " ", "0x1"]
BAD_TENANT = ["a\x07b", " a", "a ", " ", "a" * (MOST_TEXT + 1)]
BAD_TAGS = ["lane", "=a", "lane=", "a=b;", ";", "a=b;a=c", "a =b", "a= b", "a=b; c=d", "a=" + "b" * (MOST_TEXT + 1)]
BAD_TAGS += [";".join(f"t{i}=x" for i in range(MOST_TAGS + 1))]
BAD_CELLS = [("max_ttft_s", cell) for cell in BAD_BOUND] + [("max_tpot_s", cell) for cell in BAD_BOUND]
BAD_CELLS += [("tenant", cell) for cell in BAD_TENANT] + [("tags", cell) for cell in BAD_TAGS]
BAD_VALUES = [(name, value) for name in ("max_ttft_s", "max_tpot_s") for value in (0, -1, True, "1", [], {}, math.nan)]
BAD_VALUES += [("tenant", value) for value in (0, 7, True, [], {}, *BAD_TENANT)]
BAD_VALUES += [("tags", value) for value in ("lane=a", [], 0, {"a": 1}, {"a": ""}, {"": "a"}, {"a=": "b"}, {"a": "b;"})]


@pytest.mark.parametrize(("column", "cell"), BAD_CELLS)
def test_a_cell_that_is_refused(tmp_path, column: str, cell: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{OWN},{column}\n0,1,1,\n0,2,1,{cell}\n0,3,1,\n")
    with pytest.raises(TraceError, match=rf"t\.csv, line 3: {column} is .*, must be .*, or empty"):
        read_requests(path)
    with pytest.warns(TraceWarning, match=rf"1 invalid rows left out; the first: line 3: {column} is"):
        assert read_requests(path, skip_invalid=True).prompt_tokens.tolist() == [1, 3]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_a_value_that_is_refused(tmp_path, key: str, value: object) -> None:
    path = tmp_path / "t.jsonl"
    row = {"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}
    path.write_text("".join(f"{json.dumps(one)}\n" for one in (row, {**row, key: value})))
    with pytest.raises(TraceError, match=rf"t\.jsonl, line 2: (is no JSON|{key} is .*, must be .*, or null)"):
        read_requests(path)
    with pytest.warns(TraceWarning, match="1 invalid rows left out; the first: line 2: "):
        left = read_requests(path, skip_invalid=True)
    assert len(left) == 1
    assert not left.has_wants


@pytest.mark.parametrize("column", ["tenant", "class", "max_ttft_s"])
def test_a_column_that_stands_twice(tmp_path, column: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{OWN},{column},{column}\n0,1,1,1,1\n")
    with pytest.raises(TraceError, match=f"column '{column}' stands twice"):
        read_requests(path)


def test_columns_that_a_trace_refuses() -> None:
    two = np.array([1, 1])

    def trace(**wants: object) -> RequestTrace:
        return RequestTrace(np.zeros(2), two, two, 0 * two, **wants)  # type: ignore[arg-type]

    for wants, message in (
        ({"tenants": ("a", "b\n")}, "tenants: request 1 has 'b.n', must be printable text of up to 256"),
        ({"tenants": ("a", 3)}, "tenants: request 1 has 3"),
        ({"tenants": "ab"}, "tenants: has 2 elements"),
        ({"tags": ({},)}, "tags: has 1 elements, arrival has 2"),
        ({"tags": ({}, {"a": 1})}, "tags: request 1 has {'a': 1}, must be up to 32 names"),
        ({"tags": ([], {})}, "tags: request 0 has"),
        ({"max_ttft_s": [1.0, math.nan]}, "max_ttft_s: must hold 2 numbers > 0"),
    ):
        with pytest.raises(TraceError, match=message):
            trace(**wants)
    nothing = trace(max_ttft_s=[math.inf] * 2, max_tpot_s=[math.inf] * 2, tenants=("", ""), tags=({}, {}))
    assert nothing == trace()
    assert not nothing.has_wants
    assert nothing.wanted() == {}


def test_tags_are_those_of_the_trace() -> None:
    mine = {"lane": "a"}
    trace = RequestTrace(np.zeros(2), np.ones(2, int), np.ones(2, int), np.zeros(2, int), tags=(mine, mine))
    mine["lane"] = "b"
    assert trace.wants(1)["tags"] == {"lane": "a"}
    with pytest.raises(TypeError):
        trace.wants(1)["tags"]["lane"] = "c"


# ---- whatever makes one trace of another ----------------------------------------------------------------------------

MAKERS: dict[str, Callable[[RequestTrace], RequestTrace]] = {
    "scaled": lambda trace: trace.scaled(2.0),
    "at_rate": lambda trace: trace.at_rate(3.0),
    "spread": lambda trace: trace.spread(),
    "head": lambda trace: trace.head(len(trace) - 1),
    "assign_classes": lambda trace: assign_classes(trace, {"x": 0.5, "y": None}, seed=1),
    "assign_arrivals": lambda trace: assign_arrivals(trace, rate=2.0, seed=1),
}
NEW = {"generate", "read_requests", "_trace", "_load_trace"}  # they make a trace of something else


def test_every_maker_is_put_to_the_test() -> None:
    found = set()
    for place in (RequestTrace, generate, readers, lengths):
        for name, function in inspect.getmembers(place, inspect.isfunction):
            if str(inspect.signature(function).return_annotation).strip("'\"") == "RequestTrace":
                found.add(name)
    assert found == {*MAKERS, *NEW}


def wants_of(trace: RequestTrace) -> dict[int, dict[str, object]]:
    """Of each request, by its prompt: what the scheduler hears of it, nothing left out where there is no column."""
    heard = (Request(i, 1, 1, **trace.wants(i)) for i in range(len(trace)))
    of_each = [{argument: getattr(r, argument) for argument in WANTS} for r in heard]
    return dict(zip(trace.prompt_tokens.tolist(), of_each, strict=True))


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=50, deadline=None)
@given(trace=traces(least=2))
def test_each_request_keeps_what_it_wants(name: str, trace: RequestTrace) -> None:
    made = MAKERS[name](trace)
    assert len(made) >= len(trace) - 1
    before, after = wants_of(trace), wants_of(made)
    assert all(before[prompt] == after[prompt] for prompt in after)


def test_no_column_is_forgotten() -> None:
    """One that is added to the trace shows up here: `full` has to have it, and a head be as long as asked."""
    trace = full()
    for one in fields(RequestTrace):
        if one.name not in ("classes", "source"):
            assert getattr(trace, one.name) is not None, one.name
            assert len(getattr(trace.head(4), one.name)) == 4, one.name
    others = {"arrival", "prompt_tokens", "output_tokens", "cls", "classes", "source", "sessions", "prefixes"}
    assert {*WANTS.values()} | others == {one.name for one in fields(RequestTrace)}


def test_two_traces_differ_by_any_column() -> None:
    trace = full()
    assert trace == full()
    for column, other in (
        ("max_ttft_s", np.full(6, 0.5)),
        ("max_tpot_s", None),
        ("tenants", tuple("aabbcc")),
        ("tags", None),
        ("prefixes", None),
        ("sessions", None),
        ("sessions", Sessions(np.maximum(np.arange(6) - 2, -1), np.zeros(6))),
    ):
        changed = {one.name: getattr(trace, one.name) for one in fields(trace)} | {column: other}
        assert RequestTrace(**changed) != trace, column


def test_a_trace_says_what_its_requests_want() -> None:
    told = full().describe()
    assert told["max_ttft_s"] == {"requests": 6, "min": 0.5, "p50": 3.0, "max": 5.5}
    assert told["max_tpot_s"]["requests"] == 3
    assert told["tenants"] == {"requests": 6, "tenants": 3}
    assert told["tags"] == {"lane": 6}
    json.dumps(told)
