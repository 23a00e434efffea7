"""Sampling of a whole batch on an accelerator, run on a CPU: the same rules as row by row."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qllm.executor.sampling.device_sampling as device_sampling
from qllm.executor.engine.execution import sample_rows
from qllm.executor.sampling.device_sampling import sample_on_device
from qllm.executor.sampling.params import SamplingParams
from qllm.executor.sampling.sampling import sample, uniform

EDGE = 1e-5  # of a probability: what rounding may move

batches = st.lists(
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        top_k=st.sampled_from([0, 1, 3, 40, 1400]),
        top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-9]),
        min_tokens=st.sampled_from([0, 2]),
        stop=st.sampled_from([frozenset(), frozenset({0, 2})]),
    ),
    min_size=1,
    max_size=7,
)


def made_logits(seed, rows, vocab, ties):
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2
    return (logits * 2).round() / 2 if ties else logits


def tokens_near(row, p, number):
    """What an exact draw gives at numbers and shares of probability as near as rounding, by NumPy."""
    values = row.double().numpy()
    weights = np.exp((values - values.max()) / p.temperature)
    if p.top_k:
        weights[values < np.sort(values)[-min(p.top_k, len(values))]] = 0
    found = set()
    for share in (p.top_p * (1 - EDGE), min(1, p.top_p * (1 + EDGE))):
        order = np.argsort(-values, kind="stable")
        last = np.searchsorted(np.cumsum(weights[order]), share * weights.sum())
        kept = np.where(values >= values[order[min(last, len(order) - 1)]], weights, 0)
        edges = np.cumsum(kept) / kept.sum()
        first, past = (np.searchsorted(edges, min(max(number + d, 0), 1 - EDGE), "right") for d in (-EDGE, EDGE))
        found |= {token for token in range(first, past + 1) if kept[token] > 0}
    return found


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([3, 40, 1500, 20_001]), st.booleans(), batches, st.integers(0, 3))
def test_the_tokens_are_those_of_a_cpu_but_for_rounding(seed, vocab, ties, params, step):
    logits = made_logits(seed, len(params), vocab, ties)
    before = logits.clone()
    steps, seeds = [step] * len(params), range(seed, seed + len(params))
    expected = sample(logits, params, steps, seeds)
    found = sample_on_device(logits, params, steps, seeds)
    assert torch.equal(logits, before)
    for row, p, number_seed, one, other in zip(logits, params, seeds, expected, found, strict=True):
        if one != other:
            assert p.temperature > 0
            allowed = row.clone()
            allowed[sorted(p.stop) if step < p.min_tokens else []] = float("-inf")
            assert {one, other} <= tokens_near(allowed, p, uniform(number_seed, step))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([50, 9000]), batches, st.sampled_from([1, 20_000, 1 << 23]))
def test_a_request_draws_the_same_bit_for_bit_whoever_shares_its_batch(seed, vocab, params, at_once):
    logits = made_logits(seed, len(params), vocab, False)
    n, seeds = len(params), range(seed, seed + len(params))
    together = sample_on_device(logits, params, [1] * n, seeds)
    alone = [sample_on_device(logits[i : i + 1], [p], [1], [seeds[i]])[0] for i, p in enumerate(params)]
    assert together == alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_sampling, "AT_ONCE", at_once)
        assert sample_on_device(logits, params, [1] * n, seeds) == together


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 1.0), (3, 0.9), (3, 1.0)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "all -inf", "all forbidden"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_cannot_be_sampled_is_none_and_hurts_no_other(temperature, top_k, top_p, bad, dtype):
    logits = made_logits(1, 3, 60, False).to(dtype)
    p = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    params = [p, p, p]
    before = sample_on_device(logits, params, [0] * 3, [5, 6, 7])
    assert None not in before
    if bad == "all -inf":
        logits[1] = float("-inf")
    elif bad == "all forbidden":
        params[1] = SamplingParams(temperature, top_k, top_p, min_tokens=1, stop=frozenset(range(60)))
    else:
        logits[1, 7] = bad
    assert sample_on_device(logits, params, [0] * 3, [5, 6, 7]) == [before[0], None, before[2]]


def test_a_pass_in_which_nobody_is_sampled_gives_nothing():
    assert sample_on_device(torch.empty(0, 60), [], [], []) == []


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (0.25, 1), (0.5, 2), (1 - 2**-53, 2)])
def test_a_number_on_the_edge_of_two_tokens_draws_the_later_one(number, token, monkeypatch):
    monkeypatch.setattr(device_sampling, "uniform", lambda *_: number)
    logits = torch.tensor([[-1e9, 3.0, 3.0, -1e9]])
    assert sample_on_device(logits, [SamplingParams(1.0)], [0], [0]) == [token]
    assert sample_on_device(logits, [SamplingParams(1.0, top_k=2)], [0], [0]) == [token]


def test_logits_that_are_not_on_a_cpu_are_drawn_there():
    meta = torch.empty(2, 60, device="meta")
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_sampling, "sample_on_device", lambda *args: asked.append(args) or [1, 2])
        assert sample(meta, [SamplingParams()] * 2, [0, 0], [0, 0]) == [1, 2]
    assert asked[0][0] is meta


def test_an_accelerator_draws_all_rows_without_a_point_between():
    sequences = [SimpleNamespace(sampling=SamplingParams(1.0), seed=i, generated=0, state=None) for i in range(9)]
    running = SimpleNamespace(sampled=[SimpleNamespace(seq=s) for s in sequences])  # it has no `reach`
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_sampling, "sample_on_device", lambda logits, params, *_: [*range(len(params))])
        sample_rows(running, torch.empty(9, 60, device="meta"))
    assert [s.drawn for s in sequences] == [*range(9)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_as_a_cpu_does_and_alone_as_together():
    params = [
        SamplingParams(t, k, p, min_tokens=2, stop=frozenset({0, 2}))
        for t in (0.0, 0.7, 1.3)
        for k in (0, 1, 40, 2000)
        for p in (1.0, 0.9)
    ]
    logits = made_logits(3, len(params), 151_936, False)
    steps, seeds = [1] * len(params), range(len(params))
    found = sample(logits.cuda(), params, steps, seeds)
    expected = sample(logits, params, steps, seeds)
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= len(params) - 1  # one may lie at an edge
    alone = [sample(logits[i : i + 1].cuda(), [p], [1], [i])[0] for i, p in enumerate(params)]
    assert alone == found
