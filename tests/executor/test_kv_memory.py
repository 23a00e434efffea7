"""KV memory: all of it at the start, as much as fits, and an engine that outlives its lack."""

from __future__ import annotations

import pytest
import torch

from qllm.executor.engine.engine import Engine
from qllm.executor.engine.stream import Stream
from qllm.executor.errors import KVMemoryError, RequestFailed
from qllm.executor.model import info
from qllm.executor.model.kv_cache import PagedKVCache
from qllm.executor.sampling.sampling import sample
from qllm.scheduler import Limits
from tests.engine_worlds import LAYERS, make_model

pytestmark = pytest.mark.filterwarnings("ignore:another engine of this process:RuntimeWarning")


@pytest.fixture(scope="module")
def model(one_thread):
    return make_model()


class NoRoom:
    """`torch.zeros` that has no memory for its n-th tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int):
        self._left, self._zeros = n, torch.zeros
        monkeypatch.setattr(torch, "zeros", self)

    def __call__(self, *args, **kwargs):
        self._left -= 1
        if self._left == 0:
            raise torch.OutOfMemoryError("no room for this tensor")
        return self._zeros(*args, **kwargs)


def test_a_layer_has_both_k_and_v_or_neither(monkeypatch):
    cache, like = PagedKVCache(4, 4), torch.ones(1, 2, 8)
    NoRoom(monkeypatch, 2)
    with pytest.raises(torch.OutOfMemoryError):
        cache.layer(0, like, like)
    assert (cache.keys, cache.values) == ([], [])
    cache.layer(0, like, like)
    assert (len(cache.keys), len(cache.values)) == (1, 1)


def test_kv_is_made_before_the_first_request(model, monkeypatch):
    with Engine(model, limits=Limits(kv_blocks=40)) as engine:
        assert [len(engine._runner.cache.keys), len(engine._runner.cache.values)] == [LAYERS, LAYERS]
        NoRoom(monkeypatch, 1)  # whoever makes KV now fails
        assert len(engine.submit([5, 6, 7], max_new_tokens=3, stop=()).result().tokens) == 3


@pytest.mark.parametrize("n", range(1, 2 * LAYERS + 1))
def test_kv_that_does_not_fit_is_refused_at_the_start(model, monkeypatch, n):
    facts = info.model_facts(model)
    monkeypatch.setattr("qllm.executor.engine.engine.model_facts", lambda _: facts)
    NoRoom(monkeypatch, n)
    with pytest.raises(
        KVMemoryError, match=r"limits.kv_blocks is 40: \d+ bytes of KV on cpu \(no room for this tensor"
    ):
        Engine(model, limits=Limits(kv_blocks=40))


def test_more_kv_than_the_machine_has_is_refused_before_it_is_touched(model):
    with pytest.raises(
        KVMemoryError, match=r"limits.kv_blocks is 10000000000: .* allowed: fewer, or None for what fits"
    ):
        Engine(model, limits=Limits(kv_blocks=10**10))


def test_limits_without_kv_blocks_mean_what_fits(model, monkeypatch):
    facts = info.model_facts(model)
    token_bytes = facts["kv_bytes_per_token"]
    monkeypatch.setattr(info, "memory_bytes", lambda _: (4000 * token_bytes, 10**12))
    fits = int(4000 * info.CPU_SHARE - 1) // 16
    for limits in (None, Limits(), Limits(max_seqs=3)):
        with Engine(model, limits=limits) as engine:
            assert (engine.limits.kv_blocks, engine.stats().total_blocks) == (fits, fits)
    with Engine(model, limits=Limits(max_seqs=3), kv_memory=200 * token_bytes) as engine:
        assert (engine.limits.max_seqs, engine.limits.kv_blocks) == (3, 12)


def outcome(stream: Stream) -> int | type:
    """The number of its tokens, or the type of what broke it."""
    try:
        return len(stream.result().tokens)
    except RequestFailed as error:
        return type(error.__cause__)


@pytest.mark.parametrize("where", ["offload", "restore", "advance", "sample"])
def test_lack_of_memory_never_ends_the_engine(model, monkeypatch, where):
    """Wherever it is met: only requests that were in it end."""
    limits = Limits(max_seqs=2, max_batched_tokens=64, kv_blocks=9, block_size=4, evict="offload")
    broken: list[object] = []

    def once(function):
        def call(*args, **kwargs):
            if not broken:
                broken.append(where)
                raise torch.OutOfMemoryError("no room")
            return function(*args, **kwargs)

        return call

    with Engine(model, policy="qllm", limits=limits) as engine:
        cache = engine._runner.cache
        if where in ("offload", "restore"):
            monkeypatch.setattr(cache, where, once(getattr(cache, where)))
        elif where == "advance":
            monkeypatch.setattr(engine._runner, "forward", once(engine._runner.forward))
        else:
            monkeypatch.setattr("qllm.executor.engine.execution.sample", once(sample))
        streams = [engine.submit([5] * 13, max_new_tokens=16, priority=1 - i % 2, stop=()) for i in range(6)]
        ended = [outcome(stream) for stream in streams]
        assert broken == [where]
        assert set(ended) == {16, torch.OutOfMemoryError}
        assert len(engine.submit([5, 6], max_new_tokens=4, stop=()).result().tokens) == 4
        assert engine.stats().free_blocks == 9
