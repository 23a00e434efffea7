"""The policy slack: LS in time, BE in what is left, and neither starves."""

from __future__ import annotations

from math import inf, isnan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.scheduler import Limits, Policy, Request, RequestShed, Scheduler, UnknownPolicy, make_policy
from qllm.scheduler.policies.joining import _most
from qllm.scheduler.policies.pacing import OWED_S

PASS_S, TOKEN_S = 0.010, 0.0001


def seconds(chunks, n_decode, context):
    """Every pass takes 10 ms, and 0.1 ms a token."""
    return PASS_S + TOKEN_S * (n_decode + sum(new for new, _ in chunks))


def scheduler(limits: Limits | None = None, model=seconds, **settings) -> Scheduler:
    return Scheduler(make_policy("slack", **settings), limits or Limits(), model)


def add(s: Scheduler, id: int, prompt: int, output: int, priority: int, now: float = 0.0, **more) -> Request:
    r = Request(id, prompt, output, priority, now, **more)
    s.add(r, now)
    return r


def after_ls_prefill(**more) -> tuple[Scheduler, object, Request, float]:
    """A BE prefill of 8,000 tokens suspended at 0.1 s by an LS prompt that has just been prefilled."""
    s = scheduler(tpot_stretch=1.5, be_share=0.0)
    add(s, 0, 8000, 5, 1)
    be = s.next(0.0)
    ls = add(s, 1, 100, 50, 0, 0.1, **more)
    assert s.should_yield(be, 0.1)
    assert s.suspended(be, 0.1)
    p = s.next(0.1)
    assert p.requests() == [ls]
    s.finished(p, 0.12)
    return s, be, ls, 0.12


def test_an_ls_prefill_stops_a_be_pass_and_be_goes_on_until_the_next_token_is_due():
    s, be, ls, now = after_ls_prefill()
    assert s.next(now) is be, "LS has slack: half of what its prefill took"
    due = s.recheck_at(be, now)
    assert due == pytest.approx(0.1 + 1.5 * 0.02, abs=0.011)
    assert not s.should_yield(be, due - 1e-4)
    assert s.should_yield(be, due)
    s.suspended(be, due)
    p = s.next(due)
    assert (p.requests(), p.n_decode) == ([ls], 1)


def test_tokens_are_due_by_the_bound_of_the_request_where_it_has_one():
    s, be, ls, now = after_ls_prefill(max_tpot_s=0.2)
    assert s.next(now) is be
    assert s.recheck_at(be, now) == pytest.approx(ls.first_token + 0.97 * 0.2 - 0.0101)


def test_of_several_bounds_the_tightest_counts():
    s, be, ls, now = after_ls_prefill(max_tpot_s=0.2)
    s.ready.remove(ls)
    other = Request(7, 5, 9, 0, 0.0, max_tpot_s=0.1)
    other.computed, other.generated, other.first_token, other.admitted = 5, 1, ls.first_token, 9
    for r in (ls, other):
        s.ready.add(r)
    assert s.next(now) is be
    assert s.recheck_at(be, now) == pytest.approx(ls.first_token + 0.97 * 0.1 - 0.0102)


def test_without_ls_everybody_decodes_and_the_pass_is_filled_up():
    s = scheduler(budget=64)
    add(s, 0, 30, 5, 1)
    s.finished(s.next(0.0), 1.0)
    add(s, 1, 500, 5, 2, 1.0)
    p = s.next(1.0)
    assert (p.n_decode, [(c.request.id, c.tokens) for c in p.prefill]) == (1, [(1, 63)])


def test_decodes_and_a_part_of_a_prompt_join_an_ls_prefill_as_far_as_it_gets_hardly_longer():
    for stretch, decodes, tokens in ((1.0, 0, 0), (1.02, 4, 0), (1.5, 8, 92)):
        s = scheduler(ttft_stretch=stretch)
        for i in range(8):
            add(s, i, 10, 50, 1)
        s.finished(s.next(0.0), 0.1)
        add(s, 8, 3000, 5, 1, 0.1)
        add(s, 9, 100, 5, 0, 0.1)  # 20 ms alone
        p = s.next(0.1)
        assert p.prefill[0].request.id == 9
        assert p.n_decode == decodes
        assert sum(c.tokens for c in p.prefill[1:]) == tokens


