"""Sampling: filters, seeds and stop tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor.errors import SamplingError
from qllm.executor.sampling.largest import largest_k, largest_of
from qllm.executor.sampling.params import SamplingParams
from qllm.executor.sampling.sampling import draw, sample, uniform

LOGITS = torch.log(torch.tensor([[0.5, 0.05, 0.25, 0.2]]))


def tokens_at(params, numbers):
    return [draw(LOGITS, [params], [u])[0] for u in numbers]


GRID = [i / 200 for i in range(200)]


def test_greedy_takes_the_largest_logit():
    assert sample(LOGITS, [SamplingParams()], [0], [0]) == [0]


def test_the_draw_follows_the_distribution():
    drawn = tokens_at(SamplingParams(temperature=1.0), GRID)
    assert [drawn.count(t) / len(GRID) for t in range(4)] == pytest.approx([0.5, 0.05, 0.25, 0.2], abs=0.011)


def test_temperature_sharpens_and_flattens():
    cold, hot = (tokens_at(SamplingParams(temperature=t), GRID).count(0) for t in (0.1, 10.0))
    assert cold > 195
    assert 45 < hot < 70


def test_top_k_keeps_the_k_likeliest():
    assert set(tokens_at(SamplingParams(temperature=1.0, top_k=2), GRID)) == {0, 2}
    assert set(tokens_at(SamplingParams(temperature=1.0, top_k=99), GRID)) == {0, 1, 2, 3}


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {0}), (0.6, {0, 2}), (0.9, {0, 2, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, kept):
    assert set(tokens_at(SamplingParams(temperature=1.0, top_p=top_p), GRID)) == kept


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.sampled_from([50, 9000]), st.data())
def test_a_request_draws_the_same_whoever_shares_its_batch(seed, step, vocab, data):
    n = data.draw(st.integers(1, 5))
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed % 2**63))
    params = [
        SamplingParams(
            temperature=data.draw(st.sampled_from([0.0, 0.7, 1.5])),
            top_k=data.draw(st.integers(0, 60)),
            top_p=data.draw(st.sampled_from([0.9, 1.0])),
        )
        for _ in range(n)
    ]
    together = sample(logits, params, [step] * n, [seed] * n)
    alone = [sample(logits[i : i + 1], [params[i]], [step], [seed])[0] for i in range(n)]
    assert together == alone


def test_uniform_numbers_differ_by_seed_and_by_step_and_are_uniform():
    numbers = {uniform(seed, step) for seed in range(20) for step in range(20)}
    assert len(numbers) == 400
    assert abs(sum(numbers) / 400 - 0.5) < 0.05


def test_no_stop_token_before_min_tokens():
    params = SamplingParams(min_tokens=2, stop=frozenset({0, 2}))
    logits = LOGITS.clone()
    assert sample(logits, [params, SamplingParams()][:1], [1], [0]) == [3]
    assert sample(logits, [params], [2], [0]) == [0]
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("seed", -1)],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(SamplingError, match=name):
        SamplingParams(**{name: value})


def allowed_by_transformers(logits, p):
    """Probabilities `[vocab]` by transformers' own warpers."""
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = TemperatureLogitsWarper(p.temperature)(None, logits[None].double())
    if p.top_k:
        scores = TopKLogitsWarper(p.top_k)(None, scores)
    if p.top_p < 1:
        scores = TopPLogitsWarper(p.top_p)(None, scores)
    return scores.softmax(-1)[0]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([3, 40, 1500, 20_001]),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 5, 40, 1100, 1400]),
    st.sampled_from([1.0, 0.95, 0.5, 0.1]),
)
def test_the_distribution_is_that_of_transformers(seed, vocab, temperature, top_k, top_p):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 2
    p = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = allowed_by_transformers(logits, p)
    edges = expected.cumsum(0)
    numbers = [(i + 0.5) / 64 for i in range(64)]
    clear = [u for u in numbers if (edges - u).abs().min() > 1e-5]  # not within rounding of where two tokens meet
    drawn = draw(logits.expand(len(clear), -1), [p] * len(clear), clear)
    assert drawn == torch.searchsorted(edges, torch.tensor(clear, dtype=torch.float64), right=True).tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 3), st.sampled_from([700, 6000, 20_001]), st.integers(1, 60), st.booleans()
)
def test_the_largest_logits_are_those_of_a_sort(seed, rows, vocab, k, coarse):
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    if coarse:
        logits = (logits * 4).round() / 4  # many ties
    values, ids = largest_k(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(values, logits.gather(1, ids))
    assert all(len(set(row)) == k for row in ids.tolist())
    best, at = largest_of(logits)
    assert torch.equal(best, values[:, 0])
    assert at.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


def test_tokens_that_tie_with_the_kth_are_kept_as_elsewhere():
    logits = torch.tensor([2.0, 2.0, 2.0, 1.0, 0.0])
    p = SamplingParams(temperature=1.0, top_k=2)
    numbers = [(i + 0.5) / 30 for i in range(30)]
    drawn = draw(logits.expand(30, -1), [p] * 30, numbers)
    assert [drawn.count(token) for token in range(5)] == [10, 10, 10, 0, 0]
    assert (allowed_by_transformers(logits, p)[:3] - 1 / 3).abs().max() < 1e-6
    alike = torch.zeros(1, 3000)  # far more ties than candidates
    assert draw(alike, [SamplingParams(temperature=1.0, top_k=5)], [0.999]) == [2997]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 1.0), (3, 0.9)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "all -inf"])
@pytest.mark.parametrize("vocab", [60, 20_001])
def test_a_row_that_cannot_be_sampled_is_none_and_hurts_no_other(temperature, top_k, top_p, bad, vocab):
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(1))
    p = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    before = sample(logits, [p] * 3, [0] * 3, [5, 6, 7])
    if bad == "all -inf":
        logits[1] = float("-inf")
    else:
        logits[1, 7] = bad
    assert sample(logits, [p] * 3, [0] * 3, [5, 6, 7]) == [before[0], None, before[2]]
