"""The policies in configs/policies do what they say, and each stays as short as promised."""

from __future__ import annotations

from itertools import product
from math import inf
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qllm.config.policies import file_policy
from qllm.scheduler import Limits, Policy, Request, Scheduler, make_policy
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings
from tests.scheduler.device import Piece, play
from tests.scheduler.test_tight_memory import serve, specs, tight
from tests.worlds import run

EXAMPLES = sorted((Path(__file__).parents[2] / "configs" / "policies").glob("*.py"))
PATHS = {path.stem: path for path in EXAMPLES}
ALONE = Limits(max_seqs=1)
TOKEN_S = 0.001  #: of the device in these tests


def example(name: str, **given) -> Policy:
    return file_policy(PATHS[name], None, given)


def by_tokens(p) -> float:
    return TOKEN_S * p.tokens


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_serves_everybody_and_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 25
    trace = RequestTrace(np.arange(40) * 1e-3, np.full(40, 30), np.full(40, 5), np.arange(40) % 2, ("ls", "be"))
    result = run(trace, file_policy(path, None, {}), Limits(max_seqs=8), PassCostModel(affine_timings()))
    assert (result.status == 0).all()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(PATHS)), tight, specs)
def test_examples_serve_everybody_where_memory_is_short(name, limits, requests) -> None:
    serve(example(name), limits, requests)


# ---- shortest first, with ageing ---------------------------------------------------------------------------------


def beside_short_ones(policy: Policy, priority: int, load: float, n: int) -> tuple[Request, float]:
    """A prompt of 3,000 tokens at 0 s, and `n` of 100 that ask for `load` times the device; and when the last comes."""
    long = Request(0, 3000, 1, 1, 0.0)
    short = [Request(1 + i, 100, 1, priority, 100 * TOKEN_S * i / load) for i in range(n)]
    play(Scheduler(policy, ALONE), [*short, long], by_tokens)
    return long, short[-1].arrival


class Shortest(Policy):
    """Without ageing."""

    def order(self, r):
        return (r.prompt_tokens, r.id)


@pytest.mark.parametrize("load", [1.1, 1.7, 3.0])
@pytest.mark.parametrize("token_s", [0.0002, 0.001])
def test_a_long_prompt_is_overtaken_only_by_those_that_come_soon_after_it(load: float, token_s: float) -> None:
    long, last = beside_short_ones(example("shortest_first", token_s=token_s, max_wait_s=inf), 1, load, 500)
    before = 1 + load * 2900 * token_s / (100 * TOKEN_S)  # how many have come by then
    assert long.first_launch == pytest.approx(100 * TOKEN_S * before, abs=0.21)
    assert long.first_launch < last
    starved, last = beside_short_ones(Shortest(), 1, load, 500)
    assert starved.first_launch >= last


@settings(max_examples=15, deadline=None)
@given(st.floats(1.01, 3.0), st.sampled_from([0, 1]), st.floats(0.5, 15.0))
def test_nobody_waits_longer_than_max_wait_s_beside_an_endless_stream(load, priority, bound) -> None:
    long, last = beside_short_ones(example("shortest_first", token_s=1.0, max_wait_s=bound), priority, load, 500)
    assert long.first_launch <= bound + 100 * TOKEN_S + 1e-6
    assert long.first_launch < last


def test_short_ones_come_first_and_the_class_before_that() -> None:
    requests = [Request(i, n, 1, priority, 0.0) for i, (n, priority) in enumerate([(900, 1), (20, 1), (500, 0)])]
    play(Scheduler(example("shortest_first"), ALONE), requests, by_tokens)
    assert [r.id for r in sorted(requests, key=lambda r: r.finish)] == [2, 1, 0]


# ---- earliest deadline first -------------------------------------------------------------------------------------

#: arrival (ms), work (ms), time until the deadline (ms)
jobs = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 20), st.integers(1, 80)), min_size=1, max_size=7
)  # fmt: skip


def feasible(jobs: list[tuple[int, int, int]]) -> bool:
    """Whether one machine that may stop can keep all deadlines: no interval holds more work than time."""
    starts = {arrival for arrival, _, _ in jobs}
    ends = {arrival + within for arrival, _, within in jobs}
    inside = (
        end - start - sum(work for at, work, within in jobs if at >= start and at + within <= end)
        for start, end in product(starts, ends)
        if start < end
    )
    return min(inside) >= 0


def kept(policy: Policy, jobs: list[tuple[int, int, int]]) -> int:
    """How many deadlines `policy` keeps on such a machine; a token is a millisecond."""
    requests = [Request(i, work, 1, 1, at / 1e3, max_ttft_s=within / 1e3) for i, (at, work, within) in enumerate(jobs)]
    play(Scheduler(policy, Limits()), requests, by_tokens)
    return sum(r.first_token <= r.arrival + r.max_ttft_s + 1e-9 for r in requests)


