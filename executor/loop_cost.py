"""What the engine takes between two passes: the end of one, the scheduler's decision, the next one's start."""

from __future__ import annotations

import statistics
from itertools import pairwise

import numpy as np
from transformers import PreTrainedModel

from executor.engine import Engine
from executor.replays import replay
from scheduler import Limits
from traces.requests import RequestTrace

PROMPT, OUTPUT, BLOCK = 8, 24, 16


def loop_seconds(model: PreTrainedModel, sequences: int) -> float:
    """Median seconds between two passes of an engine that decodes `sequences` requests together."""
    zeros = np.zeros(sequences)
    trace = RequestTrace(zeros, zeros.astype(int) + PROMPT, zeros.astype(int) + OUTPUT, zeros.astype(int), ("all",))
    blocks = sequences * -(-(PROMPT + OUTPUT) // BLOCK) + 1
    limits = Limits(max_seqs=sequences, max_tokens=sequences * PROMPT, kv_blocks=blocks, block_size=BLOCK)
    with Engine(model, policy="fcfs", limits=limits) as engine:
        slices = replay(engine, trace, priorities={"all": 0}).slices or []
    return max(0.0, statistics.median(after.start - before.end for before, after in pairwise(slices)))
