"""Errors that come through the scheduler as they were raised."""

import pytest

from qllm.scheduler import Limits, Policy, Request, Scheduler, SchedulerError, UnknownPolicy, make_policy
from qllm.scheduler.policy import ask
from qllm.scheduler.request import PolicyError


def test_an_id_is_given_once():
    s = Scheduler(make_policy("fcfs"), Limits())
    s.add(Request(1, 5, 1, 0, 0.0), 0.0)
    with pytest.raises(SchedulerError, match="request 1: a request of that id"):
        s.add(Request(1, 5, 1, 0, 0.0), 0.0)


def test_a_setting_that_is_true_or_false():
    with pytest.raises(UnknownPolicy, match="merge is 'yes'"):
        make_policy("qllm", merge="yes")


def test_an_error_of_a_question_within_a_question_is_not_wrapped_again():
    class Nested(Policy):
        def level(self, r):
            raise PolicyError("inner")

    with pytest.raises(PolicyError, match=r"^inner$"):
        ask(Nested(), "level", Request(1, 5, 1, 0, 0.0))