def test_be_decodes_join_ls_once_all_of_them_fit():
    s = scheduler(tpot_stretch=1.05, be_share=0.0)
    for i in range(20):
        add(s, i, 10, 500, 1)
    s.finished(s.next(0.0), 0.1)
    add(s, 30, 10, 100, 0, 0.1)
    now, sizes = 0.1, []
    for _ in range(60):
        p = s.next(now)
        if not p.prefill:
            sizes.append(p.n_decode)
        now += seconds([(c.tokens, 0) for c in p.prefill], p.n_decode, 0)
        s.finished(p, now)
    assert set(sizes) == {1, 21}, "alone, or with all of them"
    assert 3 <= sizes.index(21, sizes.index(1)) <= 8 or sizes[0] == 21


def test_where_nothing_is_known_ls_runs_alone_and_what_passes_took_is_learnt():
    s = scheduler(model=None)
    assert s.seconds([(10, 0)]) is None
    add(s, 0, 8000, 5, 1)
    be = s.next(0.0)
    add(s, 1, 100, 50, 0, 0.1)
    assert s.should_yield(be, 0.1)
    s.suspended(be, 0.1)
    p = s.next(0.1)
    assert len(p.requests()) == 1
    s.finished(p, 0.12)
    p = s.next(0.12)
    assert p.n_decode == 1, "how long a decode pass takes is not known: it runs at once"
    s.finished(p, 0.13)
    assert s.seconds((), 1, 100) == pytest.approx(0.01)
    assert s.seconds([(100, 0)]) == pytest.approx(0.02)
    assert s.next(0.13) is be


def test_the_policies_that_do_not_predict_are_told_nothing():
    s = Scheduler(make_policy("qllm"), Limits(), seconds)
    assert s.seconds([(10, 0)]) is None


def play(s: Scheduler, requests: list[Request], until: float, took=seconds, step: float = 0.001) -> dict[int, float]:
    """Run on one device that stops every `step` seconds of a pass; seconds of the device, of LS (0) and BE (1)."""
    now, todo = 0.0, sorted(requests, key=lambda r: r.arrival)
    left: dict[int, float] = {}
    used: dict[int, float] = {}
    while now < until:
        while todo and todo[0].arrival <= now:
            s.add(todo.pop(0), now)
        p = s.next(now)
        if p is None:
            if not todo:
                break
            now = todo[0].arrival
            continue
        whole = took([(c.tokens, c.context) for c in p.prefill], p.n_decode, p.decode_context)
        rest = left.pop(p.id, whole)
        tokens = [(r.level, 1) for r in p.requests() if r.batch is not None]
        tokens += [(c.request.level, c.tokens) for c in p.prefill]
        ls = sum(n for level, n in tokens if level <= 0) / p.tokens
        while True:
            dt = min(step, rest)
            now += dt
            rest -= dt
            used[0] = used.get(0, 0.0) + dt * ls
            used[1] = used.get(1, 0.0) + dt * (1 - ls)
            if rest <= 1e-12:
                s.finished(p, now)
                break
            while todo and todo[0].arrival <= now:
                s.add(todo.pop(0), now)
            if s.should_yield(p, now):
                s.suspended(p, now)
                left[p.id] = rest
                break
    return used


def long_be(n: int) -> list[Request]:
    return [Request(1000 + i, 4000, 40, 1, 0.0) for i in range(n)]


def test_ls_is_served_as_on_a_device_of_its_own_that_is_so_much_slower():
    ls = Request(0, 100, 200, 0, 0.5)
    play(scheduler(tpot_stretch=1.3, be_share=0.0), [*long_be(20), ls], 30.0)
    tpot = (ls.finish - ls.first_token) / 199
    assert tpot == pytest.approx(1.3 * 0.0101, rel=0.03)
    assert ls.first_token - ls.arrival < 1.05 * 0.020 + 0.0021


