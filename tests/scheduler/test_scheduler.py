"""The Scheduler driven by hand: random arrivals, aborts, early ends, failures and yields at every turn."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from itertools import pairwise
from math import isnan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.scheduler import (
    POLICIES,
    Limits,
    Pass,
    Policy,
    PolicyError,
    Request,
    RequestTooLarge,
    Scheduler,
    SchedulerError,
    State,
    UnknownPolicy,
    build_policy,
    make_policy,
)
from tests.worlds import Stack, limits, policies, prefixes


def held_blocks(s: Scheduler) -> int:
    """KV blocks held, counted request by request, shared ones once (nothing of the scheduler's sums is used)."""
    size, unit = s.limits.block_size, s.memory.prefixes.unit_blocks
    shared = [key for r in s.requests.values() for key in r.prefix[: r.shared]]
    held = (len(set(shared)) - len(shared)) * unit
    for r in s.requests.values():
        if r.batch is None:
            held += r.blocks
            continue
        r.sync()
        stepping = r.batch is not s.ready.batch  # in a pass: the block for the step is taken
        held += -(-(r.computed + stepping) // size)
    return held


def check(s: Scheduler) -> None:
    """I1 and I4: everybody stands in exactly one place, and free + held = total."""
    waiting, ready = list(s.waiting), list(s.ready)
    passes = [*s.suspended_passes, *([s.running] if s.running else [])]
    in_passes = [r for p in passes for r in p.requests()]
    everywhere = [r.id for r in (*waiting, *ready, *in_passes, *s.memory.offloaded)]
    assert sorted(everywhere) == sorted(s.requests)
    assert len(waiting) == len(s.waiting)
    assert len(ready) == len(s.ready)
    assert len(s.ready.batch) <= s.limits.max_seqs
    assert s.ready.levels == Counter(r.level for r in ready)
    batches = [p.decode for p in passes if p.decode is not None]
    for batch in (s.ready.batch, *batches):
        assert batch.levels == Counter(r.level for r in batch.members.values())
        assert batch.level == min(batch.levels, default=float("inf"))
    for p in passes:
        assert p.level == min(r.level for r in p.requests())
        assert p.prefill_level == min((c.request.level for c in p.prefill), default=float("inf"))
    assert s.kv.free + held_blocks(s) == s.kv.total
    check_prefixes(s)
    holders = [r for r in s.requests.values() if r.blocks or r.batch]
    assert s.memory.resident == len(holders) <= (s.limits.max_resident or len(holders))
    for level in range(4):
        assert s.memory.holders(level) == sum(r.level <= level for r in holders)
        assert s.waiting.count(level) == sum(r.level == level for r in waiting)


def check_prefixes(s: Scheduler) -> None:
    """Who holds which unit; idle ones fit what is free; of each prompt the beginning is there (keys: `keys_of`)."""
    cache = s.memory.prefixes
    assert cache.holders == Counter(key for r in s.requests.values() for key in r.prefix[: r.shared])
    assert not cache.holders.keys() & cache.idle.keys()
    assert len(cache.idle) * cache.unit_blocks <= s.kv.free
    assert all(key // 3 == 1 or key // 3 in cache for key in (*cache.holders, *cache.idle))
    for r in s.requests.values():
        r.sync()
        assert r.shared * cache.unit_tokens <= r.computed


@settings(max_examples=400, deadline=None)
@given(st.data(), policies, limits())
def test_nobody_and_no_block_is_lost_whatever_happens(data, policy, limits):
    """I1 to I4 under arrivals, aborts, suspensions wherever allowed, stop tokens and failing passes."""
    s = Scheduler(policy, limits, prefix_blocks=data.draw(st.sampled_from([1, 2])))
    now, ids, ended = 0.0, 0, {}
    running: Pass | None = None

    def note(requests):
        for r in requests:
            assert r.id not in ended
            ended[r.id] = r.state

    for _ in range(data.draw(st.integers(5, 60))):
        now += 0.01
        choices = ["add", "add", "abort", "reprioritize", "next", "next", "next", "end", "fail", "yield"]
        choice = data.draw(st.sampled_from(choices))
        if choice == "add":
            prompt, output = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 12))
            r = Request(ids, prompt, output, ids % 3, now, prefix=data.draw(prefixes))
            ids += 1
            with suppress(RequestTooLarge):
                s.add(r, now)
        elif choice == "abort" and s.requests:
            victim = data.draw(st.sampled_from(sorted(s.requests)))
            r = s.requests[victim]
            dropped = s.abort(victim, now)
            s.abort(victim, now)  # idempotent
            assert r.state is State.ABORTED
            assert dropped is None or dropped not in s.suspended_passes
        elif choice == "reprioritize" and s.requests:
            with suppress(RequestTooLarge):
                s.reprioritize(data.draw(st.sampled_from(sorted(s.requests))), data.draw(st.integers(0, 3)), now)
        elif choice == "next" and running is None:
            running = s.next(now)
            assert (running is None) == (not s.requests), "I6: idle while somebody is in the system"
            if running is not None:
                assert running.n_decode + len(running.prefill) <= limits.max_seqs
                assert running.tokens <= limits.max_batched_tokens
        elif choice == "yield" and running is not None:
            if s.should_yield(running, now):
                kept = s.suspended(running, now)
                assert kept == (running in s.suspended_passes)
                running = None
        elif choice == "fail" and running is not None:
            note(s.failed(running, now))
            running = None
        elif choice == "end" and running is not None:
            members = running.requests()
            for r in members:
                r.sync()
            stop = [r for r in members if r.remaining <= 1 and data.draw(st.booleans())]
            before = {r.id: r.generated for r in members}
            done = s.finished(running, now, stop)
            assert all(r in done or r.state is State.ABORTED for r in stop)
            for r in members:
                r.sync()
                assert before[r.id] <= r.generated <= before[r.id] + 1
                assert (r.generated == 0) == isnan(r.first_token)
            note(done)
            running = None
        check(s)
    if running is not None:
        note(s.finished(running, now))
    for _ in range(20_000):
        now += 0.01
        p = s.next(now)
        if p is None:
            break
        note(s.finished(p, now))
        check(s)
    assert not s.requests
    assert s.kv.free == s.kv.total
    assert all(state in (State.FINISHED, State.FAILED, State.ABORTED) for state in ended.values())


def drive(s: Scheduler, now: float = 0.0, passes: int = 10_000) -> list[Pass]:
    """Run to the end without interruption, a second a pass."""
    out = []
    while len(out) < passes and (p := s.next(now)) is not None:
        out.append(p)
        now += 1.0
        s.finished(p, now)
    return out


def add(s: Scheduler, id: int, prompt: int, output: int, priority: int, now: float = 0.0) -> Request:
    r = Request(id, prompt, output, priority, now)
    s.add(r, now)
    return r


def test_fcfs_prefills_together_then_decodes_and_ignores_priority():
    s = Scheduler(make_policy("fcfs"), Limits(max_seqs=2))
    add(s, 0, 5, 2, 1, 0.0)
    add(s, 1, 5, 2, 1, 0.1)
    add(s, 2, 5, 2, 0, 0.2)
    first, second, third, fourth = drive(s)[:4]
    assert [c.request.id for c in first.prefill] == [0, 1]
    assert second.n_decode == 2
    assert [c.request.id for c in third.prefill] == [2]
    assert fourth.n_decode == 1


def test_priority_gives_the_urgent_the_place_of_a_decoding_best_effort_request():
    s = Scheduler(make_policy("priority"), Limits(max_seqs=1))
    be = add(s, 0, 5, 10, 1)
    p = s.next(0.0)
    s.finished(p, 1.0)
    add(s, 1, 5, 3, 0, 1.0)
    p = s.next(1.0)
    assert [c.request.id for c in p.prefill] == [1]
    s.finished(p, 2.0)
    for now in (2.0, 3.0):
        p = s.next(now)
        assert list(p.decode.members) == [1], "the LS request decodes while the BE one sits idle with its KV"
        s.finished(p, now + 1)
    p = s.next(4.0)
    assert list(p.decode.members) == [0]
    assert be.evictions == 0


def test_chunked_mixes_decodes_with_pieces_of_the_most_urgent_prompt():
    s = Scheduler(make_policy("chunked", budget=8), Limits(max_seqs=4))
    add(s, 0, 3, 9, 1)
    add(s, 1, 20, 1, 1)
    p = s.next(0.0)
    assert [(c.request.id, c.tokens, c.context) for c in p.prefill] == [(0, 3, 0), (1, 5, 0)]
    s.finished(p, 1.0)
    add(s, 2, 4, 1, 0, 1.0)
    p = s.next(1.0)
    assert p.n_decode == 1
    assert [(c.request.id, c.tokens, c.context) for c in p.prefill] == [(2, 4, 0), (1, 3, 5)]


def algorithm_1(fill: int | None = None) -> Scheduler:
    return Scheduler(make_policy("qllm", fill_tokens=fill), Limits(max_seqs=2))


def test_algorithm_1_case_by_case():
    s = algorithm_1()
    add(s, 0, 5, 9, 1)
    p = s.next(0.0)
    assert [c.request.id for c in p.prefill] == [0], "(5) BE prefill when nothing else is there"
    s.finished(p, 1.0)
    add(s, 1, 5, 9, 1, 1.0)
    p = s.next(1.0)
    assert p.n_decode == 1, "(4) BE decode before BE prefill"
    assert not p.prefill
    s.finished(p, 2.0)
    add(s, 2, 5, 9, 0, 2.0)
    p = s.next(2.0)
    assert [c.request.id for c in p.prefill] == [2, 1], "(2) LS prefill, filled up from BE prefill"
    s.finished(p, 3.0)
    p = s.next(3.0)
    assert set(p.decode.members) == {2, 0}, "(3) LS decode, filled up from BE decode, first admitted first"
    s.finished(p, 4.0)
    add(s, 3, 5, 9, 0, 4.0)
    s.finished(s.next(4.0), 5.0)
    add(s, 4, 5, 9, 0, 5.0)
    p = s.next(5.0)
    assert set(p.decode.members) == {2, 3}, "(1) B LS requests decode: LS prefill waits"


def test_fill_tokens_bounds_what_an_ls_prefill_pays_for():
    for fill, expected in ((None, [(1, 5), (0, 30)]), (0, [(1, 5)]), (8, [(1, 5), (0, 8)])):
        s = algorithm_1(fill)
        add(s, 0, 30, 2, 1)
        add(s, 1, 5, 2, 0)
        p = s.next(0.0)
        assert [(c.request.id, c.tokens) for c in p.prefill] == expected


def suspended_be_prefill(resume: str) -> tuple[Scheduler, Pass]:
    """A BE prefill suspended for an LS prompt that has just been prefilled."""
    s = Scheduler(make_policy("qllm", fill_tokens=0, resume=resume), Limits())
    add(s, 0, 100, 3, 1)
    be = s.next(0.0)
    assert not s.should_yield(be, 0.1)
    add(s, 1, 5, 3, 0, 0.2)
    assert s.should_yield(be, 0.2)
    assert s.suspended(be, 0.3)
    ls = s.next(0.3)
    assert [c.request.id for c in ls.prefill] == [1]
    assert not s.should_yield(ls, 0.4), "equals do not preempt each other"
    s.finished(ls, 0.5)
    return s, be


def test_a_pass_knows_whether_prompts_ran_before_it():
    s = Scheduler(make_policy("qllm"), Limits())
    s.add(Request(0, 40, 3, 1, 0.0), 0.0)
    found, now = [], 0.0
    p = s.next(now)
    while p is not None:
        found.append((bool(p.prefill), p.after_prefill))
        now += 1.0
        if len(found) == 2:  # the first decode pass gives way to an urgent prompt, and to its first decode pass
            s.add(Request(1, 10, 2, 0, now), now)
        s.finished(p, now)
        p = s.next(now)
    assert found[:2] == [(True, False), (False, True)]
    assert all(after == before for (before, _), (_, after) in pairwise(found))


def test_resume_prefill_goes_on_with_the_suspended_pass_first():
    s, be = suspended_be_prefill("prefill")
    assert s.next(0.5) is be
    assert be.suspended_s == pytest.approx(0.2)


def test_resume_idle_serves_all_ls_work_first():
    s, be = suspended_be_prefill("idle")
    now = 0.5
    for _ in range(2):
        p = s.next(now)
        assert list(p.decode.members) == [1]
        now += 0.1
        s.finished(p, now)
    assert s.next(now) is be


def test_bounded_suspension():
    """I8: once a pass was suspended for max_suspended_s, it is not suspended again and goes on before LS."""
    s = Scheduler(make_policy("qllm", max_suspended_s=1.0, resume="idle"), Limits())
    add(s, 0, 100, 3, 1)
    be = s.next(0.0)
    add(s, 1, 5, 50, 0, 0.2)
    s.suspended(be, 0.3)
    now = 0.3
    while (p := s.next(now)) is not be:
        now += 0.3
        s.finished(p, now)
    assert now - 0.3 <= 1.0 + 0.3
    add(s, 2, 5, 5, 0, now)
    assert not s.should_yield(be, now)


def test_urgent_request_evicts_strictly_less_urgent_ones_only_if_that_suffices():
    for evict in ("recompute", "offload"):
        s = Scheduler(make_policy("qllm", fill_tokens=0), Limits(kv_blocks=10, block_size=4, evict=evict))
        be = add(s, 0, 16, 4, 1)
        s.finished(s.next(0.0), 1.0)
        other = add(s, 1, 12, 4, 0, 1.0)
        s.finished(s.next(1.0), 2.0)
        assert be.blocks + other.blocks == 7
        add(s, 2, 36, 4, 0, 2.0)  # needs 9 blocks: more than BE has to give
        p = s.next(2.0)
        assert be.evictions == 0, "nobody is evicted where it does not help"
        s.finished(p, 3.0)
        s.abort(2, 3.0)
        ls = add(s, 3, 16, 4, 0, 3.0)
        p = s.next(3.0)
        assert [c.request for c in p.prefill] == [ls]
        assert (be.evictions, other.evictions) == (1, 0)
        assert be.state is (State.OFFLOADED if evict == "offload" else State.WAITING)
        assert p.offloaded == ([be] if evict == "offload" else None)
        s.finished(p, 4.0)
        drive(s, 4.0)
        assert be.state is State.FINISHED
        assert be.generated == 4


def test_nobody_less_urgent_eats_the_blocks_that_an_urgent_request_waits_for():
    """I7: while an LS prompt waits for memory, a BE prompt that would fit is not admitted."""
    s = Scheduler(make_policy("priority"), Limits(kv_blocks=10, block_size=4))
    add(s, 0, 24, 4, 0)
    s.finished(s.next(0.0), 1.0)  # holds 6 of 10 blocks
    ls = add(s, 1, 20, 4, 0, 1.0)  # needs 5
    be = add(s, 2, 4, 4, 1, 1.0)  # needs 1
    p = s.next(1.0)
    assert not p.prefill
    assert p.n_decode == 1
    assert (ls.blocks, be.blocks) == (0, 0)


def test_a_block_stays_free_for_each_request_that_decodes():
    """Admission leaves room for the next tokens of those under way; evicting one gives its share back."""
    s = Scheduler(make_policy("qllm", fill_tokens=0), Limits(kv_blocks=10, block_size=4))
    for i in range(2):
        add(s, i, 12, 8, 1)
    s.finished(s.next(0.0), 1.0)  # two BE requests hold 3 blocks each, 4 are free
    ls = add(s, 2, 24, 2, 0, 1.0)  # 6 blocks: 3 given up make 7, and one has to be left for the other BE request
    assert [c.request for c in s.next(1.0).prefill] == [ls]
    assert [r.evictions for r in (s.requests[0], s.requests[1])] == [0, 1]


def test_blocks_taken_for_a_decode_step_come_back_when_a_member_is_evicted_after_all():
    class DecodeFirst(Policy):
        def select(self, s, batch, now):
            batch.decode()
            batch.prefill()

    s = Scheduler(DecodeFirst(), Limits(kv_blocks=9, block_size=4))
    be = add(s, 0, 16, 8, 1)
    s.finished(s.next(0.0), 1.0)  # 4 blocks, all full: the next step takes a fifth
    ls = add(s, 1, 24, 2, 0, 1.0)  # 6 blocks: 4 are free, so BE has to give way
    p = s.next(1.0)
    assert [c.request for c in p.prefill] == [ls]
    assert be.evictions == 1
    check(s)
    assert s.kv.free == 3


def test_the_reserved_blocks_are_for_the_levels_that_the_policy_calls_urgent():
    class TwoUrgent(Policy):
        urgent = 1

    limits = Limits(kv_blocks=10, block_size=4, urgent_blocks=4)
    for policy, level in ((Policy(), 0), (TwoUrgent(), 1)):
        s = Scheduler(policy, limits)
        add(s, 0, 40, 1, level)
        with pytest.raises(RequestTooLarge, match="take 10 KV blocks of 4 tokens; its class may use 6"):
            add(s, 1, 40, 1, level + 1)


def test_aborting_everybody_in_a_suspended_pass_hands_it_back_to_be_discarded():
    s, be = suspended_be_prefill("idle")
    assert s.abort(0, 0.6) is be
    assert not s.suspended_passes
    assert s.abort(0, 0.7) is None


def test_running_pass_whose_requests_are_all_aborted_stops_at_the_next_point():
    s = Scheduler(make_policy("qllm"), Limits())
    add(s, 0, 100, 3, 0)
    p = s.next(0.0)
    assert s.abort(0, 0.1) is None
    assert s.should_yield(p, 0.1)
    assert s.suspended(p, 0.2) is False
    assert s.kv.free == s.kv.total


def test_a_request_in_one_of_several_suspended_passes_is_aborted_there():
    s = Scheduler(Stack(), Limits())
    passes = []
    for i in range(3):  # each arrival stops the pass that runs
        add(s, i, 10, 3, 0, i)
        passes.append(s.next(i))
        if i < 2:
            s.suspended(passes[-1], i)
    assert s.abort(1, 3.0) is passes[1]
    assert s.suspended_passes == passes[:1]
    assert s.abort(2, 3.0) is None
    assert passes[2].cancelled
    check(s)


def test_next_wants_to_know_first_how_the_running_pass_ended():
    s = Scheduler(Policy(), Limits())
    add(s, 0, 5, 1, 0)
    s.next(0.0)
    with pytest.raises(SchedulerError, match="<Pass 0 level=0 prefill=1 decode=0> is still running"):
        s.next(1.0)


def test_a_policy_that_selects_nothing_is_not_obeyed():
    """I6: who is ready decodes first, else prefills go on."""

    class Idle(Policy):
        def select(self, s, batch, now):
            assert not batch

    s = Scheduler(Idle(), Limits())
    r = add(s, 0, 5, 3, 0)
    passes = drive(s)
    assert [(len(p.prefill), p.n_decode) for p in passes] == [(1, 0), (0, 1), (0, 1)]
    assert r.state is State.FINISHED
    assert s.next(9.0) is None


def test_what_a_policy_may_ask():
    s = Scheduler(Policy(), Limits(max_seqs=1))
    add(s, 0, 5, 3, 0)
    add(s, 1, 5, 3, 2)
    assert (s.waiting.count(0), s.waiting.count(1), s.waiting.levels()) == (1, 0, [0, 2])
    assert s.has_slot(0)
    p = s.next(0.0)
    assert s.recheck_at(p, 0.0) == float("inf"), "unless it says so, what it decides does not change with time"
    for nonsense in (None, "soon", float("nan")):
        s.policy.recheck_at = lambda s, running, now, nonsense=nonsense: nonsense
        with pytest.raises(PolicyError, match=r"recheck_at gave .*; allowed: seconds, or inf for never"):
            s.recheck_at(p, 0.0)
    assert not s.has_slot(0)
    assert not s.can_prefill(2)


def test_what_a_policy_answers_is_checked():
    """A mistake in a policy is found when a request arrives, and named."""

    class Half(Policy):
        def level(self, r: Request) -> float:
            return r.priority + 0.5

    class Mixed(Policy):
        def order(self, r: Request) -> tuple:
            return (r.arrival if r.id else "first",)

    with pytest.raises(PolicyError, match=r"level gave 1\.5; allowed: a whole number"):
        add(Scheduler(Half(), Limits()), 0, 5, 1, 1)
    s = Scheduler(Mixed(), Limits())
    add(s, 0, 5, 1, 1)
    with pytest.raises(PolicyError, match=r"order gave \(0.0,\); comparing it"):
        add(s, 1, 5, 1, 1)


def test_a_question_is_no_generator_and_no_coroutine():
    class Yields(Policy):
        def select(self, s, batch, now):
            yield batch.prefill()

    s = Scheduler(Yields(), Limits())
    add(s, 0, 5, 1, 1)
    with pytest.raises(PolicyError, match="select raised TypeError: yield and async are not for"):
        s.next(0.0)


def test_a_request_whose_order_does_not_compare_is_not_in_the_system():
    class Mixed(Policy):
        def order(self, r: Request) -> tuple:
            return (-r.id if r.id % 4 else "nan",)

    s = Scheduler(Mixed(), Limits(max_seqs=1))
    for i in range(1, 16):
        if i % 4:
            add(s, i, 5, 1, 1)
            continue
        with pytest.raises(PolicyError, match="order gave"):
            add(s, i, 5, 1, 1)
        assert i not in s.requests
    served = []
    while s.requests:
        served += [r.id for r in s.finished(s.next(0.0), 1.0)]
    assert served == [i for i in range(15, 0, -1) if i % 4]
    assert s.next(2.0) is None


def test_an_idle_request_that_left_does_not_come_back_to_decode():
    s = Scheduler(make_policy("priority"), Limits(max_seqs=1))
    for i in range(3):  # each is more urgent than those before, and takes the one place in the batch
        add(s, i, 5, 9, 2 - i, i)
        s.finished(s.next(i), i + 0.5)
    assert [r.id for r in s.ready] == [2, 0, 1]
    s.abort(1, 3.0)
    s.abort(2, 3.0)
    p = s.next(3.0)
    assert list(p.decode.members) == [0]


def test_a_request_has_a_prompt_and_asks_for_something():
    with pytest.raises(SchedulerError, match="request 4: prompt_tokens is 0, max_tokens is 3; both must be at least 1"):
        Request(4, 0, 3)
    assert repr(Request(4, 2, 3, priority=1)) == "<Request 4 level=1 WAITING 0/3>"


def test_policy_settings_are_checked():
    with pytest.raises(UnknownPolicy, match="must be one of fcfs, priority"):
        make_policy("lifo")
    with pytest.raises(UnknownPolicy, match="no setting 'depth'"):
        make_policy("qllm", depth=3)
    with pytest.raises(UnknownPolicy, match="nor any other"):
        make_policy("fcfs", depth=3)
    with pytest.raises(UnknownPolicy, match="fill_tokens is -1"):
        make_policy("qllm", fill_tokens=-1)
    with pytest.raises(UnknownPolicy, match="prefill or idle"):
        make_policy("layer", resume="never")
    with pytest.raises(UnknownPolicy, match="mine: granularity is 'token'; allowed: iteration, layer, expert"):
        build_policy(type("Mine", (Policy,), {"granularity": "token"}), "mine", {})


def test_every_policy_says_what_it_does():
    for name, cls in POLICIES.items():
        assert cls.__doc__, name


def test_a_user_policy_orders_its_queue():
    class ShortestFirst(Policy):
        def order(self, r: Request) -> tuple:
            return (r.prompt_tokens,)

    s = Scheduler(ShortestFirst(), Limits(max_seqs=1))
    for i, prompt in enumerate((9, 3, 6)):
        add(s, i, prompt, 1, 0)
    assert [p.prefill[0].request.id for p in drive(s)] == [1, 2, 0]
