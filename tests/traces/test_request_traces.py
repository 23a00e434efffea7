import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.traces.requests.readers import detect_format, read_requests
from qllm.traces.requests.trace import RequestTrace, TraceError, TraceWarning
from qllm.traces.requests.writers import write_requests

AZURE = Path(__file__).parents[2] / "../shared/data/traces/AzureLLMInferenceTrace_conv.csv"
AZURE_TEXT = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:15:46.6805900,374,44\r
2023-11-16 18:15:50.9951690,396,109\r
2023-11-16 18:15:48.0000000,879,55\r
"""
BURST_TEXT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,230,1317,API log
"""
MOONCAKE_TEXT = """{"timestamp": 1000, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 3500, "input_length": 7319, "output_length": 490, "hash_ids": [0]}
"""
SHAREGPT = [
    {
        "id": "a",
        "conversations": [{"from": "human", "value": "one two three"}, {"from": "gpt", "value": "four five"}],
    },
    {
        "id": "b",
        "conversations": [
            {"from": "human", "value": "one"},
            {"from": "gpt", "value": "two three four five"},
            {"from": "human", "value": "six"},
        ],
    },
]


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text.encode())
    return path


def columns(trace):
    return trace.arrival.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist()


@pytest.mark.parametrize(
    ("format", "text", "expected"),
    [
        ("azure", AZURE_TEXT, ([0.0, 1.31941, 4.314579], [374, 879, 396], [44, 55, 109])),
        ("burstgpt", BURST_TEXT, ([0.0, 40.5], [472, 1087], [18, 230])),
        ("mooncake", MOONCAKE_TEXT, ([0.0, 2.5], [6755, 7319], [500, 490])),
        ("csv", "arrival_s,prompt_tokens,output_tokens\n2.5,3,4\n1,1,2\n", ([1.0, 2.5], [1, 3], [2, 4])),
        ("jsonl", '{"output_tokens": 2, "prompt_tokens": 1, "arrival_s": 1.5}\n', ([1.5], [1], [2])),
        ("sharegpt", '[{"prompt_tokens": 3, "output_tokens": 4}]', ([0.0], [3], [4])),
    ],
)
def test_format_is_found_and_read_sorted_by_arrival(tmp_path, format, text, expected):
    path = write(tmp_path, "trace", text)
    assert detect_format(path) == format
    trace = read_requests(path)
    assert columns(trace) == expected
    assert trace.classes == ("all",)
    assert read_requests(path, format) == trace


def test_sharegpt_takes_the_first_two_turns_and_has_no_arrivals(tmp_path):
    trace = read_requests(write(tmp_path, "s.json", json.dumps(SHAREGPT)), tokenizer=str.split)
    assert columns(trace) == ([0, 0], [3, 1], [2, 4])
    assert trace.rate is None
    with pytest.raises(TraceError, match="no arrival times"):
        trace.at_rate(2.0)


def test_azure_dates_of_2024_carry_their_zone(tmp_path):
    text = AZURE_TEXT.replace("0,3", "0+00:00,3")
    assert text != AZURE_TEXT
    assert read_requests(write(tmp_path, "a.csv", text)).arrival[0] == 0.0