def test_a_bound_is_kept_however_long_be_would_run():
    ls = [Request(i, 100, 100, 0, 0.5 + 0.1 * i, max_tpot_s=0.06) for i in range(4)]
    play(scheduler(), [*long_be(20), *ls], 60.0)
    for r in ls:
        assert (r.finish - r.first_token) / 99 <= 0.06


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0.05, 0.2, 0.5]), st.sampled_from([1.0, 1.5]))
def test_be_has_its_share_while_ls_alone_would_fill_the_device(share, stretch):
    ls = [Request(i, 50, 2000, 0, 0.0) for i in range(4)]
    s = scheduler(be_share=share, tpot_stretch=stretch, budget=512)
    before = play(s, [*long_be(50), *ls], 12.0)
    assert s.requests.keys() >= {0, 1, 2, 3}, "LS never stops"
    assert before[1] / sum(before.values()) >= 0.8 * share


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0.1, 0.3]))
def test_a_stream_of_ls_prefills_does_not_take_all(share):
    ls = [Request(i, 400, 1, 0, 0.05 * i) for i in range(400)]  # 50 ms each, 20 a second
    be = Request(1000, 8000, 2, 1, 0.0)
    play(scheduler(be_share=share), [be, *ls], 40.0)
    assert be.finish <= (0.82 + 0.5) / share + 1.0


def test_a_suspended_pass_has_its_share_of_a_stream_of_ls_prefills():
    ls = [Request(i, 400, 1, 0, 0.1 + 0.05 * i) for i in range(400)]
    be = Request(1000, 8000, 1, 1, 0.0)
    play(scheduler(be_share=0.2), [be, *ls], 40.0)
    assert be.preemptions > 3
    assert be.finish <= 0.1 + (0.71 + 0.5) / 0.2 + 1.0


@given(st.sampled_from([0.5, 1.0, 2.0, 7.0]), st.integers(1, 3000), st.integers(0, 20), st.floats(0.011, 0.2))
def test_as_many_as_fit_are_found_whatever_the_times_are_like(power, high, low, limit):
    def seconds(n: int) -> float:
        return 0.01 + 0.1 * (n / 1000) ** power

    low = min(low, high)
    found = _most(seconds, limit, low, high)
    assert found == 0 or low <= found <= high
    assert seconds(found) <= limit
    assert found or seconds(max(low, 1)) > limit or not low
    if power == 1.0 and found:
        assert found == high or seconds(found + 1) > limit


def work(requests: list[Request]) -> float:
    """Seconds that they take, each by itself and token by token."""
    return sum(r.max_tokens * (PASS_S + TOKEN_S) + r.prompt_tokens * TOKEN_S for r in requests)


@st.composite
def streams(draw) -> tuple[list[Request], list[Request]]:
    """LS that decodes for 12 s at least without a pause, beside LS that comes and goes; and BE of three classes."""
    ls = [Request(0, 100, 1200, 0, 0.0)]
    gaps = draw(st.lists(st.floats(0.01, 0.5), max_size=40))
    for i, gap in enumerate(gaps):
        ls.append(Request(1 + i, draw(st.integers(1, 600)), draw(st.integers(1, 30)), 0, ls[-1].arrival + gap))
    sizes = st.tuples(st.integers(1, 1500), st.integers(1, 4), st.integers(1, 3), st.floats(0.0, 3.0))
    be = draw(st.lists(sizes, min_size=1, max_size=4))
    return ls, [Request(1000 + i, *each) for i, each in enumerate(be)]


@settings(max_examples=25, deadline=None)
@given(streams(), st.sampled_from([0.0, 0.1]), st.sampled_from([0.2, 2.0]))
def test_nobody_waits_for_longer_than_max_wait_s_and_for_the_prompts_that_came_before(stream, share, bound):
    """After `max_wait_s` it is LS, and goes before all LS that came later.

    What is left are prompts before it in the queue, and up to a second: the pass that runs, and what BE may be owed.
    """
    ls, be = stream
    s = scheduler(be_share=share, tpot_stretch=1.0, max_wait_s=bound)
    play(s, [*ls, *be], 300.0, step=0.01)
    for r in be:
        aged = r.arrival + bound
        before = [q for q in (*ls, *be) if q.arrival <= r.arrival and q is not r and q.first_launch > aged]
        prompts = sum(PASS_S + TOKEN_S * q.prompt_tokens for q in before)
        assert r.first_launch <= aged + 1.05 * prompts + 1.0
        assert not isnan(r.finish)
        assert r.priority > 0, "its priority is what it was"


@settings(max_examples=25, deadline=None)
@given(streams(), st.sampled_from([0.15, 0.4]), st.sampled_from([1.0, 1.5]))
def test_be_has_its_share_of_the_device_whatever_ls_is_like(stream, share, stretch):
    """All of BE is done once `be_share` of the time is what it needs, and the 0.5 s that it may be owed."""
    ls, be = stream
    for r in be:
        r.arrival = 0.0
    s = scheduler(be_share=share, tpot_stretch=stretch)
    play(s, [*ls, *be], 300.0, step=0.01)
    assert max(r.finish for r in be) <= (work(be) + OWED_S) / share + 1.0


