"""KV to pinned host memory and back beside the passes: right whenever the copies run, and in bounded memory."""

from __future__ import annotations

from itertools import count, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor.gpu import host_memory
from qllm.executor.gpu.host_copies import ALIGNED, HostCopies, layout
from qllm.executor.gpu.host_memory import CHUNKS_IN_PIECE, HostPool
from qllm.executor.model.kv_cache import PagedKVCache, slots_of

BLOCKS, BLOCK_SIZE, CHUNK = 24, 4, 1024
WIDTHS = ((2, 24, 16), (1, 8, 8), (4, 16, 32))  # kv_heads, width of K, width of V


class Moment:
    def __init__(self, number, reached):
        self.number, self.reached = number, reached

    def query(self):
        return self.reached


class LateSide:
    """A stream whose copies run as late as can be: when somebody waits for one, which runs those before it too."""

    def __init__(self):
        self.left = []
        self.written = {}  # data pointer -> the last copy to there
        self.moments = count()

    def copy(self, to, source, after):
        event = Moment(next(self.moments), False)
        before = self.written.get(to.data_ptr())
        assert before is None or after.number > before.number, "what was copied before may not have been read yet"
        self.written[to.data_ptr()] = event
        self.left.append((event, to, source))
        return event

    def mark(self):
        return Moment(next(self.moments), True)

    def wait(self, event):
        while event is not None and not event.reached:
            self.one()

    def one(self):
        event, to, source = self.left.pop(0)
        to.copy_(source)
        event.reached = True

    def keep(self, buffer):
        pass


def slots(cache, blocks, tokens):
    """Of the first `tokens` tokens of the sequence in `blocks`."""
    return torch.from_numpy(slots_of(blocks, cache.block_size, 0, tokens)).to(cache.device)


def unpinned(shape):
    return torch.full(shape, 99, dtype=torch.uint8)


def pool_of(pieces, kept=0, chunk=CHUNK):
    size = chunk * CHUNKS_IN_PIECE
    return HostPool(pieces * size, kept * size, chunk, unpinned)


def made_cache(copies):
    cache = PagedKVCache(BLOCKS, BLOCK_SIZE)
    for index, (heads, k, v) in enumerate(WIDTHS):
        cache.layer(index, torch.zeros(1, heads, k), torch.zeros(1, heads, v, dtype=torch.bfloat16))
    cache._copies = copies
    return cache


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(0, 2), st.booleans())
def test_kv_comes_back_whenever_the_copies_run(data, buffers, pieces, inference):
    with torch.inference_mode(inference):
        check_that_kv_comes_back(data, buffers, pieces)


def check_that_kv_comes_back(data, buffers, pieces):
    side, pool = LateSide(), pool_of(pieces)
    cache = made_cache(HostCopies(torch.device("cpu"), pool, side, buffers))
    rng = np.random.default_rng(0)
    here, away = {}, {}  # (blocks, tokens, contents), (host, contents)
    free = set(range(BLOCKS))

    def write(slots):
        for index, (heads, k, v) in enumerate(WIDTHS):
            rows = [torch.from_numpy(rng.normal(size=(len(slots), heads, w))) for w in (k, v)]
            cache.write(index, slots, rows[0].float(), rows[1].bfloat16())

    def contents(blocks, tokens):
        return [t.clone() for i in range(len(WIDTHS)) for t in cache.read(i, slots(cache, blocks, tokens))]

    for number in range(data.draw(st.integers(1, 14))):
        doing = data.draw(st.sampled_from(["begin", "offload", "restore", "drop", "copies run"]))
        if doing == "begin" and free:
            tokens = data.draw(st.integers(1, len(free) * BLOCK_SIZE))
            blocks = data.draw(st.permutations(sorted(free)))[: -(-tokens // BLOCK_SIZE)]
            free -= set(blocks)
            write(slots(cache, blocks, tokens))
            here[number] = blocks, tokens, contents(blocks, tokens)
        elif doing == "offload" and here:
            blocks, tokens, held = here.pop(data.draw(st.sampled_from(sorted(here))))
            away[number] = cache.offload(blocks, tokens), held
            assert away[number][0].nbytes == sum(t.nbytes for t in held)
            free |= set(blocks)
            write(slots(cache, blocks, tokens))  # the next owner's
        elif doing == "restore" and away:
            name = data.draw(st.sampled_from(sorted(away)))
            host, held = away[name]
            if len(free) * BLOCK_SIZE >= host.tokens:
                del away[name]
                blocks = data.draw(st.permutations(sorted(free)))[: -(-host.tokens // BLOCK_SIZE)]
                free -= set(blocks)
                cache.restore(host, blocks)
                here[number] = blocks, host.tokens, held
                del host
        elif doing == "drop" and away:
            del away[data.draw(st.sampled_from(sorted(away)))]
        elif side.left:
            side.one()
        assert len(cache._copies._buffers) <= buffers
        assert pool.pinned_bytes <= pieces * CHUNK * CHUNKS_IN_PIECE
        for blocks, tokens, held in here.values():
            assert all(map(torch.equal, contents(blocks, tokens), held))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 90), st.lists(st.sampled_from([0, 2, 32, 48, 1000, 1024]), max_size=7))
def test_every_row_lies_in_one_place_of_one_chunk(n, row_bytes):
    chunks = layout(n, row_bytes, CHUNK)
    rows = [
        (part.tensor, row) for parts in chunks for part in parts for row in range(part.first, part.first + part.rows)
    ]
    assert rows == [(tensor, row) for tensor, size in enumerate(row_bytes) if size for row in range(n)]
    for parts in chunks:
        assert parts
        assert parts[-1].stop <= CHUNK
        assert all(part.start % ALIGNED == 0 for part in parts)
        assert all(part.stop - part.start == part.rows * row_bytes[part.tensor] for part in parts)
        assert all(a.stop <= b.start for a, b in pairwise(parts))


def test_a_row_larger_than_a_chunk_is_refused():
    with pytest.raises(ValueError, match="rows of 1025 bytes"):
        layout(1, [1025], CHUNK)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3 * CHUNKS_IN_PIECE)), max_size=12),
    st.integers(0, 4),
    st.integers(0, 2),
)
def test_chunks_are_nobody_elses_and_the_pool_keeps_its_bounds(doings, most, kept):
    pool = pool_of(most, kept, chunk=16)
    held = []
    for takes, n in doings:
        if takes:
            held.append(pool.take(n))
        elif held:
            pool.give_later(held.pop(n % len(held)))
            pool.collect()
            unused = sum(len(piece.free) == CHUNKS_IN_PIECE for piece in pool.pieces)
            assert unused <= kept
        chunks = [chunk for taken in held for chunk in taken]
        assert len({chunk.bytes.data_ptr() for chunk in chunks}) == len(chunks)
        assert all(chunk.bytes.shape == (16,) for chunk in chunks)
        pinned = sum(chunk.piece is not None for chunk in chunks)
        assert pinned + sum(len(piece.free) for piece in pool.pieces) == len(pool.pieces) * CHUNKS_IN_PIECE
        assert len(pool.pieces) <= most


