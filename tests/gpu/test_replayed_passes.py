"""Passes by a GPU's kernels, eager and replayed: the tokens of a CPU's passes, the same bits however they are run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor.errors import PassError, UnsupportedModelError
from qllm.executor.gpu import packed_attention
from qllm.executor.graphs.buckets import Bucket, bucket_of, buckets
from qllm.executor.graphs.runner import compare
from qllm.executor.model.packed_batch import Batch
from qllm.executor.model.passes import RunningPass
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import Split, whole
from qllm.executor.testing import run_batch
from tests.executor.test_families import FAMILIES, language_model, prompts, states
from tests.gpu.plain import plain_kernels
from tests.gpu.tape import TapeRecorder
from tests.gpu.worlds import replaying, sequences, unpacked

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")
assert plain_kernels  # a fixture of this module


@pytest.fixture(scope="module")
def model():
    return unpacked(num_hidden_layers=2)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def begin(runner, entries, **settings) -> RunningPass:
    return runner.begin([(s, len(s.tokens) - s.computed) for s in entries], **settings)


def test_kernels_give_the_tokens_of_a_cpus_passes(model):
    want = run_batch(Runner(model, 64, 4), sequences(4, 22, 1), 6)
    for split in (whole, lambda batch: Split(3, 4), lambda batch: Split(1, batch.rows)):
        runner = Runner(model, 64, 4, split, kernels=True)
        assert run_batch(runner, sequences(4, 22, 1), 6) == want
    runner = replaying(model)
    for _ in range(2):
        assert run_batch(runner, sequences(4, 22, 1), 6) == want
    assert {*runner.recorded} == {Bucket(4, 32), Bucket(4, 0)}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_gives_the_same_tokens_replayed(model_type):
    language_model(model_type)
    try:
        model = unpacked(model_type)
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    want = run_batch(Runner(model, kv_blocks=40, block_size=4), states(prompts()), 6)
    runner = replaying(model, 40)
    assert run_batch(runner, states(prompts()), 6) == want
    alone = runner.recurrent or runner.unpacked  # sequences are computed one by one, and no pass is recorded
    assert runner.graphs == ("off" if alone else "use"), "it was not recorded"
    assert run_batch(Runner(model, 40, 4, lambda b: Split(2, 3), kernels=True), states(prompts()), 6) == want


def logits_of(runner, *lengths):
    return run_to_end(begin(runner, sequences(*lengths)))


def test_a_pass_has_the_same_bits_however_it_is_run(model):
    """Replayed, eagerly for want of a free copy, and suspended at every point while others of its bucket run."""
    runner, lengths = replaying(model, 200), (5, 9, 30)
    want = logits_of(runner, *lengths)
    recorded = runner.recorded[Bucket(0, 64)]
    recorded[0].free = False
    assert torch.equal(logits_of(runner, *lengths), want)
    recorded[0].free = True
    others = sequences(11, 40)
    for other in others:
        other.blocks = [block + 100 for block in other.blocks]
    mine = begin(runner, sequences(*lengths))
    points = 0
    while mine.advance() is not None:
        points += 1
        assert not recorded[0].free
        run_to_end(begin(runner, others))
        for other in others:
            other.computed = 0
    assert points == 2 * 2  # attention and experts of two layers
    assert torch.equal(mine.logits, want)
    assert recorded[0].free


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_padding_touches_nothing_that_is_real(model, data):
    decoding = data.draw(st.lists(st.integers(1, 30), max_size=4))
    chunks = data.draw(st.lists(st.tuples(st.integers(2, 20), st.integers(0, 20)), max_size=4 - len(decoding)))
    if not decoding and not chunks:
        return
    runner, plain = replaying(model, 300), Runner(model, 300, 4)
    plain.make_cache()
    entries = [(n, n - 1) for n in decoding] + [(new + cached, cached) for new, cached in chunks]
    found = []
    for one in (runner, plain):
        some = sequences(*(n for n, _ in entries))
        for store in (*one.cache.keys, *one.cache.values):
            store[:-1] = torch.linspace(-1, 1, store[:-1].numel()).view_as(store[:-1])
        before = [store.clone() for store in (*one.cache.keys, *one.cache.values)]
        for s, (_, cached) in zip(some, entries, strict=True):
            s.computed = cached
        own = [s.blocks[p // 4] * 4 + p % 4 for s in some for p in range(s.computed, len(s.tokens))]
        running = begin(one, some)
        found.append((run_to_end(running), running.routing, [s.tokens for s in (e.seq for e in running.sampled)]))
        for store, old in zip((*one.cache.keys, *one.cache.values), before, strict=True):
            store[own] = old[own]
            assert torch.equal(store, old)
    (logits, routing, tokens), (right, right_routing, right_tokens) = found
    assert routing == right_routing
    assert tokens == right_tokens
    assert torch.allclose(logits, right, atol=1e-4)
    assert runner.recorded


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=12), st.integers(1, 64))
def test_a_bucket_has_room_for_its_passes(news, max_seqs):
    class Cache:
        block_size, n_blocks, rings = 4, 10_000, None

    batch = Batch([(s, len(s.tokens)) for s in sequences(*news)], Cache())
    bucket = bucket_of(batch, max_seqs)
    if bucket is None:
        assert batch.rows - batch.n_decode > 512 or len(news) - batch.n_decode > 8 or batch.n_decode > min(max_seqs, 32)
        return
    assert bucket in [*buckets(max_seqs)]
    room = bucket.room(0)
    assert batch.n_decode <= room.decode
    assert batch.rows - batch.n_decode <= room.rows - room.decode
    assert sum(-(-e.n // 64) for e in batch.entries[batch.n_decode :]) <= room.tiles
    assert len(batch.sampled) <= room.samples
    assert bucket.decode == 0 or batch.n_decode > 0


def test_a_pass_may_be_closed_or_fail_at_every_point(model):
    runner = replaying(model, 100)
    want = logits_of(runner, 5, 9)
    (recorded,) = runner.recorded[Bucket(0, 32)]
    for at in range(5):
        for end in (RunningPass.close, lambda running: running.fail(ValueError("x"))):
            running = begin(runner, sequences(5, 9))
            for _ in range(at):
                running.advance()
            if end is RunningPass.close:
                running.close()
            elif at:
                with pytest.raises(ValueError, match="x"):
                    end(running)
            assert recorded.free or not at
            running.close()
            assert recorded.free
            assert torch.equal(logits_of(runner, 5, 9), want)


def test_cut_and_merging_passes_are_not_replayed(model):
    runner = replaying(model, 100)
    want = logits_of(runner, 5, 9)
    replays = sum(tape.replays for tape in tapes(runner))
    for settings_ in ({"split": Split(2, 1)}, {"split": Split(99, 2)}, {"queues": True}, {"partners": []}):
        running = begin(runner, sequences(5, 9), **settings_)
        assert torch.allclose(run_to_end(running), want, atol=1e-5)
    assert sum(tape.replays for tape in tapes(runner)) == replays


def tapes(runner):
    return [piece for some in runner.recorded.values() for each in some for _, piece in each._pieces]


def test_a_model_that_cannot_be_recorded_is_served_eagerly(model, caplog):
    class Refuses(TapeRecorder):
        def record(self, run):
            raise RuntimeError("operation not permitted when stream is capturing")

    runner = replaying(model, 100, recorder=Refuses)
    want = run_batch(Runner(model, 64, 4), sequences(4, 22, 1), 3)
    assert run_batch(runner, sequences(4, 22, 1), 3) == want
    assert "passes cannot be recorded" in caplog.text


def test_what_replays_otherwise_is_not_kept(model, caplog):
    class Forgets(TapeRecorder):
        def record(self, run):
            tape, result = super().record(run)
            del tape.steps[-3:]
            return tape, result

    runner = replaying(model, 100, recorder=Forgets)
    logits_of(runner, 5)
    assert runner.graphs == "off"
    assert "its logits are others when it is replayed" in caplog.text


def test_all_buckets_are_recorded_at_load_and_progress_is_told(model):
    runner = replaying(model, 64, graphs="load", max_seqs=3)
    told = []
    runner.record_all(lambda done, todo: told.append((done, todo)))
    assert {bucket: len(some) for bucket, some in runner.recorded.items()} == dict.fromkeys(buckets(3), 2)
    assert told == [(n, 26) for n in range(27)]


@pytest.mark.parametrize("groups", [1, 3, 7])
def test_long_chunks_are_attended_in_large_blocks(model, monkeypatch, groups):
    """A prompt's own rows, chunks over what is cached, cut or not: what tiles give, but for rounding."""
    found = {}
    for large in (False, True):
        monkeypatch.setattr(packed_attention, "LARGE_ROWS", 9 if large else 1000)
        monkeypatch.setattr(packed_attention, "suits", lambda q, k, v: True)
        runner = Runner(model, 200, 4, kernels=True)
        some = sequences(60, 21, 8, 5)
        chunks = [(some[0], 25), (some[1], 21), (some[2], 8), (some[3], 5)]
        run_to_end(runner.begin(chunks, Split(99, groups)))
        some[1].tokens += [9] * 30
        decoding = [(some[0], 35), (some[1], 30), (some[3], 1)]
        some[3].tokens.append(7)
        points = 0
        running = runner.begin(decoding, Split(99, groups))
        while (point := running.advance()) is not None:
            points += point.stage == "attention"
        assert points == 2 * groups
        found[large] = running.logits
        assert len(found[large]) == 3
    assert torch.allclose(found[True], found[False], atol=1e-4)


