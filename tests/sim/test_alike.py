"""Policies that are not steady, but know for how long decode passes are alike (`Policy.alike`)."""

from __future__ import annotations

import numpy as np
import pytest

from qllm.scheduler import Limits, Policy, PolicyError, Request, Scheduler, make_policy
from qllm.scheduler.repeats import goes_on
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings
from tests.worlds import run

STEPS = PassCostModel(affine_timings(layers=2, experts=4))
COLUMNS = ("first_launch", "first_token", "finish", "running", "suspended", "preemptions")


def alone(output: int = 40, priority: int = 0) -> RequestTrace:
    return RequestTrace(np.zeros(1), np.array([5]), np.array([output]), np.array([priority]), ("ls", "be", "bulk"))


def mixed(seed: int, n: int = 30) -> RequestTrace:
    """LS that decodes for long, beside BE prompts that are long and BE that decodes."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 2, n)
    prompts = np.where(classes == 0, rng.integers(1, 50, n), rng.integers(500, 6000, n))
    outputs = rng.integers(1, 200, n)
    return RequestTrace(np.cumsum(rng.exponential(0.05, n)), prompts, outputs, classes, ("ls", "be", "bulk"))


class Asked(type(make_policy("slack"))):
    """Counts the passes that are chosen; it may be asked `alike`, since no answer follows that one."""

    chosen = 0

    def select(self, s, batch, now):
        self.chosen += 1
        super().select(s, batch, now)

    def alike(self, s, p):
        return super().alike(s, p)


@pytest.mark.parametrize("settings", [{}, {"be_share": 0.4}, {"tpot_stretch": 2.0}, {"tpot_stretch": 1.0}])
@pytest.mark.parametrize("seed", [1, 2])
def test_slack_decides_as_if_it_was_asked_about_each_pass(settings, seed):
    policies = [Asked(**settings), Asked(**settings)]
    fast, slow = (
        run(mixed(seed), policy, Limits(max_seqs=16, kv_blocks=2000), STEPS, step_by_step=policy is policies[1])
        for policy in policies
    )
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(fast, column), getattr(slow, column), err_msg=column)
    assert fast.passes == slow.passes
    assert policies[0].chosen < 0.8 * policies[1].chosen


@pytest.mark.parametrize("priority", [0, 1])
def test_who_decodes_alone_is_hardly_asked_about(priority):
    policy = Asked()
    assert run(alone(priority=priority), policy, Limits(), STEPS).passes == 40
    assert policy.chosen < 10


def test_a_subclass_with_answers_of_its_own_is_asked_each_time():
    class Other(Asked):
        def resume(self, s, suspended, now):
            return True

    policy = Other()
    run(alone(), policy, Limits(), STEPS)
    assert policy.chosen == 41, "the last time nobody is there"


def test_a_policy_that_hears_of_each_pass_may_say_when_it_has_heard_enough():
    class Counting(Policy):
        """Hears of passes, one way or the other."""

        heard, told = 0, 0

        def ran(self, s, p, now, ended):
            self.heard += 1

        def alike(self, s, p):
            def hears(begin, end):
                assert begin < end
                if self.told == 12:
                    return False
                self.told += 1
                return True

            return hears

    policy = Counting()
    assert run(alone(), policy, Limits(), STEPS).passes == 40
    assert (policy.heard, policy.told) == (28, 12)


@pytest.mark.parametrize("answer", [None, 1, "yes"])
def test_another_answer_is_refused(answer):
    odd = type("Odd", (Policy,), {"alike": lambda self, s, p: answer})()
    with pytest.raises(PolicyError, match=r"policy Odd: alike gave .*allowed: True, False, or a function"):
        run(alone(), odd, Limits(), STEPS)


def test_where_passes_are_learnt_by_their_size_each_is_told():
    s = Scheduler(make_policy("slack"), Limits())
    s.add(Request(0, 5, 9), 0.0)
    s.finished(s.next(0.0), 0.1)
    assert goes_on(s, s.next(0.1)) is False


def test_a_policy_that_does_not_say_has_no_passes_that_are_alike():
    assert Policy().alike(None, None) is False


def test_ls_that_is_suspended_may_go_on_between_decode_passes_of_ls():
    policy = make_policy("slack")
    s = Scheduler(policy, Limits(), lambda chunks, n, context: 1e-3)
    s.add(Request(0, 8, 5), 0.0)
    s.finished(s.next(0.0), 1.0)
    p = s.next(1.0)
    assert policy.alike(s, p)
    s.suspended_passes.append(p)
    assert policy.alike(s, p) is False