def test_memory_that_is_not_pinned_is_told_once(caplog):
    pool = pool_of(1)
    pool.take(CHUNKS_IN_PIECE)
    assert not caplog.records
    pool.take(2)
    pool.take(2)
    assert [record.getMessage() for record in caplog.records] == [
        f"KV beyond {CHUNK * CHUNKS_IN_PIECE} bytes of pinned host memory moves slowly: no more is pinned"
    ]


def test_a_host_without_memory_keeps_what_it_gave_before():
    def pin(shape):
        if pool.pieces:
            raise RuntimeError("out of memory")
        return unpinned(shape)

    pool = HostPool(1 << 40, 0, CHUNK, pin)
    with pytest.raises(RuntimeError, match="out of memory"):
        pool.take(CHUNKS_IN_PIECE + 1)
    assert len(pool.take(CHUNKS_IN_PIECE)) == CHUNKS_IN_PIECE


def test_a_device_without_memory_for_a_buffer_uses_those_that_it_has(monkeypatch):
    side = LateSide()
    copies = HostCopies(torch.device("cpu"), pool_of(9), side, 99)
    rows, tensor = torch.arange(90), torch.arange(90.0).repeat(16, 1).T.contiguous()
    first = copies.offload([tensor], rows[:5])

    def no_room(*_, **__):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", no_room)
        second = copies.offload([tensor], rows)
        assert len(copies._buffers) == 1
    copies.restore(second, [back := torch.zeros(90, 16)], rows)
    assert torch.equal(back, tensor)
    copies.restore(first, [back := torch.zeros(90, 16)], rows[:5] + 3)
    assert torch.equal(back[3:8], tensor[:5])


def test_a_pool_may_pin_a_share_of_what_the_host_or_its_container_could_give(monkeypatch, tmp_path):
    limit, info = tmp_path / "memory.max", tmp_path / "meminfo"
    monkeypatch.setattr(host_memory, "CONTAINER_LIMIT", limit)
    monkeypatch.setattr(host_memory, "MEMORY_INFO", info)
    assert host_memory.available_bytes() > 0
    info.write_text("MemTotal: 9000000 kB\nMemAvailable:    2000000 kB\n")
    assert host_memory.available_bytes() == 2_048_000_000
    limit.write_text("max\n")
    assert host_memory.host_pool()._most == 1_024_000_000
    limit.write_text("1000000000\n")
    assert host_memory.host_pool()._most == 500_000_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_goes_on_while_kv_moves_and_every_row_comes_back():
    device, tokens, size = torch.device("cuda"), 4096, 16
    for inference in (False, True):
        with torch.inference_mode(inference):
            cache = PagedKVCache(3 * tokens // size, size, device)
            like = torch.empty(1, 4, 128, dtype=torch.bfloat16, device=device)
            for index in range(12):
                for store in cache.layer(index, like, like):
                    store.normal_()
            blocks, others = (list(range(first, 3 * tokens // size, 3)) for first in (0, 1))
            held = [store[slots(cache, blocks, tokens)] for store in (*cache.keys, *cache.values)]
            for _ in range(4):
                host = cache.offload(blocks, tokens)
                for store in (*cache.keys, *cache.values):
                    store[slots(cache, blocks, tokens)] = 0.0  # the next owner's, on the same stream
                cache.restore(host, others)
                del host
                assert all(
                    torch.equal(store[slots(cache, others, tokens)], rows)
                    for store, rows in zip((*cache.keys, *cache.values), held, strict=True)
                )
                blocks, others = others, blocks
            pool = cache._copies._pool
            assert all(piece.memory.is_pinned() for piece in pool.pieces)
            assert pool.pinned_bytes == 256 << 20
