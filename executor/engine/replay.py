"""Replay of a request trace on the engine, with what the simulator reports of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import cast

import numpy as np

from qllm.executor.engine.engine import Engine
from qllm.executor.engine.loop import Loop
from qllm.executor.engine.recorder import RunRecorder
from qllm.executor.engine.requests import EngineRequest
from qllm.executor.errors import ExecutorError, RequestError
from qllm.executor.sampling.params import SamplingParams
from qllm.scheduler import RequestShed, RequestTooLarge
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import RunResult
from qllm.traces.step_times.cost_model import ticks


def replay(
    engine: Engine,
    trace: RequestTrace,
    *,
    priorities: Mapping[str, int],
    seed: int = 0,
    watch: Callable[[Callable[[], int]], None] = lambda _: None,
) -> RunResult:
    """Send `trace` to an idle engine and return what became of each request, when all have ended.

    Prompts are random token ids, and every request gets exactly its output tokens: stop tokens are ignored. Requests
    arrive when the trace says, however late the engine takes note, on either clock.

    Args:
        engine: serves nobody else meanwhile.
        trace: the requests; their arrivals count from now.
        priorities: of each of the trace's classes; lower is more urgent.
        seed: of the prompts.
        watch: called at the start with a function that tells, from any thread, how many requests have ended.

    Returns:
        The times of each request in seconds since the call, the slices of all passes and the routing of each pass.
        A request that the model or the KV budget can never take is rejected, with the reason.

    Raises:
        KeyError: a class has no priority.
        ExecutorError: the engine is not idle, or a pass broke.
        EngineClosed: the engine was closed, or broke.
    """
    levels = [priorities[name] for name in trace.classes]
    rng = np.random.default_rng(seed)
    arrival = ticks(trace.arrival)
    made: list[EngineRequest | RequestError] = []
    columns = (arrival, trace.prompt_tokens, trace.output_tokens, trace.cls)
    for i, (at, prompt, output, cls) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        tokens = rng.integers(engine.vocabulary, size=prompt).tolist()
        try:
            made.append(engine.make_request(tokens, output, levels[cls], SamplingParams(), at, wants=trace.wants(i)))
        except RequestError as error:
            made.append(error)
    sequences = [sequence for sequence in made if isinstance(sequence, EngineRequest)]
    watch(lambda: len(made) - sum(not sequence.ended for sequence in sequences))
    recorder = engine.call(lambda loop: _begin(loop, sequences))
    for sequence in sequences:
        with suppress(RequestTooLarge, RequestShed):
            engine.stream_of(sequence).result()
    passes, kv_peak = engine.call(_end)
    result = _result(made, arrival, recorder)
    result.passes, result.kv_peak = passes, kv_peak
    return result


def _begin(loop: Loop, sequences: list[EngineRequest]) -> RunRecorder:
    """Schedule `sequences`, their arrivals counted from now."""
    if loop.sequences or loop.scheduled or loop.recorder is not None:
        raise ExecutorError("a replay needs an idle engine")
    now = loop.clock.now()
    for sequence in sequences:
        sequence.request.arrival += now
    loop.scheduler.kv.least_free = loop.scheduler.kv.free  # the peak is that of this run
    loop.recorder = RunRecorder(now, loop.scheduler.passes)
    loop.scheduled.extend(sequences)
    return loop.recorder


def _end(loop: Loop) -> tuple[int, float]:
    """How many passes there were, and the largest share of the KV blocks in use."""
    recorder, loop.recorder = loop.recorder, None
    return loop.scheduler.passes - (recorder.passes if recorder else 0), loop.scheduler.kv.peak


def _result(made: list[EngineRequest | RequestError], arrival: np.ndarray, recorder: RunRecorder) -> RunResult:
    result = RunResult.of(arrival)
    for i, sequence in enumerate(made):
        error = sequence if isinstance(sequence, RequestError) else sequence.error
        if error is None:
            result.finished(i, cast(EngineRequest, sequence).request, recorder.origin)
        else:
            result.rejected(i, str(error))
    result.slices = recorder.slices
    result.routing = recorder.counts()
    return result
