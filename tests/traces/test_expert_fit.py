"""The expert-layer model fitted to layers of any routing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllm.traces.step_times.expert_fit import fit_routed, nonnegative
from qllm.traces.step_times.file_format import TimingError


def layers(rng: np.random.Generator, n: int = 200) -> np.ndarray:
    """Uneven routing of 1 to 255 tokens, int[n, 8]."""
    tokens = rng.integers(1, 256, size=n)
    return np.array([rng.multinomial(2 * t, rng.dirichlet(np.ones(8))) for t in tokens])


def test_base_and_f_are_found_again():
    counts = layers(np.random.default_rng(0))
    true = np.where(counts > 0, 50e-6 + 2e-6 * counts, 0.0)
    fit = fit_routed(30e-6 + true.sum(axis=1), counts)
    assert fit.base == pytest.approx(30e-6, rel=1e-3)
    assert np.allclose(fit.seconds, 50e-6 + 2e-6 * fit.tokens, rtol=1e-3)
    assert fit.tokens[0] == 1
    assert fit.tokens[-1] == counts.max()


def test_the_mean_of_several_passes_is_that_of_their_layers():
    rng = np.random.default_rng(5)
    counts = [layers(rng, int(passes)) for passes in rng.integers(1, 6, 200)]
    seconds = [np.where(one > 0, 50e-6 + 2e-6 * one, 0.0).sum(axis=1).mean() + 30e-6 for one in counts]
    fit = fit_routed(seconds, counts)
    assert np.allclose(fit.seconds, 50e-6 + 2e-6 * fit.tokens, rtol=1e-3)
    assert fit.predicted(counts) == pytest.approx(np.array(seconds), rel=1e-3)


def test_disturbed_layers_do_not_move_the_fit():
    rng = np.random.default_rng(1)
    counts = layers(rng)
    seconds = 30e-6 + np.where(counts > 0, 50e-6 + 2e-6 * counts, 0.0).sum(axis=1)
    seconds[:10] *= 3
    fit = fit_routed(seconds, counts)
    assert not fit.kept[:10].any()
    assert np.allclose(fit.seconds, 50e-6 + 2e-6 * fit.tokens, rtol=0.05)


def test_noise_does_not_make_the_fit_faster_than_the_mean():
    """Errors relative to noisy measurements would: by 2 % at 10 % of noise."""
    rng = np.random.default_rng(3)
    counts = layers(rng, 3000)
    true = 30e-6 + np.where(counts > 0, 50e-6 + 2e-6 * counts, 0.0).sum(axis=1)
    fit = fit_routed(true * rng.normal(1, 0.1, len(true)), counts)
    assert fit.predicted(counts).sum() == pytest.approx(true.sum(), rel=0.005)


def test_layers_of_little_weight_have_little_say():
    rng = np.random.default_rng(4)
    counts = layers(rng, 400)
    true = 30e-6 + np.where(counts > 0, 50e-6 + 2e-6 * counts, 0.0).sum(axis=1)
    seconds, weights = true.copy(), np.ones(len(true))
    seconds[::2] *= 0.85
    weights[::2] = 0.1
    alike, weighed = fit_routed(seconds, counts), fit_routed(seconds, counts, weights)
    assert alike.predicted(counts).sum() < 0.95 * true.sum()
    assert weighed.predicted(counts).sum() == pytest.approx(true.sum(), rel=0.01)


def test_f_never_falls_and_nothing_is_negative_on_noise():
    rng = np.random.default_rng(2)
    counts = layers(rng, 40)
    fit = fit_routed(rng.random(40) + 0.1, counts)
    assert fit.base >= 0
    assert (np.diff(fit.seconds) >= 0).all()


@pytest.mark.parametrize("counts", [[[3, 0]], [[0, 0], [0, 0]]])
def test_too_few_layers_are_refused(counts):
    with pytest.raises(TimingError, match="at least 2 measured layers"):
        fit_routed([1.0] * len(counts), counts)


@given(st.integers(0, 10_000))
def test_nonnegative_least_squares_is_optimal(seed):
    """The conditions of an optimum: no gradient pushes a zero up, none is left at a positive value."""
    rng = np.random.default_rng(seed)
    design, target = rng.random((12, 5)) - 0.3, rng.random(12)
    x = nonnegative(design, target)
    gradient = design.T @ (target - design @ x)
    assert (x >= 0).all()
    assert (gradient <= 1e-6).all()
    assert np.allclose(gradient[x > 0], 0, atol=1e-6)
