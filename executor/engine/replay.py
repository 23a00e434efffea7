"""Replay of a request trace on the engine, with what the simulator reports of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from qllm.executor.engine.engine import Engine
from qllm.executor.engine.loop import Loop
from qllm.executor.engine.recorder import RunRecorder
from qllm.executor.engine.requests import EngineRequest
from qllm.executor.engine.sampling import SamplingParams
from qllm.executor.errors import ExecutorError
from qllm.scheduler import RequestTooLarge
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import RunResult
from qllm.traces.step_times.cost_model import ticks


def replay(engine: Engine, trace: RequestTrace, *, priorities: Mapping[str, int], seed: int = 0) -> RunResult:
    """Send `trace` to an idle engine and return what became of each request, when all have ended.

    Prompts are random token ids, and every request gets exactly its output tokens: stop tokens are ignored. Requests
    arrive when the trace says, however late the engine takes note, on either clock.

    Args:
        engine: serves nobody else meanwhile.
        trace: the requests; their arrivals count from now.
        priorities: of each of the trace's classes; lower is more urgent.
        seed: of the prompts.

    Returns:
        The times of each request in seconds since the call, the slices of all passes and the routing of each pass.

    Raises:
        KeyError: a class has no priority.
        RequestError: a request is longer than the model's positions.
        ExecutorError: the engine is not idle, or a pass broke.
        EngineClosed: the engine was closed, or broke.
    """
    levels = [priorities[name] for name in trace.classes]
    rng = np.random.default_rng(seed)
    arrival = ticks(trace.arrival)
    sequences = [
        engine.make_request(
            rng.integers(engine.vocabulary, size=prompt).tolist(), output, levels[cls], SamplingParams(), at
        )
        for at, prompt, output, cls in zip(
            arrival.tolist(),
            trace.prompt_tokens.tolist(),
            trace.output_tokens.tolist(),
            trace.cls.tolist(),
            strict=True,
        )
    ]
    recorder = engine.call(lambda loop: _begin(loop, sequences))
    for sequence in sequences:
        with suppress(RequestTooLarge):
            sequence.stream.result()
    passes = engine.call(_end)
    return _result(sequences, arrival, recorder, passes)


def _begin(loop: Loop, sequences: list[EngineRequest]) -> RunRecorder:
    """Schedule `sequences`, their arrivals counted from now."""
    if loop.sequences or loop.scheduled or loop.recorder is not None:
        raise ExecutorError("a replay needs an idle engine")
    now = loop.clock.now()
    for sequence in sequences:
        sequence.request.arrival += now
    loop.recorder = RunRecorder(now, loop.scheduler.passes)
    loop.scheduled.extend(sequences)
    return loop.recorder


def _end(loop: Loop) -> int:
    recorder, loop.recorder = loop.recorder, None
    return loop.scheduler.passes - (recorder.passes if recorder else 0)


def _result(sequences: list[EngineRequest], arrival: np.ndarray, recorder: RunRecorder, passes: int) -> RunResult:
    result = RunResult.of(arrival)
    for i, sequence in enumerate(sequences):
        if sequence.error is None:
            result.finished(i, sequence.request, recorder.origin)
        else:
            result.rejected(i, str(sequence.error))
    result.passes = passes
    result.slices = recorder.slices
    result.routing = recorder.counts()
    return result
