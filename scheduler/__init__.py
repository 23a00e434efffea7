"""The scheduler: one sans-IO object that decides in the simulator and in the real engine alike."""

from .batch import Batch
from .memory import Limits
from .passes import NEVER, Chunk, Pass
from .policies import POLICIES, Chunked, Fcfs, Layer, Policy, Priority, Qllm, build_policy, make_policy
from .request import Request, RequestTooLarge, SchedulerError, State, UnknownPolicy
from .scheduler import Scheduler

__all__ = [
    "NEVER",
    "POLICIES",
    "Batch",
    "Chunk",
    "Chunked",
    "Fcfs",
    "Layer",
    "Limits",
    "Pass",
    "Policy",
    "Priority",
    "Qllm",
    "Request",
    "RequestTooLarge",
    "Scheduler",
    "SchedulerError",
    "State",
    "UnknownPolicy",
    "build_policy",
    "make_policy",
]