def test_a_suspended_pass_tells_what_it_holds(model):
    runner = Runner(model, 200, 4, lambda batch: Split(1, 2), kernels=True)
    running = begin(runner, sequences(30))
    while (point := running.advance()) is not None and point.stage != "experts":
        pass
    hidden = 30 * 64 * 4
    assert running.held_bytes() > hidden
    running.close()


def test_where_memory_ends_what_is_recorded_stays(model, caplog):
    class Ends(TapeRecorder):
        left = 3

        def record(self, run):
            if not self.recorded_any and not Ends.left:
                raise torch.OutOfMemoryError("CUDA out of memory")
            Ends.left -= not self.recorded_any
            self.recorded_any = True
            return super().record(run)

        recorded_any = False

    runner = replaying(model, 64, graphs="load", recorder=Ends)
    runner.record_all()
    assert sum(map(len, runner.recorded.values())) == 3
    assert "no memory to record more passes" in caplog.text
    assert run_batch(runner, sequences(4, 22, 1), 3) == run_batch(Runner(model, 64, 4), sequences(4, 22, 1), 3)


def test_other_last_bits_are_told_and_kept(model, caplog):
    compare(torch.tensor([1.0, 2.001]), torch.tensor([1.0, 2.0]))
    assert "other last bits" in caplog.text
    with pytest.raises(PassError, match="its logits are others"):
        compare(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]))
