"""Sequences for models that keep more or less than K and V of all tokens, and what transformers generates with them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from qllm.executor import Engine
from qllm.executor.model.kv_cache import Rings
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.passes import RunningPass
from qllm.executor.model.runner import Runner, run_to_end, window_of
from qllm.executor.model.split import Splitter
from qllm.executor.testing import run_batch
from qllm.scheduler import Limits
from tests.engine_worlds import finest

NEW = 8  #: tokens of each answer
RING = 2  #: blocks of a full ring: they hold the window of tiny models, 8 tokens, and no more


def prompts(*lengths: int) -> list[list[int]]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 90, (n,), generator=generator).tolist() for n in lengths]


def generated(model, prompt: list[int], n: int = NEW) -> list[int]:
    """What transformers continues it with."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def world_of(model, *lengths: int) -> tuple[PreTrainedModel, list[list[int]], list[list[int]]]:
    """The model, prepared; prompts of these lengths; and what transformers generates with it."""
    asked = prompts(*lengths)
    wanted = [generated(model, prompt) for prompt in asked]
    return prepare_model(model), asked, wanted


def sequences(asked: list[list[int]]) -> list[Sequence]:
    """One for each prompt, with blocks for 48 tokens."""
    return [sequence(p, i) for i, p in enumerate(asked)]


def sequence(prompt: list[int], place: int) -> Sequence:
    """A sequence with blocks for 48 tokens in one of eight places, and a full ring."""
    ring = range(place * RING, place * RING + RING)
    return Sequence(list(prompt), list(range(place * 12, place * 12 + 12)), ring=[*reversed(ring)])


def runner_of(model, splitter: Splitter = finest) -> Runner:
    """With a point wherever there can be one; layers that may keep a window alone do."""
    window = window_of(model)
    rings = None if window is None else Rings(8 * RING, RING, window)
    return Runner(model, kv_blocks=12 * 8, block_size=4, splitter=splitter, rings=rings)


def mixed_pass(model, asked: list[list[int]]) -> tuple[Runner, RunningPass]:
    """A pass over a part of one prompt, while another sequence decodes; nothing of it has run."""
    runner = runner_of(model)
    first, second = sequences(asked[2:4])
    run_to_end(runner.begin([(first, len(first.tokens)), (second, 5)]))
    first.tokens.append(7)
    return runner, runner.begin([(first, 1), (second, 7)])


def stopped(model, asked: list[list[int]], every: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of that pass alone, and where it stands still at one point while another sequence is served."""
    alone, points = run_to_end(mixed_pass(model, asked)[1]), 0
    _, running = mixed_pass(model, asked)
    while running.advance() is not None:
        points += 1
    assert points > 10
    for at in range(0, points, every):
        runner, running = mixed_pass(model, asked)
        for _ in range(at + 1):
            running.advance()
        run_batch(runner, [sequence(asked[4], 5)], 2)
        yield run_to_end(running), alone


def in_chunks(model, asked: list[list[int]], sizes: list[int]) -> list[list[int]]:
    """Answers where each pass takes so many tokens of every prompt, while others decode."""
    runner, all_ = runner_of(model), sequences(asked)
    with torch.inference_mode():
        for n in [*sizes, 30]:
            running = runner.begin((s, min(n, len(s.tokens) - s.computed)) for s in all_)
            logits = run_to_end(running)
            for entry, token in zip(running.sampled, logits.argmax(-1).tolist(), strict=True):
                entry.seq.tokens.append(token)
        run_batch(runner, all_, NEW)
    return [s.tokens[len(p) :][:NEW] for s, p in zip(all_, asked, strict=True)]


def evicted(model, asked: list[list[int]], evict: str, times: int) -> list[list[int]]:
    """Answers of an engine whose memory is short, each prompt sent so often; nothing is left in it."""
    limits = Limits(max_seqs=4, max_batched_tokens=24, kv_blocks=16, block_size=4, evict=evict)
    with Engine(model, policy="qllm", limits=limits) as engine:
        streams = [engine.submit(p, max_new_tokens=NEW, priority=i % 2, stop=()) for i, p in enumerate(asked * times)]
        answers = [s.result().tokens for s in streams]
        assert sum(s.times.evictions for s in streams) > 0
        stats = engine.stats()
        assert (stats.requests, stats.free_blocks) == (0, stats.total_blocks)
    return answers