@settings(max_examples=300, deadline=None)
@given(jobs)
def test_all_deadlines_are_kept_where_that_is_possible(jobs) -> None:
    """Dertouzos (1974): the earliest first keeps all deadlines on one machine that may stop, if that is possible."""
    assume(feasible(jobs))
    assert kept(example("deadline_first", fill_tokens=0), jobs) == len(jobs)


def test_more_deadlines_are_kept_than_first_come_first_served() -> None:
    jobs = [(3 * i, 20 if i % 4 == 0 else 4, 400 if i % 4 == 0 else 12) for i in range(40)]
    edf, fcfs = kept(example("deadline_first", fill_tokens=0), jobs), kept(make_policy("fcfs"), jobs)
    assert edf >= 30
    assert fcfs <= 10


def test_a_deadline_stops_the_running_pass_and_who_has_none_waits_for_default_s() -> None:
    """A pass that was stopped for somebody must not be the one that goes on."""
    steps = PassCostModel(affine_timings(layers=8, experts=8))
    trace = RequestTrace(
        np.array([0.0, 1e-3]),
        np.array([4000, 10]),
        np.array([1, 1]),
        np.array([0, 0]),
        ("ls", "be"),
        max_ttft_s=np.array([inf, 1.0]),
    )
    result = run(trace, example("deadline_first"), Limits(), steps)
    plain = run(trace, example("deadline_first", default_s=0.5), Limits(), steps)
    assert result.finish[1] < result.finish[0]
    assert result.preemptions[0] == 1
    assert plain.finish[1] > plain.finish[0]


def test_suspended_prefills_go_on_by_deadline_and_prompts_join_while_the_pass_stays_short() -> None:
    s = Scheduler(example("deadline_first"), Limits())
    ends = []
    for i, (tokens, within) in enumerate([(4000, 9.0), (3000, 5.0), (2000, 2.0), (10, 8.0), (400, 1.0)]):
        s.add(Request(i, tokens, 1, 1, 0.1 * i, max_ttft_s=within), 0.1 * i)
        if s.running is not None and s.should_yield(s.running, 0.1 * i):
            s.suspended(s.running, 0.1 * i)
        s.running or s.next(0.1 * i)
    while s.running is not None:
        ends.append([r.id for r in s.finished(s.running, 9.0)])
        s.next(9.0)
    assert ends == [[4, 3], [2], [1], [0]]


# ---- weighted classes --------------------------------------------------------------------------------------------


def shares(pieces: list[Piece], start: float, end: float) -> dict[int, float]:
    """The part of the device's time that each priority had; a pass is shared by the requests in it."""
    used: dict[int, float] = {}
    for piece in pieces:
        inside = max(0.0, min(piece.end, end) - max(piece.start, start))
        for r in piece.requests:
            used[r.priority] = used.get(r.priority, 0.0) + inside / len(piece.requests)
    return {priority: seconds / sum(used.values()) for priority, seconds in used.items()}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 5.0), (1.5, 1.0, 3.0)])
@pytest.mark.parametrize("tokens", [(20, 400, 100), (300, 30, 200)])
@pytest.mark.parametrize(("outputs", "places"), [(1, 4), (20, 8)])
def test_classes_that_have_work_share_the_device_by_weight(weights, tokens, outputs, places) -> None:
    """However long their prompts are: seconds count, not requests or tokens. A pass more or less, at the end."""
    policy = example("weighted_classes", weights=dict(enumerate(weights)))
    requests = [
        Request(3 * i + priority, tokens[priority], outputs, priority, 0.0)
        for i in range(400)
        for priority in range(len(weights))
    ]
    pieces = play(Scheduler(policy, Limits(max_seqs=places)), requests, lambda p: 0.01 + by_tokens(p))
    end = min(max(r.first_launch for r in requests if r.priority == level) for level in range(len(weights)))
    found = shares(pieces, 0.1 * end, end)  # all have work until then
    longest = max(piece.end - piece.start for piece in pieces)
    for level, weight in enumerate(weights):
        assert found[level] == pytest.approx(weight / sum(weights), abs=0.03 + longest / end)


def test_who_was_away_has_saved_nothing_up() -> None:
    requests = [Request(i, 100, 1, 0, 0.0) for i in range(3000)]
    requests += [Request(10_000 + i, 100, 1, 1, 50.0) for i in range(3000)]
    pieces = play(Scheduler(example("weighted_classes"), ALONE), requests, by_tokens, until=70.0)
    assert shares(pieces, 0.0, 50.0)[0] == 1.0
    assert shares(pieces, 50.0, 70.0)[1] == pytest.approx(0.5, abs=0.02)


def test_alone_a_class_has_all_whatever_its_weight() -> None:
    requests = [Request(i, 100, 3, 1, 0.0) for i in range(50)]
    policy = example("weighted_classes", weights={0: 9, 1: 0.1})
    pieces = play(Scheduler(policy, Limits(max_seqs=4)), requests, by_tokens)
    assert sum(piece.end - piece.start for piece in pieces) == pytest.approx(pieces[-1].end)
