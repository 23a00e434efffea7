"""Which prompts begin alike: keys for a prefix cache, and the files that say it."""

from __future__ import annotations

import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllm.traces import RequestTrace, TraceError, TraceWarning, read_requests, write_requests
from qllm.traces.prefixes import Prefixes, growing

rows = st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=8)


def of(found: list[list[int]], block: int = 4) -> Prefixes:
    return Prefixes(np.array([*chain(*found)], dtype=np.int64), np.array([len(row) for row in found]), block)


def traced(prefixes: Prefixes, prompt: list[int], output: int = 1) -> RequestTrace:
    n = len(prompt)
    return RequestTrace(np.arange(n) * 1.0, prompt, np.full(n, output), np.zeros(n, int), prefixes=prefixes)


@given(rows, st.sampled_from([1, 2, 4, 8, 12]))
def test_two_requests_share_a_key_just_where_they_agree_up_to_it(found, kv_block):
    prefixes = of(found)
    unit, keys = prefixes.keys(kv_block)
    blocks = unit * kv_block // 4
    assert unit * kv_block % 4 == 0
    assert blocks == {1: 1, 2: 1, 4: 1, 8: 2, 12: 3}[kv_block]
    for i, mine in enumerate(found):
        assert len(keys(i)) == len(mine) // blocks
        for j, others in enumerate(found):
            alike = [mine[:n] == others[:n] for n in range(blocks, min(len(mine), len(others)) + 1, blocks)]
            assert [a == b for a, b in zip(keys(i), keys(j), strict=False)] == alike


@given(rows, st.data())
def test_some_of_the_requests_keep_their_numbers(found, data):
    order = data.draw(st.permutations(range(len(found))))
    prefixes = of(found)
    assert [prefixes[np.array(order)].of(i) for i in range(len(found))] == [found[i] for i in order]
    assert [prefixes[:3].of(i) for i in range(min(3, len(found)))] == found[:3]
    assert prefixes == of([[n + 5 for n in row] for row in found])


@given(rows)
def test_a_cache_without_limit_holds_what_came_before(found):
    seen, cached = set(), []
    for row in found:
        whole = [tuple(row[: n + 1]) for n in range(len(row))]
        cached.append(4 * sum(each in seen for each in whole))
        seen.update(whole)
    assert of(found).cached_tokens(np.full(len(found), 23)).tolist() == [min(n, 23) for n in cached]


def test_a_turn_begins_with_all_that_was_said():
    found = growing(np.array([9, 20, 3, 8, 7]), np.array([0, 0, 1, 1, 2]), 4)
    assert [found.of(i) for i in range(5)] == [[0, 1], [0, 1, 2, 3, 4], [], [5, 6], [7]]


@pytest.mark.parametrize(
    ("ids", "counts", "block", "says"),
    [
        ([1, 2], [1], 4, "add up to 1"),
        ([1], [2, -1], 4, "add up to"),
        ([-1], [1], 4, "at least 0"),
        ([], [], 0, "is 0"),
    ],
)
def test_columns_are_checked(ids, counts, block, says):
    with pytest.raises(ValueError, match=says):
        Prefixes(np.array(ids), np.array(counts), block)


def test_a_trace_has_the_prefixes_of_its_own_requests():
    for wrong in (of([[1]]), of([[1], [1, 2, 3]])):
        with pytest.raises(TraceError, match="prefixes: must be those of 2 requests, none longer"):
            traced(wrong, [8, 8])


def test_jsonl_gives_back_which_prompts_begin_alike(tmp_path):
    trace = traced(of([[0, 1], [0, 1], [], [0, 2]]), [11, 9, 3, 8])
    path = tmp_path / "trace.jsonl"
    write_requests(trace, path)
    found = read_requests(path)
    assert (found == trace, found.head(2) == trace.head(2), found == traced(None, [11, 9, 3, 8])) == (True, True, False)
    assert found.source["prefixes"] == {"block_tokens": 4, "cached_share": 12 / 31}
    write_requests(found, path)
    assert read_requests(path) == trace
    with pytest.warns(TraceWarning, match=r"trace.csv: hash_ids .* are left out; .jsonl has them"):
        write_requests(trace, tmp_path / "trace.csv")
    assert read_requests(tmp_path / "trace.csv").prefixes is None


ROW = {"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 3}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([ROW | {"hash_ids": [1]}], r"line 1: hash_ids need a first line such as .*hash_block_tokens"),
        (
            [{"classes": ["all"], "hash_block_tokens": 0}, ROW],
            "line 1: hash_block_tokens is 0, must be an integer >= 1",
        ),
        ([{"classes": ["all"], "blocks": 4}, ROW], "line 1: unknown key 'blocks'; allowed: classes, hash_block_tokens"),
        (
            [{"classes": ["all"], "hash_block_tokens": 4}, ROW | {"hash_ids": [1, 2, 3]}],
            "3 ids for 8 tokens, .* 2 at most",
        ),
        (
            [{"classes": ["all"], "hash_block_tokens": 4}, ROW | {"hash_ids": [1.5]}],
            "must be a list of integers or texts",
        ),
    ],
)
def test_what_is_wrong_in_jsonl_is_told(tmp_path, lines, says):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(TraceError, match=says):
        read_requests(path, "jsonl")
