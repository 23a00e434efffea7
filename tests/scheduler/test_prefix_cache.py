"""The prefix cache of the scheduler, worked out by hand (test_scheduler.py holds it to its invariants at random)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qllm.scheduler import Limits, Request, Scheduler, State, make_policy
from qllm.scheduler.pass_builder import PassBuilder
from qllm.scheduler.repeats import repeats


def scheduler(kv_blocks=20, prefix_blocks=1, policy="priority", **more) -> Scheduler:
    limits = Limits(max_seqs=8, max_batched_tokens=64, kv_blocks=kv_blocks, block_size=4, **more)
    return Scheduler(make_policy(policy), limits, prefix_blocks=prefix_blocks)


def serve(s: Scheduler, *requests: Request, now: float = 0.0) -> list[list[tuple[int, int, int]]]:
    """Add the requests, serve all that is there; of each pass its prefills: (request, new tokens, tokens before)."""
    for r in requests:
        s.add(r, now)
    passes = []
    while (p := s.next(now)) is not None:
        now += 1.0
        passes.append([(c.request.id, c.tokens, c.context) for c in p.prefill])
        s.finished(p, now)
    return passes


def test_a_prompt_that_begins_like_an_earlier_one_computes_the_rest():
    s = scheduler()
    assert serve(s, Request(0, 14, 1, prefix=[5, 6, 7])) == [[(0, 14, 0)]]
    assert (s.kv.free, list(s.memory.prefixes.idle)) == (20, [7, 6, 5])
    later = Request(1, 18, 1, prefix=[5, 6, 8, 9])
    s.add(later, 1.0)
    p = s.next(1.0)
    assert [(c.tokens, c.context) for c in p.prefill] == [(10, 8)]
    assert (s.kv.free, later.cached, later.shared) == (20 - 5, 8, 2)
    s.finished(p, 2.0)
    assert list(s.memory.prefixes.idle) == [7, 9, 8, 6, 5]


def test_one_token_is_computed_where_all_are_there():
    s = scheduler()
    assert serve(s, Request(0, 8, 1, prefix=[1, 2]), Request(1, 5, 1, prefix=[1])) == [[(0, 8, 0), (1, 5, 0)]]
    assert serve(s, Request(2, 8, 1, prefix=[1, 2])) == [[(2, 4, 4)]]
    assert serve(s, Request(3, 9, 1, prefix=[1, 2])) == [[(3, 1, 8)]]


def test_units_may_be_larger_than_a_block():
    s = scheduler(prefix_blocks=2)
    serve(s, Request(0, 15, 1, prefix=[1]))
    assert serve(s, Request(1, 15, 1, prefix=[1])) == [[(1, 7, 8)]]
    assert s.kv.free == 20


def test_who_runs_shares_its_blocks_and_equal_ones_are_kept_once():
    s = scheduler()
    first, second, third = (Request(i, 9, 20, prefix=[1, 2]) for i in range(3))
    s.add(first, 0.0)
    s.add(second, 0.0)
    p = s.next(0.0)
    assert s.kv.free == 20 - 6  # both compute all of it in one pass
    s.finished(p, 1.0)
    assert (s.kv.free, s.memory.prefixes.holders) == (20 - 4, {1: 2, 2: 2})
    s.add(third, 1.0)
    p = s.next(1.0)
    assert [(c.request.id, c.tokens) for c in p.prefill] == [(2, 1)]
    assert s.kv.free == 20 - 5


def test_the_least_recently_used_end_of_a_prompt_is_dropped_first():
    s = scheduler(kv_blocks=6)
    serve(s, Request(0, 12, 1, prefix=[1, 2, 3]))
    serve(s, Request(1, 8, 1, prefix=[4, 5]))
    assert list(s.memory.prefixes.idle) == [3, 2, 1, 5, 4]
    serve(s, Request(2, 12, 1))
    assert list(s.memory.prefixes.idle) == [1, 5, 4]
    assert serve(s, Request(3, 12, 1, prefix=[1, 2, 3])) == [[(3, 8, 4)]]
    assert list(s.memory.prefixes.idle) == [5, 4, 3, 2, 1]
    serve(s, Request(4, 4, 1))
    assert list(s.memory.prefixes.idle) == [5, 4, 3, 2, 1], "one block was free beside them"


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 6))
def test_documents_of_one_size_are_cached_as_by_the_textbook(asked, places):
    """Least recently used, one request at a time: there is a document if fewer than `places` others came since."""
    s = scheduler(kv_blocks=2 * places + 1)
    for i, document in enumerate(asked):
        before = asked[:i][::-1]
        since = before[: before.index(document)] if document in before else None
        hit = since is not None and len({*since}) < places
        assert serve(s, Request(i, 9, 1, prefix=[2 * document, 2 * document + 1]))[0] == [
            (i, 1, 8) if hit else (i, 9, 0)
        ]


def test_an_answer_is_kept_where_its_key_is_known():
    s = scheduler()
    serve(s, Request(0, 6, 7, prefix=[1, 2, 3]))
    assert serve(s, Request(1, 17, 1, prefix=[1, 2, 3, 4])) == [[(1, 5, 12)]]


def test_who_was_evicted_finds_its_prompt_again():
    s = scheduler(kv_blocks=6)
    be = Request(0, 12, 9, priority=1, prefix=[1, 2, 3])
    s.add(be, 0.0)
    s.finished(s.next(0.0), 1.0)
    ls = Request(1, 8, 1, prefix=[1, 9])
    s.add(ls, 1.0)
    p = s.next(1.0)
    assert [(c.tokens, c.context) for c in p.prefill] == [(4, 4)], "it has the block that both begin with"
    s.finished(p, 2.0)
    more = Request(2, 20, 1, priority=0)
    s.add(more, 2.0)
    p = s.next(2.0)
    assert (be.evictions, be.blocks, p.prefill[0].request) == (1, 0, more)
    s.finished(p, 3.0)
    p = s.next(3.0)
    assert [(c.request.id, c.tokens, c.context) for c in p.prefill] == [(0, 9, 4)]


def test_nobody_is_evicted_for_blocks_that_others_hold_on_to():
    """Of two equal prompts one has 1 block of its own: to evict it frees 1, not 3."""
    s = scheduler(kv_blocks=7)
    first = Request(0, 9, 3, priority=1, prefix=[1, 2])
    second = Request(1, 9, 3, priority=1, prefix=[1, 2])
    s.add(first, 0.0)
    s.finished(s.next(0.0), 1.0)
    s.add(second, 1.0)
    s.finished(s.next(1.0), 2.0)
    assert s.kv.free == 3
    ls = Request(2, 16, 1)
    s.add(ls, 2.0)
    assert [v.id for v in s.memory.room_for(ls)] == [1, 0], "room for the next token of who stays is needed besides"
    assert s.memory.room_for(Request(3, 8, 1)) == [second]


def test_what_a_request_would_hold_is_not_free_for_it_when_its_holder_goes():
    """Of 8 blocks 2 are free, 2 stay with `urgent`, 4 are those of `be`: not enough for 7, 2 of which `be` has."""
    s = scheduler(kv_blocks=8)
    be, urgent = Request(0, 13, 2, priority=2, prefix=[1, 2, 3]), Request(1, 6, 2, priority=0)
    s.add(be, 0.0)
    s.add(urgent, 0.0)
    s.finished(s.next(0.0), 1.0)
    assert s.kv.free == 2
    assert s.memory.room_for(Request(2, 25, 1, priority=1, prefix=[1, 2, 8])) is None
    assert s.memory.room_for(Request(2, 17, 1, priority=1, prefix=[1, 2, 8])) == [be]


def test_passes_are_repeated_while_what_somebody_found_stays():
    s = scheduler(kv_blocks=8, max_resident=1)
    serve(s, Request(0, 13, 1, prefix=[1, 2, 3]))
    s.add(Request(1, 4, 17), 1.0)
    s.finished(s.next(1.0), 2.0)
    waits = Request(2, 13, 1, prefix=[1, 2, 3])
    p = s.next(2.0)
    assert (s.kv.free, s.memory.prefixes.idle_blocks, repeats(s, p)) == (6, 3, 15)
    s.add(waits, 2.0)
    assert (waits.computed, repeats(s, p)) == (12, 12), "the pass after 12 more takes a fourth block, and drops one"


def test_who_holds_a_part_of_its_prompt_keeps_it_while_passes_are_repeated():
    """Before each stretch of decode passes it is asked who may come; what is between two chunks is left alone."""
    s = scheduler(kv_blocks=40)
    serve(s, Request(0, 9, 1, prefix=[1, 2]))
    s.add(Request(1, 4, 17), 1.0)
    s.finished(s.next(1.0), 2.0)
    half = Request(2, 40, 1, prefix=[1, 2])
    s.add(half, 2.0)
    assert s.memory.admit(half)
    s.waiting.discard(half, State.WAITING)
    half.computed = 19
    s.waiting.push(half)
    batch = PassBuilder(s.memory)
    batch.decode()
    assert repeats(s, s._launch(batch, 2.0)) > 0
    s.memory.look_up(half)
    assert half.computed == 19


def test_an_offloaded_request_brings_back_a_copy_of_its_own():
    s = scheduler(kv_blocks=6, evict="offload")
    be = Request(0, 12, 5, priority=1, prefix=[1, 2, 3])
    s.add(be, 0.0)
    s.finished(s.next(0.0), 1.0)
    assert serve(s, Request(1, 16, 1), now=1.0)[0] == [(1, 16, 0)]
    assert (be.evictions, be.generated, s.kv.free) == (1, 5, 6)
