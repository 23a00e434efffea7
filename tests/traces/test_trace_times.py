"""When the requests of a recorded trace arrive: units, dates, arrivals that coincide; counts written with a point."""

import json
import warnings
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.traces.requests.generate import generate
from qllm.traces.requests.readers import detect_format, read_requests
from qllm.traces.requests.trace import RequestTrace, TraceError

AZURE = Path(__file__).parents[2] / "../shared/data/traces/AzureLLMInferenceTrace_conv.csv"
BAILIAN = {"chat_id": 159, "parent_chat_id": -1, "type": "text", "turn": 2}


def jsonl(folder, *rows):
    path = folder / "trace.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def rows(*times, **more):
    return [{**more, "timestamp": time, "input_length": 521, "output_length": 132} for time in times]


def csv(folder, header, *lines):
    path = folder / "trace.csv"
    path.write_text("\n".join((header, *lines, "")))
    return path


def at(*arrivals):
    ones = np.ones(len(arrivals), dtype=int)
    return RequestTrace(np.array(arrivals, dtype=float), np.arange(len(arrivals)) + 1, ones, 0 * ones)


# Units


@pytest.mark.parametrize(("format", "unit"), [(None, None), ("bailian", None), (None, "s"), ("mooncake", "s")])
def test_bailian_has_mooncakes_keys_and_seconds(tmp_path, format, unit):
    path = jsonl(tmp_path, *rows(61.114, 63.614, **BAILIAN))
    assert detect_format(path) == "bailian"
    trace = read_requests(path, format, unit=unit)
    assert trace.arrival.tolist() == [0, 2.5]
    assert trace.source == {"format": format or "bailian", "time_unit": "s"}
    assert {**trace.describe(), **trace.source} == trace.describe()


def test_mooncake_has_milliseconds(tmp_path):
    trace = read_requests(jsonl(tmp_path, *rows(1000, 3500.0)))
    assert trace.arrival.tolist() == [0, 2.5]
    assert trace.source == {"format": "mooncake", "time_unit": "ms"}


WITHOUT_CHAT = {key: value for key, value in BAILIAN.items() if key != "chat_id"}


@pytest.mark.parametrize(
    ("given", "format", "line", "message"),
    [
        (rows(0, 61.114), None, 2, "timestamp is 61.114, Mooncake's are whole milliseconds"),
        (rows(61.114, 62.5, type="text"), None, 1, "timestamp is 61.114"),
        (rows(0, 61.114, **WITHOUT_CHAT), None, 1, "parent_chat_id is a key of Qwen-Bailian's"),
        (rows(0, 1000, turn=1), None, 1, "turn is a key of Qwen-Bailian's"),
        (rows(0, 1, **BAILIAN), "mooncake", 1, "chat_id is a key of Qwen-Bailian's"),
        (rows(0) + rows(61, **BAILIAN), None, 2, "chat_id is a key of Qwen-Bailian's"),
        (rows(0, **BAILIAN) + rows(61), None, 2, "has no chat_id, a key of Qwen-Bailian's"),
    ],
)
def test_where_the_unit_is_in_doubt_it_has_to_be_said(tmp_path, given, format, line, message):
    path = jsonl(tmp_path, *given)
    for skip_invalid in (False, True):
        with pytest.raises(
            TraceError, match=f"trace.jsonl, line {line}: {message}.*; say which by format .* or by unit"
        ):
            read_requests(path, format, skip_invalid=skip_invalid)
    times = [row["timestamp"] for row in given]
    for unit, per_second in (("s", 1), ("ms", 1000), ("us", 1e6)):
        span = read_requests(path, format, unit=unit).arrival[-1]
        assert span == pytest.approx((times[-1] - times[0]) / per_second, rel=1e-12)
    assert read_requests(path, "bailian").arrival[-1] == pytest.approx(times[-1] - times[0])


def test_mooncake_by_name_may_have_parts_of_milliseconds(tmp_path):
    assert read_requests(jsonl(tmp_path, *rows(0, 0.5)), "mooncake").arrival.tolist() == [0, 0.0005]


