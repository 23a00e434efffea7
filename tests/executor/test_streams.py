"""Streams: the same tokens for threads and coroutines, readers that are slow, and readers that leave."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable
from functools import partial

import pytest

from qllm.executor import Engine
from qllm.executor.engine.requests import Bell, Mailbox, Token
from qllm.executor.errors import EngineClosed, RequestError
from qllm.scheduler import Limits
from tests.engine_worlds import make_model, prompts

NEW, LONG = 9, 150
LIMITS = Limits(max_seqs=4, max_batched_tokens=64, kv_blocks=100, block_size=4)


@pytest.fixture(scope="module")
def model(one_thread):
    return make_model()


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, limits=LIMITS) as engine:
        yield engine


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    late = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < late
        time.sleep(0.001)


def only_request(engine):
    (sequence,) = engine._desk.requests.values()
    return sequence


def nothing_is_left(engine) -> None:
    wait_for(lambda: engine.stats().requests == 0)
    assert engine.stats().free_blocks == LIMITS.kv_blocks
    assert not engine._desk.requests
    assert not engine._desk._waiting


def test_coroutines_and_threads_get_the_same_tokens(engine):
    asked = prompts(6, seed=1)
    wanted = [engine.submit(p, max_new_tokens=NEW, stop=()).result() for p in asked]

    async def read(prompt):
        stream = engine.submit(prompt, max_new_tokens=NEW, stop=())
        tokens = [token async for token in stream]
        assert [t.id for t in tokens] == stream.tokens
        assert [t.time for t in tokens] == stream.token_times
        return await stream.aresult()

    async def wait(prompt):
        return await engine.submit(prompt, max_new_tokens=NEW, stop=()).aresult()

    async def all_of_them():
        return await asyncio.gather(*map(read, asked), *map(wait, asked))

    got = asyncio.run(all_of_them())
    assert [c.tokens for c in got] == [c.tokens for c in wanted] * 2
    for completion, prompt in zip(got, asked * 2, strict=True):
        assert completion.usage == (len(prompt), NEW)
        assert completion.usage.total_tokens == len(prompt) + NEW
        times = completion.token_times
        assert times == sorted(times)
        assert times[0] == completion.times.first_token
        assert times[-1] <= completion.times.finish


def test_an_item_is_never_missed_however_thread_and_coroutine_meet():
    mailbox, n = Mailbox(), 3000

    def put() -> None:
        for i in range(n):
            mailbox.put((Token(i, None), False))
            if i % 7 == 0:
                time.sleep(0)

    async def read() -> list[int]:
        return [(await asyncio.wait_for(mailbox.aget(), 30))[0].id for _ in range(n)]

    thread = threading.Thread(target=put)
    thread.start()
    assert asyncio.run(read()) == list(range(n))
    thread.join()


def test_an_event_loop_that_was_closed_does_not_harm_who_puts():
    loop, mailbox = asyncio.new_event_loop(), Mailbox()
    mailbox._wake = partial(Bell(loop).ring, loop.create_future())
    loop.close()
    mailbox.put((Token(1, None), True))
    assert mailbox.get()[0].id == 1


def test_the_readers_of_one_pass_are_woken_in_one_go():
    boxes, calls = [Mailbox() for _ in range(20)], []

    async def read_all():
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe
        readers = [asyncio.ensure_future(box.aget()) for box in boxes]
        await asyncio.sleep(0)  # all of them wait now
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "call_soon_threadsafe", lambda *args: calls.append(call(*args)))
            for i, box in enumerate(boxes):
                box.put((Token(i, None), True))
            return [token.id for token, _ in await asyncio.gather(*readers)]

    assert asyncio.run(read_all()) == list(range(20))
    assert len(calls) == 1


def test_an_event_loop_that_ended_is_not_kept(engine):
    async def read():
        await engine.submit([5, 6, 7], max_new_tokens=NEW, stop=()).aresult()
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(read())
    gc.collect()
    assert loop() is None


def test_who_does_not_read_holds_nobody_up(engine):
    unread = engine.submit([5, 6, 7], max_new_tokens=LONG, stop=())
    assert len(engine.submit([5, 6, 8], max_new_tokens=NEW, stop=()).result().tokens) == NEW

    async def slow() -> int:
        stream = engine.submit([5, 6, 9], max_new_tokens=NEW, stop=())
        async for _ in stream:
            wait_for(lambda: stream.ended)  # the event loop stands still until the engine has ended it
        return len(stream.tokens)

    assert asyncio.run(slow()) == NEW
    assert len(unread.result().tokens) == LONG
    nothing_is_left(engine)


@pytest.mark.parametrize(("logprobs", "most"), [(None, 256), (20, 256 + 21 * 128)])
def test_what_nobody_reads_takes_what_the_mailbox_says_and_holds_no_block(engine, logprobs, most):
    made = {"max_new_tokens": LONG, "stop": (), "logprobs": logprobs}
    tracemalloc.start()
    try:
        unread = engine.submit([5, 6, 7], **made)
        nothing_is_left(engine)  # so it has ended
        assert unread._mailbox._items.qsize() == LONG + 1
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
        del unread
        gc.collect()
        held -= tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert LONG * 100 < held < LONG * most + 10_000  # the stream itself


def test_a_result_that_does_not_come_in_time_may_be_waited_for_again(engine):
    go = threading.Event()
    engine._loop.send(go.wait)
    stream = engine.submit([5, 6, 7], max_new_tokens=NEW, stop=(), request_id="late")
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError, match=f"request late: it has not ended within {timeout} s"):
            stream.result(timeout)
    for timeout in (-1, "1", float("nan"), True):
        with pytest.raises(RequestError, match="timeout is"):
            stream.result(timeout)
    go.set()
    assert len(stream.result(30).tokens) == NEW
    assert stream.result(0).finish_reason == "length"


def test_a_dropped_stream_is_cancelled_and_leaves_nothing(engine):
    stream = engine.submit([5, 6, 7], max_new_tokens=LONG, stop=())
    sequence = only_request(engine)
    next(stream)
    del stream
    gc.collect()
    nothing_is_left(engine)
    assert sequence.finish_reason == "cancelled"


async def left_by_break(engine):
    async for token in engine.submit([5, 6, 7], max_new_tokens=LONG, stop=()):
        assert token.id >= 0
        break


async def left_by_break_but_kept(engine):
    stream = engine.submit([5, 6, 7], max_new_tokens=LONG, stop=())
    async for _ in stream:
        break
    assert (await stream.aresult()).finish_reason == "cancelled"


async def left_by_error(engine):
    stream = engine.submit([5, 6, 7], max_new_tokens=LONG, stop=())
    kept = None
    try:
        async for _ in stream:
            raise KeyError
    except KeyError as error:
        kept = error  # whose traceback holds this frame, and the stream
    assert (await stream.aresult()).finish_reason == "cancelled"
    assert kept


async def cancelled_while_it_iterates(engine):
    task = asyncio.create_task(iterate(engine))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_left(engine)
    del task


async def iterate(engine):
    stream = engine.submit([5, 6, 7], max_new_tokens=LONG, stop=())
    async for _ in stream:
        pass
    await asyncio.sleep(30)


async def cancelled_while_it_waits(engine):
    stream = engine.submit([5, 6, 7], max_new_tokens=LONG, stop=())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream.aresult(), 0.01)
    await until_left(engine)
    assert stream.ended


async def until_left(engine):
    for _ in range(30_000):
        if not engine._desk.requests:
            return
        await asyncio.sleep(0.001)
    raise AssertionError


@pytest.mark.parametrize(
    "client",
    [left_by_break, left_by_break_but_kept, left_by_error, cancelled_while_it_iterates, cancelled_while_it_waits],
    ids=lambda client: client.__name__,
)
def test_who_leaves_cancels(engine, client):
    seen = []
    end = type(engine._desk).leave

    def leave(desk, name):
        seen.append(desk.requests[name])
        end(desk, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine._desk), "leave", leave)
        asyncio.run(client(engine))
        nothing_is_left(engine)
    assert [sequence.finish_reason for sequence in seen] == ["cancelled"]


def test_a_token_that_is_not_waited_for_long_enough_is_not_lost(engine):
    wanted = engine.submit([5, 6, 7], max_new_tokens=NEW, stop=()).result().tokens

    async def impatient() -> list[int]:
        tokens, reader = [], aiter(engine.submit([5, 6, 7], max_new_tokens=NEW, stop=()))
        while True:
            try:
                tokens.append((await asyncio.wait_for(anext(reader), 0.0005)).id)
            except TimeoutError:
                continue
            except StopAsyncIteration:
                return tokens

    assert asyncio.run(impatient()) == wanted


def test_coroutines_hear_of_an_engine_that_is_closed(model):
    with pytest.warns(RuntimeWarning, match="one engine a process"):
        engine = Engine(model, limits=LIMITS)

    async def read():
        stream = engine.submit([5, 6, 7], max_new_tokens=LONG, stop=())
        async for _ in stream:
            threading.Thread(target=engine.close).start()  # idempotent
        raise AssertionError

    with pytest.raises(EngineClosed):
        asyncio.run(read())
    engine.close()
