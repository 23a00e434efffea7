"""Penalties, biases, min_p and logprobs: as in transformers, on a CPU as on a device."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qllm.executor.errors import SamplingError
from qllm.executor.sampling.device_rows import changed_on_device
from qllm.executor.sampling.device_sampling import sample_on_device
from qllm.executor.sampling.grammar import Grammars
from qllm.executor.sampling.params import SamplingArguments, SamplingParams
from qllm.executor.sampling.penalties import Shifts
from qllm.executor.sampling.row_state import prepared
from qllm.executor.sampling.sampling import draw, sample

EDGE = 1e-5  # of a probability: what rounding may move

lists = st.lists(st.integers(0, 29), max_size=40)
penalties = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.8]),
        "top_k": st.sampled_from([0, 5]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "presence_penalty": st.sampled_from([0.0, 1.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.3, -0.7]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5]),
        "logit_bias": st.sampled_from([None, {3: 100, 4: -100.0}, {0: 0.25, 29: -1}]),
        "logprobs": st.sampled_from([None, 0, 5, 20]),
        "min_tokens": st.sampled_from([0, 100]),
        "stop": st.sampled_from([frozenset(), frozenset({1, 2})]),
    }
)


def logits_of(seed, rows=1, vocab=30):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def state_of(p, prompt, generated, vocab=30):
    """State of a request that has generated these tokens one by one."""
    _, state = prepared(p, prompt, Grammars(None, vocab))
    for n in range(len(generated) + 1) if state is not None else ():
        state.follow(prompt + generated[:n])
    return state


def changed(row, p, prompt, generated):
    """Logits `[vocab]` by transformers' processor, and OpenAI's formula for the rest, in float64."""
    scores = row.double()[None].clone()
    for token, bias in (p.logit_bias or {}).items():
        scores[0, token] += bias
    if prompt + generated:
        scores = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(torch.tensor([prompt + generated]), scores)
    counts = torch.tensor(np.bincount(generated, minlength=scores.shape[1]))
    return (scores - p.frequency_penalty * counts - p.presence_penalty * (counts > 0))[0]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1000), lists, lists, penalties)
def test_logits_change_as_in_transformers_and_by_openai_s_formula(seed, prompt, generated, given_):
    p = SamplingParams(**given_)
    row = logits_of(seed)
    before = row.clone()
    state = state_of(p, prompt, generated)
    if not p.shifts_logits:
        assert state is None or state.shifts is None
        return
    found = row.clone()
    state.shifts.apply(found[0].numpy())
    torch.testing.assert_close(found[0].double(), changed(row[0], p, prompt, generated), rtol=1e-5, atol=1e-5)
    assert torch.equal(changed_on_device(row, [0], [p], [len(generated)], [state]), found)
    assert torch.equal(row, before)


def test_following_token_by_token_is_following_all_at_once():
    p = SamplingParams(frequency_penalty=0.5, repetition_penalty=1.2, logit_bias={7: 1})
    tokens = np.random.default_rng(0).integers(0, 500, 3000).tolist()
    slow, fast = Shifts(p, tokens[:1000]), Shifts(p, tokens[:1000])
    for token in tokens[1000:]:
        slow.follow([token])
    fast.follow(tokens[1000:])
    rows = [logits_of(1, vocab=500)[0].numpy().copy() for _ in range(2)]
    slow.apply(rows[0])
    fast.apply(rows[1])
    assert (rows[0] == rows[1]).all()
    assert len(slow.ids) == len({*tokens, 7})


def warped(scores, p):
    """Probabilities `[vocab]` by transformers' warpers in vLLM's order: temperature, min_p, top_k, top_p."""
    scores = TemperatureLogitsWarper(p.temperature)(None, scores[None].double())
    for value, warper in ((p.min_p, MinPLogitsWarper), (p.top_k, TopKLogitsWarper)):
        scores = warper(value)(None, scores) if value else scores
    return (TopPLogitsWarper(p.top_p)(None, scores) if p.top_p < 1 else scores).softmax(-1)[0]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([3, 40, 1500]),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0.001, 0.1, 0.5, 1.0]),
    st.sampled_from([0, 1, 5, 1100]),
    st.sampled_from([1.0, 0.9, 0.3]),
)
def test_min_p_comes_before_top_k_and_top_p_as_in_vllm(seed, vocab, temperature, min_p, top_k, top_p):
    logits = logits_of(seed, vocab=vocab)
    p = SamplingParams(temperature, top_k, top_p, min_p=min_p)
    expected = warped(logits[0], p)
    edges = expected.cumsum(0)
    numbers = [(i + 0.5) / 64 for i in range(64)]
    clear = [u for u in numbers if (edges - u).abs().min() > EDGE]  # not within rounding of where two tokens meet
    right = torch.searchsorted(edges, torch.tensor(clear, dtype=torch.float64), right=True).tolist()
    assert draw(logits.expand(len(clear), -1), [p] * len(clear), clear) == right
    with pytest.MonkeyPatch.context() as patch:
        given_ = iter(clear)
        patch.setattr("qllm.executor.sampling.device_sampling.uniform", lambda *_: next(given_))
        n = len(clear)
        assert sample_on_device(logits.expand(n, -1), [p] * n, [0] * n, [0] * n) == right


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.tuples(penalties, lists, lists), min_size=1, max_size=6))
def test_a_device_chooses_and_tells_as_a_cpu_does_and_a_row_alone_as_together(seed, rows):
    params = [SamplingParams(**each) for each, _, _ in rows]
    logits, n, seeds = logits_of(seed, len(rows)), len(rows), range(seed, seed + len(rows))
    generated = [len(tokens) for _, _, tokens in rows]
    told = []
    for how in (sample, sample_on_device):
        states = [state_of(p, prompt, new) for p, (_, prompt, new) in zip(params, rows, strict=True)]
        tokens = how(logits, params, generated, seeds, states)
        alone = [how(logits[i : i + 1], [params[i]], [generated[i]], [seeds[i]], [states[i]])[0] for i in range(n)]
        assert tokens == alone
        told.append([(token, state and state.logprobs) for token, state in zip(tokens, states, strict=True)])
    for row, p, (token, mine), (other, its) in zip(logits, params, *told, strict=True):
        if token != other:  # a draw within rounding of where two tokens meet
            assert p.temperature > 0
            continue
        assert (mine is None) == (its is None) == (p.logprobs is None)
        if mine is not None:
            expected = row.log_softmax(-1)
            assert mine.chosen == pytest.approx(float(expected[token]), abs=1e-4)
            assert [id for id, _ in mine.top] == row.topk(p.logprobs).indices.tolist()
            assert [value for _, value in mine.top] == pytest.approx(
                expected.topk(p.logprobs).values.tolist(), abs=1e-4
            )
            assert [id for id, _ in its.top] == [id for id, _ in mine.top]
            assert (its.chosen, *(v for _, v in its.top)) == pytest.approx((mine.chosen, *(v for _, v in mine.top)))
    differing = sum(mine[0] != its[0] for mine, its in zip(*told, strict=True))
    assert differing <= 1


def test_rows_without_any_of_it_keep_their_tokens_beside_rows_with():
    plain = [SamplingParams(t, k, 0.9) for t in (0.0, 0.7) for k in (0, 5)]
    logits = logits_of(4, 8)
    before = [how(logits[:4], plain, [2] * 4, range(4)) for how in (sample, sample_on_device)]
    other = SamplingParams(1.0, presence_penalty=2.0, logprobs=3)
    states = [None] * 4 + [state_of(other, [1, 2], [3, 4]) for _ in range(4)]
    for how, right in zip((sample, sample_on_device), before, strict=True):
        assert how(logits, plain + [other] * 4, [2] * 8, range(8), states)[:4] == right


def test_more_logprobs_than_tokens_are_all_tokens():
    p = SamplingParams(logprobs=20)
    for how in (sample, sample_on_device):
        state = state_of(p, [1], [], vocab=3)
        how(logits_of(1, vocab=3), [p], [0], [0], [state])
        assert len(state.logprobs.top) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", [sample, sample_on_device])
def test_a_row_that_cannot_be_sampled_is_none_and_tells_nothing(bad, how):
    p = SamplingParams(repetition_penalty=1.5, logprobs=2, logit_bias={5: 1})
    states = [state_of(p, [1, 5], [5]) for _ in range(3)]
    logits = logits_of(2, 3)
    logits[1, 5] = bad
    found = how(logits, [p] * 3, [1] * 3, [0] * 3, states)
    assert [token is None for token in found] == [state.logprobs is None for state in states] == [False, True, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("min_p", value) for value in (-0.1, 1.1, "0.5", float("nan"), True)),
        *((f"{kind}_penalty", value) for kind in ("presence", "frequency") for value in (-2.1, 2.1, None)),
        *(("repetition_penalty", value) for value in (0, -1.0, 101, float("inf"))),
        *(("logit_bias", value) for value in ([1], {"1": 1.0}, {-1: 1.0}, {1: 101}, {1: float("nan")}, {1.0: 1}, "a")),
        *(("logprobs", value) for value in (-1, 21, True, 1.5)),
        *(("grammar", value) for value in ("a*", {}, True)),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(SamplingError, match=name):
        SamplingParams(**{name: value})


def test_a_bias_of_a_token_that_the_model_lacks_is_refused():
    with pytest.raises(SamplingError, match="logit_bias holds 30"):
        prepared(SamplingParams(logit_bias={30: 1.0}), [1], Grammars(None, 30))


def test_submit_takes_all_parameters_but_stop():
    assert SamplingArguments.__annotations__.keys() == SamplingParams.__dataclass_fields__.keys() - {"stop"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_changes_logits_to_the_bits_of_a_cpu_and_tells_the_same(dtype):
    vocab = 151_936
    logits = logits_of(3, 8, vocab).to(dtype)
    shifts = {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "logit_bias": {5: 3.0}, "logprobs": 5}
    params = [SamplingParams(t, min_p=m, **shifts) for t in (0.0, 0.8) for m in (0.0, 0.05)] * 2
    prompt, new = np.random.default_rng(0).integers(0, vocab, (2, 500)).tolist()
    told = []
    for where in ("cpu", "cuda"):
        states = [state_of(p, prompt, new, vocab) for p in params]
        tokens = sample(logits.to(where), params, [500] * 8, range(8), states)
        rows = changed_on_device(logits.to(where), range(8), params, [500] * 8, states).cpu()
        told.append((tokens, [state.logprobs.chosen for state in states], rows))
    assert torch.equal(told[0][2], told[1][2])
    assert told[0][0] == told[1][0]
    assert told[0][1] == pytest.approx(told[1][1], abs=1e-3)
