"""Which KV blocks a sequence gets."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllm.executor.engine.block_manager import BlockManager
from qllm.executor.errors import ExecutorError
from qllm.executor.model.kv_cache import Rings

BLOCK = 4


def memory(blocks: int, rings: Rings | None = None) -> BlockManager:
    return BlockManager(SimpleNamespace(n_blocks=blocks, block_size=BLOCK, rings=rings))


def sequence() -> SimpleNamespace:
    return SimpleNamespace(blocks=[], ring=[], host=None, dropped=False)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 60)), max_size=60))
def test_no_block_is_anybody_elses_and_none_is_lost(steps):
    """Six sequences grow to so many tokens, or (-1) end, in any order."""
    kv, sequences = memory(40), [sequence() for _ in range(6)]
    for number, tokens in steps:
        mine, before = sequences[number], list(sequences[number].blocks)
        if tokens < 0:
            kv.release(mine)
            before = []
        else:
            need = max(0, -(-tokens // BLOCK) - len(before))
            if need > 40 - kv.held:
                with pytest.raises(ExecutorError, match=f"{need} KV blocks needed, {40 - kv.held} free"):
                    kv.grow(mine, tokens, ())
                continue
            kv.grow(mine, tokens, ())
            assert len(mine.blocks) == max(len(before), -(-tokens // BLOCK))
        assert mine.blocks[: len(before)] == before
        held = [block for other in sequences for block in other.blocks]
        assert len(held) == len(set(held)) == kv.held
        assert all(0 <= block < 40 for block in held)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 60)), max_size=60), st.integers(1, 4))
def test_rings_grow_to_their_size_and_no_block_of_theirs_is_anybody_elses(steps, size):
    kv, sequences = memory(6 * 15, Rings(3 * size, size, 1)), [sequence() for _ in range(6)]
    for number, tokens in steps:
        mine, before = sequences[number], list(sequences[number].ring)
        if tokens < 0:
            kv.release(mine)
            before = []
        else:
            need = max(len(before), min(size, -(-tokens // BLOCK)))
            left = 3 * size - sum(len(other.ring) for other in sequences)
            if need - len(before) > left:
                blocks = list(mine.blocks)
                with pytest.raises(ExecutorError, match=f"{need - len(before)} KV blocks of windows needed, {left} fr"):
                    kv.grow(mine, tokens, ())
                assert (mine.blocks, mine.ring) == (blocks, before)
                continue
            kv.grow(mine, tokens, ())
            assert len(mine.ring) == need
        assert mine.ring[: len(before)] == before
        rings = [block for other in sequences for block in other.ring]
        assert len(rings) == len(set(rings)) == kv.held - sum(len(other.blocks) for other in sequences)
        assert all(0 <= block < 3 * size for block in rings)


def test_who_gets_its_first_blocks_takes_those_of_who_was_dropped():
    kv, dropped, new = memory(40), sequence(), sequence()
    kv.grow(dropped, 8, ())
    dropped.dropped, dropped.request_id = True, "request-0"
    kv.grow(new, 4, [dropped, new])
    assert (dropped.blocks, dropped.recurrent, kv.held) == ([], None, 1)


def test_sequences_that_come_grow_and_go_lie_in_one_piece():
    """Eight at a time in a memory four times as large, each a prompt of 32 tokens and then 16 more, one by one."""
    kv, rng = memory(8 * 12 * 4), np.random.default_rng(0)
    sequences = [sequence() for _ in range(8)]
    tokens = [0] * 8
    jumps = steps = 0
    for number in rng.integers(0, 8, 5000).tolist():
        if tokens[number] >= 48:
            gaps = np.diff(sequences[number].blocks)
            jumps, steps = jumps + int((gaps != 1).sum()), steps + len(gaps)
            kv.release(sequences[number])
            tokens[number] = 0
        tokens[number] = tokens[number] + 1 if tokens[number] else 32
        kv.grow(sequences[number], tokens[number], ())
    assert steps > 1000
    assert jumps < 0.02 * steps
