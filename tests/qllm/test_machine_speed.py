"""The speed of a machine is found in what its passes took."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.timings import affine_timings
from qllm.validation.machine_speed import Call, PassSeconds, Speed, at_speed, seconds_by, speed_of

BOUND = 8
STEPS = PassCostModel(affine_timings(layers=3, experts=4, host_s=1e-4))


def passes_on(steps: PassCostModel, prompts: bool = True, decoding: bool = True) -> list[PassSeconds]:
    """Passes that took what `steps` says, and what STEPS predicts for them."""
    asked = [((), n, 40 * n, n) for n in (1, 4, 8)] * decoding
    asked += [(((200, 0),), 0, 0, 1), (((64, 128), (30, 0)), 3, 100, 5)] * prompts
    found = []
    for chunks, n, context, rows in asked:
        tokens = sum(new for new, _ in chunks) + n
        routing = np.full((3, 4), tokens * 2 // 4 + 1)
        times = []
        for model in (steps, STEPS):
            cost = model.cost([(None, *chunk) for chunk in chunks], n, context, rows)
            times.append(model.total(cost, model.experts_of_pass(cost, routing)))
        found.append(PassSeconds(Call(chunks, n, context, rows, cost), *times, routing))
    return found


@given(few=st.floats(0.7, 1.4), many=st.floats(0.7, 1.4))
def test_both_numbers_are_found(few, many):
    real = PassCostModel(STEPS.timings.scaled(few, many, BOUND))
    passes = passes_on(real)
    slower = at_speed(STEPS, speed_of(passes, STEPS, BOUND))
    for p, again in zip(passes, passes_on(slower), strict=True):
        assert again.measured == pytest.approx(p.measured, rel=0.03)  # a straight line from few to many is bent


def test_the_speed_of_the_calibration_is_one():
    assert speed_of(passes_on(STEPS), STEPS, BOUND) == pytest.approx((1, 1, BOUND), rel=1e-4)


@pytest.mark.parametrize("kind", ["prompts", "decoding"])
def test_one_kind_of_pass_alone_is_explained(kind):
    real = PassCostModel(STEPS.timings.scaled(1.25))
    passes = passes_on(real, **{"prompts": False, "decoding": False, kind: True})
    speed = speed_of(passes, STEPS, BOUND)
    assert speed == pytest.approx((1.25, 1.25, BOUND), rel=0.01)


def test_small_and_large_steps_are_slowed_for_themselves():
    timings = at_speed(STEPS, Speed(2.0, 3.0, 1)).timings
    before = STEPS.timings
    assert timings.expert(1) == pytest.approx(2 * before.expert(1))
    assert timings.expert(65536) == pytest.approx(3 * before.expert(65536))
    assert timings.host_s == 2 * before.host_s
    assert timings.host_bandwidth == before.host_bandwidth


def test_at_one_speed_passes_are_cut_as_they_were():
    steps = PassCostModel(STEPS.timings, max_step=1e-4)
    slower = at_speed(steps, Speed(1.3, 1.3, BOUND))
    for p in passes_on(STEPS):
        chunks = [(None, *chunk) for chunk in p.call.chunks]
        asked = (chunks, p.call.n_decode, p.call.decode_context, p.call.rows)
        before, after = steps.cost(*asked), slower.cost(*asked)
        assert (after.group, after.pieces) == (before.group, before.pieces)
        assert seconds_by(slower, p) == pytest.approx(1.3 * seconds_by(steps, p), rel=1e-3)