BROKEN = [
    (AZURE_TEXT.replace("109", "abc"), "line 3: GeneratedTokens is 'abc', must be an integer >= 1"),
    (AZURE_TEXT.replace("109", "0"), "line 3: GeneratedTokens is '0', must be an integer >= 1"),
    (AZURE_TEXT.replace("396", "-1"), "line 3: ContextTokens is '-1', must be an integer >= 1"),
    (AZURE_TEXT.replace("2023-11-16 18:15:50.9951690", "yesterday"), "line 3: TIMESTAMP is 'yesterday', must be"),
    (AZURE_TEXT.replace(",109", ""), "line 3: has 2 cells, must have 3"),
    (AZURE_TEXT.replace("109", "9" * 30), "line 3: GeneratedTokens is '999"),
    (BURST_TEXT.replace("45.5", "nan"), "line 3: Timestamp is 'nan', must be a number >= 0"),
    (BURST_TEXT.replace("Log Type\n", "Log Type\n\n").replace(",230", ",x"), "line 4: Response tokens is 'x'"),
    (MOONCAKE_TEXT.replace("7319", "0"), "line 2: input_length is 0, must be an integer >= 1"),
    (MOONCAKE_TEXT.replace("7319", "true"), "line 2: input_length is true, must be an integer >= 1"),
    (MOONCAKE_TEXT.replace("490,", "490"), "line 2: is no JSON object"),
    (MOONCAKE_TEXT + "[1]\n", "line 3: is .1., must be an object"),
    (json.dumps([SHAREGPT[0], {"id": "x"}]), "entry 1: has no prompt_tokens"),
    ("# c\narrival_s,prompt_tokens,output_tokens,class\n1,1,1,\n", "line 3: class '': a class name is"),
    (
        '# classes: ["a"]\narrival_s,prompt_tokens,output_tokens,class\n1,1,1,b\n',
        "line 3: class is 'b', must be one of a",
    ),
    ('# classes: "a"\narrival_s,prompt_tokens,output_tokens,class\n1,1,1,b\n', "line 1: classes must be a JSON list"),
    ("arrival_s,prompt_tokens,output_tokens,user\n1,1,1,x\n", "unknown column 'user'; allowed: arrival_s"),
    ("arrival_s,prompt_tokens,output_tokens\n", "holds no request"),
    ('{"arrival_s": 1, "prompt_tokens": 1, "output_tokens": 1, "priority": 1}', "line 1: unknown key 'priority'"),
    ("a,b\n1,2\n", "line 1: 'a,b' has the columns of no known format: csv"),
    ("", "is empty"),
    ("{bad", "line 1: is no JSON object"),
    ("[1,", "is no JSON"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_broken_row_names_file_and_line(tmp_path, text, message):
    with pytest.raises(TraceError, match=f"broken.txt.*{message}"):
        read_requests(write(tmp_path, "broken.txt", text))


def test_missing_file_unknown_format_and_stray_tokenizer_are_told(tmp_path):
    path = write(tmp_path, "a.csv", AZURE_TEXT)
    with pytest.raises(TraceError, match=r"none.csv: cannot be read"):
        read_requests(tmp_path / "none.csv")
    with pytest.raises(TraceError, match="must be one of csv, azure"):
        read_requests(path, "excel")
    with pytest.raises(TraceError, match="only for format sharegpt"):
        read_requests(path, tokenizer=str.split)
    with pytest.raises(TraceError, match="column 'Timestamp' is missing"):
        read_requests(path, "burstgpt")
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    with pytest.raises(TraceError, match="no UTF-8"):
        read_requests(tmp_path / "latin")


def test_skip_invalid_leaves_rows_out_and_reports_how_many(tmp_path):
    failed = BURST_TEXT + "50,GPT-4,7,0,7,API log\n51,GPT-4,8\n52,GPT-4,9,1,10,API log\n"
    with pytest.warns(TraceWarning, match=r"2 invalid rows left out; the first: line 5: has 3 cells"):
        trace = read_requests(write(tmp_path, "b.csv", failed), skip_invalid=True)
    assert trace.prompt_tokens.tolist() == [472, 1087, 9]
    turned = [*SHAREGPT, {"id": "c", "conversations": SHAREGPT[0]["conversations"][1:]}]
    with pytest.warns(TraceWarning, match="1 invalid rows left out; the first: entry 3: conversations begins with"):
        assert (
            len(read_requests(write(tmp_path, "s.json", json.dumps(turned)), skip_invalid=True, tokenizer=str.split))
            == 2
        )


names = st.text(min_size=1, max_size=8).filter(lambda s: s.isprintable() and s == s.strip())
tokens = st.integers(1, 2**62)


@st.composite
def traces(draw):
    classes = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    rows = draw(
        st.lists(
            st.tuples(st.floats(0, 1e9), tokens, tokens, st.integers(0, len(classes) - 1)), min_size=1, max_size=20
        )
    )
    arrival, prompt, output, cls = (np.array(column) for column in zip(*sorted(rows), strict=True))
    return RequestTrace(arrival, prompt, output, cls, tuple(classes))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@settings(max_examples=100, deadline=None)
@given(trace=traces())
def test_round_trip_is_exact(tmp_path_factory, suffix, trace):
    path = tmp_path_factory.getbasetemp() / f"round.{suffix}"
    write_requests(trace, path)
    again = read_requests(path)
    assert again == trace
    assert again.arrival.tobytes() == trace.arrival.tobytes()


def test_writer_keeps_the_comment_and_refuses_what_it_cannot_write(tmp_path):
    trace = RequestTrace(np.array([0.5]), np.array([1]), np.array([2]), np.array([0]), ("ls", "be"))
    write_requests(trace, tmp_path / "t.csv", comment="Source: nowhere\nLicence: none")
    assert (tmp_path / "t.csv").read_text().startswith("# Source: nowhere\n# Licence: none\n# classes:")
    assert read_requests(tmp_path / "t.csv") == trace
    with pytest.raises(TraceError, match=r"written as .csv or .jsonl"):
        write_requests(trace, tmp_path / "t.parquet")
    with pytest.raises(TraceError, match="holds no comment"):
        write_requests(trace, tmp_path / "t.jsonl", comment="x")
    with pytest.raises(TraceError, match="cannot be written"):
        write_requests(trace, tmp_path / "none" / "t.csv")
    with pytest.raises(TraceError, match="without requests"):
        write_requests(trace.head(0), tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival": [1.0, 0.0]}, "sorted"),
        ({"arrival": [-1.0, 0.0]}, ">= 0"),
        ({"arrival": [0.0, np.nan]}, "finite"),
        ({"prompt_tokens": [1, 0]}, "prompt_tokens: request 1 has 0, must be >= 1"),
        ({"output_tokens": [1, 2, 3]}, "output_tokens: has 3 elements, arrival has 2"),
        ({"output_tokens": [1.5, 2.0]}, "of type int64, not float64"),
        ({"cls": [0, 2]}, "cls: request 1 has 2, must be 0 to 1"),
        ({"classes": ("a", "a")}, "each named once"),
        ({"classes": ("a", " b")}, "class ' b'"),
        ({"classes": "ab"}, "must be a list of names"),
    ],
)
def test_a_trace_checks_its_columns(change, message):
    good = {
        "arrival": [0.0, 1.0],
        "prompt_tokens": [1, 2],
        "output_tokens": [1, 2],
        "cls": [0, 1],
        "classes": ("a", "b"),
    }
    RequestTrace(**good)
    with pytest.raises(TraceError, match=message):
        RequestTrace(**{**good, **change})


def test_scaling_describe_and_head():
    trace = RequestTrace(
        np.array([0.0, 2.0, 4.0]), np.array([1, 2, 3]), np.array([4, 5, 6]), np.array([0, 0, 1]), ("a", "b")
    )
    assert trace.rate == 0.5
    assert trace.scaled(2.0).arrival.tolist() == [0.0, 1.0, 2.0]
    assert trace.at_rate(2.0).rate == 2.0
    assert len(trace.head(2)) == 2
    described = trace.describe()
    assert (described["requests"], described["duration_s"], described["arrival_cv"]) == (3, 4.0, 0.0)
    assert described["prompt_tokens"]["mean"] == 2.0
    assert described["classes"]["b"]["output_tokens"]["max"] == 6
    assert described["classes"]["a"]["share"] == pytest.approx(2 / 3)
    json.dumps(described)
    with pytest.raises(TraceError, match="holds 3"):
        trace.head(4)
    for factor in (0, -1, float("nan"), float("inf")):
        with pytest.raises(TraceError, match="must be a number > 0"):
            trace.scaled(factor)
    with pytest.raises(ValueError, match="read-only"):
        trace.arrival[0] = 1.0


def test_request_traces_need_numpy_alone():
    modules = ", ".join(f"qllm.traces.requests.{name}" for name in ("readers", "writers", "generate"))
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert not {"pandas", "pyarrow", "scipy", "torch", "simpy", "yaml", "pydantic"} & set(loaded)


@pytest.mark.skipif(not AZURE.exists(), reason="the Azure trace is not here")
def test_the_azure_trace_is_read_whole():
    described = read_requests(AZURE).describe()
    assert described["requests"] == 19366
    assert described["prompt_tokens"]["mean"] == pytest.approx(1154.7, abs=0.1)
    assert described["output_tokens"]["mean"] == pytest.approx(211.1, abs=0.1)
    assert described["duration_s"] == pytest.approx(3501.722, abs=1e-3)