@pytest.mark.parametrize(
    ("time", "says"), [(1_700_000_000, r"1.7e\+06 s after"), (17 * 10**17, "beyond the year 5000"), (10**15, "beyond")]
)
def test_a_first_arrival_that_is_a_date_in_another_unit_needs_the_unit(tmp_path, time, says):
    path = jsonl(tmp_path, *rows(time, time + 3))
    with pytest.raises(
        TraceError, match=f"trace.jsonl: the arrivals begin at {time}: {says}.*say which by unit .s, ms"
    ):
        read_requests(path)
    assert read_requests(path, unit="s").arrival.tolist() == [0, 3]
    assert read_requests(path, unit="ns").arrival.tolist() == [0, 3e-9]


@pytest.mark.parametrize("time", [1_700_000_000_123, 17 * 10**14, 17 * 10**17])
@pytest.mark.parametrize("format", ["csv", "jsonl", "burstgpt", "bailian"])
def test_dates_in_seconds_are_of_these_millennia(tmp_path, format, time):
    path = one_row(tmp_path, format, time)
    with pytest.raises(TraceError, match=r"the arrivals begin at 17.* beyond the year 5000 if these are s"):
        read_requests(path)
    assert len(read_requests(path, unit="ns")) == 1


def one_row(folder, format, time):
    if format == "csv":
        return csv(folder, "arrival_s,prompt_tokens,output_tokens", f"{time},1,2")
    if format == "burstgpt":
        return csv(folder, "Timestamp,Request tokens,Response tokens", f"{time},1,2")
    if format == "bailian":
        return jsonl(folder, *rows(time, **BAILIAN))
    return jsonl(folder, {"arrival_s": time, "prompt_tokens": 1, "output_tokens": 2})


