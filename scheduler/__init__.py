"""The scheduler: one sans-IO object that decides in the simulator and in the real engine alike."""

if __name__ != "qllm.scheduler":
    raise ImportError("this package is called qllm.scheduler: from qllm.scheduler import ...")

from qllm.scheduler.memory import Limits
from qllm.scheduler.pass_builder import PassBuilder
from qllm.scheduler.passes import NEVER, Chunk, Pass
from qllm.scheduler.policies.classic import Chunked, Fcfs, Hybrid, Layer, Priority, Qllm
from qllm.scheduler.policies.registry import POLICIES, build_policy, make_policy
from qllm.scheduler.policies.slack import Slack
from qllm.scheduler.policy import Granularity, Policy
from qllm.scheduler.request import (
    PolicyError,
    Request,
    RequestShed,
    RequestTooLarge,
    SchedulerError,
    State,
    UnknownPolicy,
)
from qllm.scheduler.scheduler import Scheduler

__all__ = [
    "NEVER",
    "POLICIES",
    "Chunk",
    "Chunked",
    "Fcfs",
    "Granularity",
    "Hybrid",
    "Layer",
    "Limits",
    "Pass",
    "PassBuilder",
    "Policy",
    "PolicyError",
    "Priority",
    "Qllm",
    "Request",
    "RequestShed",
    "RequestTooLarge",
    "Scheduler",
    "SchedulerError",
    "Slack",
    "State",
    "UnknownPolicy",
    "build_policy",
    "make_policy",
]