def test_who_waits_inside_a_suspended_pass_ages_as_well():
    s = scheduler(be_share=0.0, max_wait_s=1.0)
    r = add(s, 0, 8000, 5, 1)
    be = s.next(0.0)
    add(s, 1, 100, 5, 0, 0.1)
    assert s.should_yield(be, 0.1)
    s.suspended(be, 0.1)
    now = 0.1
    while (p := s.next(now)) is not be:
        s.finished(p, now := now + 0.2)
        add(s, 100 + int(10 * now), 100, 1, 0, now)
    assert r.level == 0
    assert 1.0 <= now <= 1.4
    assert s.recheck_at(be, now) == inf
    add(s, 9, 10, 1, 0, now)
    assert not s.should_yield(be, now), "one of LS does not stop another's prefill"


def test_a_request_ages_while_the_pass_that_runs_may_be_stopped_for_it():
    s = scheduler(max_wait_s=1.0)
    add(s, 0, 8000, 5, 1)
    running = s.next(0.0)
    add(s, 1, 100, 5, 2, 0.2)
    assert s.recheck_at(running, 0.3) == pytest.approx(1.0), "when to look at the first of them"
    assert not s.should_yield(running, 1.1)
    assert s.recheck_at(running, 1.1) == pytest.approx(1.2)
    assert s.should_yield(running, 1.25), "now it is as urgent as any"


def test_what_left_meanwhile_does_not_age():
    s = scheduler(max_wait_s=1.0)
    for i in range(3):
        add(s, i, 10, 5, 1)
    s.abort(0, 0.5)
    s.reprioritize(1, 0, 0.5)
    p = s.next(2.0)
    assert [r.level for r in p.requests()] == [0, 0]


def test_be_is_turned_away_while_those_before_it_would_wait_too_long():
    s = scheduler(Limits(max_batched_tokens=8000), shed_s=1.3, budget=8000)
    for i in range(5):
        add(s, i, 8000, 1, 1)
    for now in (0.0, 1.0, 2.0):
        s.finished(s.next(now), now + 1.0)
    with pytest.raises(RequestShed, match=r"request 5: it would wait for about 1.33 s .*shed_s"):
        add(s, 5, 8000, 5, 1, 3.0)
    assert 5 not in s.requests
    add(s, 20, 10, 5, 0, 3.0)


def test_ls_is_turned_away_while_those_before_it_would_wait_too_long():
    s = scheduler(Limits(max_batched_tokens=100), shed_ls_s=1.3)
    for i in range(5):
        add(s, i, 100, 1, 0)
    for now in (0.0, 1.0, 2.0):
        s.finished(s.next(now), now + 1.0)
    with pytest.raises(RequestShed, match=r"request 5: it would wait for about 1.33 s .*1.3 s \(shed_ls_s\)"):
        add(s, 5, 100, 5, 0, 3.0)
    for _ in range(9):
        add(s, 20 + _, 10, 5, 1, 3.0)  # BE is another matter, both ways
    s.finished(s.next(3.0), 4.0)
    add(s, 6, 100, 5, 0, 4.0)


@pytest.mark.parametrize("bound", [None, 0.5])
def test_where_ls_alone_is_too_much_it_queues_or_those_who_are_let_in_are_served_in_time(bound):
    """Each takes 20 ms, and 100 a second come: twice what the device can do."""
    ls, shed = [Request(i, 100, 1, 0, 0.01 * i) for i in range(600)], 0
    s = scheduler(Limits(max_batched_tokens=100), shed_ls_s=bound)
    now = 0.0
    while ls or s.requests:
        while ls and ls[0].arrival <= now:
            try:
                s.add(r := ls.pop(0), now)
                r.tags = {"in": "yes"}
            except RequestShed:
                shed += 1
        p = s.next(now)
        now = now + 0.02 if p else ls[0].arrival
        for r in s.finished(p, now) if p else ():
            assert bound is None or r.first_launch - r.arrival <= 1.2 * bound
            longest = r.first_launch - r.arrival
    assert (shed == 0) if bound is None else 200 < shed < 300
    assert bound is not None or longest > 5.0