def test_a_unit_that_says_nothing_is_refused(tmp_path):
    azure = csv(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.6805900,374,44")
    with pytest.raises(TraceError, match="format azure has dates; leave unit out"):
        read_requests(azure, unit="ms")
    assert read_requests(azure).source == {"format": "azure", "time_unit": "dates"}
    (tmp_path / "s.json").write_text('[{"prompt_tokens": 3.0, "output_tokens": 4}]')
    with pytest.raises(TraceError, match="format sharegpt has no arrivals; leave unit out"):
        read_requests(tmp_path / "s.json", unit="s")
    with pytest.raises(TraceError, match="unit 'minutes': must be one of s, ms, us, ns"):
        read_requests(azure, unit="minutes")


def test_lengths_of_a_trace_need_no_unit(tmp_path):
    for trace in (rows(0, 61.114), rows(1_700_000_000, 1_700_000_003)):
        recipe = {"lengths": {"trace": str(jsonl(tmp_path, *trace))}}
        assert set(generate(recipe, rate=1.0, requests=3, seed=0).prompt_tokens) == {521}
    azure = csv(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.6805900,374,44")
    assert set(generate({"lengths": {"trace": str(azure)}}, rate=1.0, requests=3, seed=0).prompt_tokens) == {374}


# Dates


@pytest.mark.parametrize("format", ["csv", "jsonl", "burstgpt", "bailian"])
def test_seconds_since_1970_keep_their_nanoseconds(tmp_path, format):
    start, offsets = 1_700_000_000, ["0.000000001", "0.250000002", "86400.123456789"]
    times = [str(start + Decimal(offset)) for offset in offsets]
    paths = [one_row(tmp_path, format, time).read_text() for time in map(float, times)]
    text = "".join(page if i == 0 else page.splitlines()[-1] + "\n" for i, page in enumerate(paths))
    for time in times:
        text = text.replace(str(float(time)), time, 1)
    path = tmp_path / "dates"
    path.write_text(text)
    expected = [float(Decimal(offset) - Decimal(offsets[0])) for offset in offsets]
    assert read_requests(path).arrival.tolist() == expected == [0.0, 0.250000001, 86400.123456788]


@pytest.mark.parametrize(("unit", "digits"), [("ms", 3), ("us", 6), ("ns", 9)])
def test_dates_in_whole_parts_of_seconds_are_exact(tmp_path, unit, digits):
    start = 17 * 10 ** (8 + digits)
    path = jsonl(tmp_path, *rows(start + 1, start + 2, start + 10**digits))
    expected = [0.0, 10.0**-digits, 1 - 10.0**-digits]
    assert read_requests(path, unit=unit).arrival.tolist() == expected
    own = csv(tmp_path, "arrival_s,prompt_tokens,output_tokens", f"{start + 1},1,2", f"{start + 2},1,2")
    assert read_requests(own, unit=unit).arrival.tolist() == expected[:2]


def test_own_arrivals_that_are_no_dates_stay_as_they_are(tmp_path):
    header = "arrival_s,prompt_tokens,output_tokens"
    assert read_requests(csv(tmp_path, header, "1000000000,1,2", "1000000001.5,1,2")).arrival[0] == 1e9
    assert read_requests(csv(tmp_path, header, "1500,1,2", "2500,1,2"), unit="ms").arrival.tolist() == [1.5, 2.5]


@pytest.mark.parametrize("date", ["2023-11-16T18:15:47.500000001Z", " 2023-11-16 18:15:47.500000001+00:00"])
def test_dates_of_azure_are_exact(tmp_path, date):
    header = "TIMESTAMP,ContextTokens,GeneratedTokens"
    path = csv(tmp_path, header, f"{date},1,1", "2023-11-16 18:15:46,1,1")
    assert read_requests(path).arrival.tolist() == [0, 1.500000001]


@pytest.mark.parametrize(
    "date",
    [
        "1500-01-01 00:00:00",
        "2300-01-01 00:00:00",
        "2023-11-16 18:15:46+02:00",
        "2023-11-16 18:15:46.0000000001",
        "20231116181546000000",
        "1700000000.1234567890",
        "2023-02-30 00:00:00",
        "2023-11-16 18:15:60",
    ],
)
def test_other_dates_are_refused(tmp_path, date):
    path = csv(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens", f"{date},1,1")
    with pytest.raises(TraceError, match=r"line 2: TIMESTAMP is '.*', must be a date in UTC as 2023-11-16"):
        read_requests(path)


# Counts


@pytest.mark.parametrize(("text", "count"), [("1087.0", 1087), ("1.087e3", 1087), ("9007199254740993.0", 2**53 + 1)])
def test_counts_may_be_written_with_a_point(tmp_path, text, count):
    for header in ("Timestamp,Request tokens,Response tokens", "arrival_s,prompt_tokens,output_tokens"):
        trace = read_requests(csv(tmp_path, header, f"1,{text},7", f"2,3,{text}"))
        assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([count, 3], [7, count])
    azure = csv(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens", f"2023-11-16 18:15:46,{text},{text}")
    assert read_requests(azure).prompt_tokens.tolist() == [count]
    for keys in (("arrival_s", "prompt_tokens", "output_tokens"), ("timestamp", "input_length", "output_length")):
        line = f'{{"{keys[0]}": 1, "{keys[1]}": {text}, "{keys[2]}": {text}}}'
        assert read_requests(jsonl(tmp_path, line)).output_tokens.tolist() == [count]


@pytest.mark.parametrize("text", ["1087.5", "0.0", "0.5", "-3.0", "1e300", "1e999999", "1e-999999", "Infinity", "NaN"])
def test_what_is_no_whole_number_is_refused_with_row_and_key(tmp_path, text):
    path = csv(tmp_path, "Timestamp,Request tokens,Response tokens", "1,5,7", f"2,3,{text}")
    with pytest.raises(TraceError, match=f"trace.csv, line 3: Response tokens is '{text}', must be an integer >= 1"):
        read_requests(path)
    path = jsonl(tmp_path, *rows(0), f'{{"timestamp": 1, "input_length": {text}, "output_length": 5}}')
    with pytest.raises(TraceError, match=r"trace.jsonl, line 2: input_length is .*, must be an integer >= 1"):
        read_requests(path)


@pytest.mark.parametrize("text", ["1e400", "-1", "-0.5", "NaN", "sNaN", "Infinity", "1" + "0" * 400, "x", ""])
def test_what_is_no_time_is_refused_with_row_and_key(tmp_path, text):
    path = csv(tmp_path, "arrival_s,prompt_tokens,output_tokens", "1,5,7", f"{text},3,4")
    with pytest.raises(TraceError, match=f"trace.csv, line 3: arrival_s is '{text[:50]}.*', must be a number >= 0"):
        read_requests(path)
    path = jsonl(tmp_path, f'{{"arrival_s": {text}, "prompt_tokens": 1, "output_tokens": 1}}')
    with pytest.raises(TraceError, match=r"trace.jsonl, line 1: (arrival_s is .*, must be a number|is no JSON)"):
        read_requests(path)


def test_a_number_of_thousands_of_digits_is_refused_in_a_short_line(tmp_path):
    digits = "9" * 5000
    header = "Timestamp,Request tokens,Response tokens"
    for path in (
        csv(tmp_path, header, f"1,5,{digits}"),
        jsonl(tmp_path, f'{{"timestamp": {digits}, "input_length": 5, "output_length": 5}}'),
        jsonl(tmp_path, *rows(0), f'{{"timestamp": 0, "input_length": {digits}, "output_length": 5}}'),
    ):
        with pytest.raises(TraceError, match=r"line [12]: ") as caught:
            read_requests(path)
        assert len(str(caught.value)) < 400


def test_a_column_that_stands_twice_is_refused(tmp_path):
    path = csv(tmp_path, "arrival_s,prompt_tokens,output_tokens,prompt_tokens", "1,5,7,6")
    with pytest.raises(TraceError, match="column 'prompt_tokens' stands twice"):
        read_requests(path)
    path = jsonl(tmp_path, *rows(0), '{"timestamp": 1, "input_length": 5, "input_length": 50, "output_length": 5}')
    with pytest.raises(TraceError, match="line 2: is no JSON object: 'input_length' stands twice"):
        read_requests(path)


# Arrivals that coincide


def test_describe_counts_what_coincides():
    described = at(0, 0, 0, 3, 3, 5.5, 9, 9).describe()
    assert described["coinciding"] == {"requests": 7, "shared_instants": 3, "instants": 4, "gap_s": 2.5}
    assert at(0, 1, 3).describe()["coinciding"] == {"requests": 0, "shared_instants": 0, "instants": 3, "gap_s": 1.0}
    assert at(2, 2).describe()["coinciding"] == {"requests": 2, "shared_instants": 1, "instants": 1, "gap_s": None}
    assert at().describe()["coinciding"] == {"requests": 0, "shared_instants": 0, "instants": 0, "gap_s": None}


def test_spread_fills_the_gaps_evenly():
    assert at(0, 0, 3, 3, 3, 6).spread().arrival.tolist() == [0, 1.5, 3, 4, 5, 6]
    assert at(0, 0, 0, 3, 3, 3).spread().arrival == pytest.approx([0, 0.6, 1.2, 1.8, 2.4, 3])
    assert at(0, 1, 1, 2, 100, 100, 200).spread().arrival.tolist() == [0, 1, 1.5, 2, 100, 100.5, 200], "at most 1 s"
    apart = at(0, 1, 3)
    assert apart.spread() == apart
    assert at(7).spread() == at(7)
    assert len(at().spread()) == 0


def test_one_step_in_ten_may_be_shorter():
    steps = [3.0] * 30
    steps[7:9] = 2.999, 3.001
    instants = np.concatenate([[0.0], np.cumsum(steps), [90.001]])
    assert at(*np.repeat(instants, 2)).describe()["coinciding"]["gap_s"] == pytest.approx(3, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(gaps=st.lists(st.integers(0, 5), min_size=1, max_size=60), step=st.sampled_from([1e-3, 1.0, 3.0]))
def test_spread_keeps_order_span_and_place(gaps, step):
    trace = at(*np.cumsum(gaps) * step)
    if trace.rate is None:
        if len(trace) > 1:
            with pytest.raises(TraceError, match=r"spread: all .* at one instant"):
                trace.spread()
        return
    spread = trace.spread()
    assert (np.diff(spread.arrival) > 0).all()
    assert spread.arrival[[0, -1]].tolist() == trace.arrival[[0, -1]].tolist()
    assert spread.rate == trace.rate
    gap = trace.describe()["coinciding"]["gap_s"]
    assert (abs(spread.arrival - trace.arrival) < gap * (1 + 1e-9)).all()
    assert np.array_equal(spread.prompt_tokens, trace.prompt_tokens)
    assert spread == trace.spread()
    assert spread.spread() == spread


# Batches


@pytest.mark.parametrize("arrivals", [(3.0,), (0.0, 0.0, 0.0), (0.0, 5e-324)])
def test_a_batch_has_no_rate_and_every_other_statistic(arrivals):
    trace = at(*arrivals)
    described = trace.describe()
    assert trace.rate is described["rate_rps"] is None
    assert described["requests"] == len(arrivals)
    assert all(word not in json.dumps(described) for word in ("NaN", "Infinity"))
    with pytest.raises(TraceError, match=r"^rate: (all 2|all 3|this trace holds 1) request.*leave rate out.*--arrival"):
        trace.at_rate(2.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e308), max_size=5))
def test_no_statistic_is_infinite_or_nan(arrivals):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        json.dumps(at(*sorted(arrivals)).describe(), allow_nan=False)


# Prefixes


def prefixed(folder, *hash_ids, tokens, **more):
    times = range(0, 1000 * len(hash_ids), 1000)
    return jsonl(
        folder,
        *(
            {**more, "timestamp": time, "input_length": n, "output_length": 1, "hash_ids": ids}
            for time, n, ids in zip(times, tokens, hash_ids, strict=True)
        ),
    )


@pytest.mark.parametrize(
    ("more", "block", "hash_ids", "tokens", "cached"),
    [
        ({}, 512, [[0, 1], [0, 1, 2], [0, 3], [9, 1]], [1024, 1200, 600, 700], 1024 + 512),
        ({}, 512, [[5], [5], [5]], [512, 100, 512], 512),
        ({}, 64, [["a", "b"], ["a", "c"]], [128, 100], 64),
        (BAILIAN, 16, [[1, 2, 3], [1, 2, 4]], [48, 40], 32),
        ({}, 512, [[], [7, 8], [7, 8]], [3, 1000, 1000], 512),
    ],
)
def test_prefixes_are_read_with_the_share_that_a_cache_would_hold(tmp_path, more, block, hash_ids, tokens, cached):
    trace = read_requests(prefixed(tmp_path, *hash_ids, tokens=tokens, **more))
    assert trace.describe()["prefixes"] == {"block_tokens": block, "cached_share": pytest.approx(cached / sum(tokens))}
    assert trace.prefixes.counts.tolist() == [n // block if ids else 0 for ids, n in zip(hash_ids, tokens, strict=True)]


def test_prefixes_count_in_order_of_arrival(tmp_path):
    path = prefixed(tmp_path, [1, 2], [1, 2, 3], tokens=[1024, 1536])
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert read_requests(path).source["prefixes"]["cached_share"] == 1024 / 2560


def test_prefixes_of_no_one_block_size_have_no_share(tmp_path):
    trace = read_requests(prefixed(tmp_path, [1, 2], [1], tokens=[1000, 1000]))
    assert (trace.prefixes, trace.source["prefixes"]) == (None, {"block_tokens": None, "cached_share": None})


@pytest.mark.parametrize("ids", [5, "abc", [1.5], [True], [[1]], None])
def test_hash_ids_are_a_list_of_ids(tmp_path, ids):
    path = prefixed(tmp_path, ids, tokens=[100])
    with pytest.raises(TraceError, match=r"line 1: hash_ids is .*, must be a list of integers or texts"):
        read_requests(path)


@pytest.mark.skipif(not AZURE.exists(), reason="the Azure trace is not here")
def test_azures_arrivals_do_not_coincide():
    trace = read_requests(AZURE)
    coinciding = trace.describe()["coinciding"]
    assert coinciding["requests"] < 20
    assert trace.spread().rate == trace.rate