def test_by_default_all_are_let_in():
    s = Scheduler(make_policy("fcfs"), Limits())
    assert Policy().admits(s, Request(0, 1, 1), 0.0) is None


def test_a_first_token_that_has_time_stops_nobody_who_ends_soon():
    def stops(max_ttft_s: float, at: float = 0.1) -> bool:
        s = scheduler()
        add(s, 0, 8000, 5, 1)  # 0.81 s
        be = s.next(0.0)
        add(s, 1, 100, 5, 0, 0.1, max_ttft_s=max_ttft_s)
        assert s.recheck_at(be, at) < inf
        return s.should_yield(be, at)

    assert stops(0.5), "it would come too late"
    assert not stops(4.0)
    assert not stops(4.0, at=1.1)
    assert stops(4.0, at=1.3), "the pass takes longer than was predicted"


def test_a_model_that_is_wrong_is_corrected():
    ls = Request(0, 100, 300, 0, 0.5)
    s = scheduler(tpot_stretch=1.3, be_share=0.0)
    play(s, [*long_be(20), ls], 60.0, took=lambda *a: 3 * seconds(*a), step=0.002)
    assert (ls.finish - ls.first_token) / 299 == pytest.approx(1.3 * 3 * 0.0101, rel=0.05)


@pytest.mark.parametrize("order", ["arrival", "deadline", "shortest", "fair"])
def test_orders(order):
    s = scheduler(order=order, weights={"b": 4.0})
    for i, (tokens, ttft, tenant) in enumerate([(900, 9.0, "a"), (800, 5.0, "a"), (100, 7.0, "a"), (900, inf, "b")]):
        add(s, i, tokens, 10, 1, max_ttft_s=ttft, tenant=tenant)
    expected = {"arrival": [0, 1, 2, 3], "deadline": [1, 2, 0, 3], "shortest": [2, 1, 0, 3], "fair": [0, 3, 1, 2]}
    assert [r.id for r in sorted(s.waiting, key=lambda r: r.order)] == expected[order]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(10, 400), min_size=40, max_size=80), st.sampled_from([1.0, 3.0]))
def test_tenants_get_tokens_in_proportion_to_their_weights(lengths, weight):
    """The bound of start-time fair queueing: at most a request of each more or less, in tokens over weights."""
    s = scheduler(Limits(max_seqs=1), order="fair", weights={"big": weight})
    for i, n in enumerate(lengths):
        for tenant in ("big", "small"):
            add(s, 2 * i + (tenant == "big"), n, 1, 1, tenant=tenant)
    got = {"big": 0.0, "small": 0.0}
    now, total = 0.0, sum(lengths) / 2
    while got["big"] + got["small"] < total:
        p = s.next(now)
        now += 0.1
        for r in s.finished(p, now):
            got[r.tenant] += (r.prompt_tokens + 1) / (weight if r.tenant == "big" else 1.0)
    most = max(lengths) + 1
    assert abs(got["big"] - got["small"]) <= most * (1 + 1 / weight) + 1e-9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ttft_stretch": 0.9}, "ttft_stretch is 0.9, must be a number of at least 1"),
        ({"tpot_stretch": "x"}, "tpot_stretch is 'x'"),
        ({"be_share": 1}, "be_share is 1, must be a number of at least 0 and below 1"),
        ({"budget": 0}, "budget is 0"),
        ({"order": "best"}, "order is 'best', must be one of arrival, deadline, shortest, fair"),
        ({"weights": {"a": 0}}, "weights.a is 0, must be a number above 0"),
        ({"weights": [1]}, r"weights is \[1\], must be a mapping"),
        ({"max_wait_s": -1}, "max_wait_s is -1"),
        ({"shed_s": -1}, "shed_s is -1"),
        ({"shed_ls_s": -1}, "shed_ls_s is -1"),
        ({"max_suspended_s": -1}, "max_suspended_s is -1"),
    ],
)
def test_settings_that_are_none(settings, message):
    with pytest.raises(UnknownPolicy, match=message):
        make_policy("slack", **settings)


def test_bounds_of_requests_are_above_0():
    for name in ("max_ttft_s", "max_tpot_s"):
        with pytest.raises(ValueError, match=f"request 0: .*{name} is 0"):
            Request(0, 1, 1, **{name: 0})
