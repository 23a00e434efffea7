"""Replay of a request trace on the engine, with what the simulator reports of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from qllm.executor.engine.engine import Engine
from qllm.executor.engine.jobs import Job
from qllm.executor.engine.loop import Loop
from qllm.executor.engine.recorder import RunRecorder
from qllm.executor.engine.sampling import SamplingParams
from qllm.executor.errors import ExecutorError
from qllm.scheduler import RequestTooLarge
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import RunResult, Status
from qllm.traces.step_times.cost_model import ticks


def replay(engine: Engine, trace: RequestTrace, *, priorities: Mapping[str, int], seed: int = 0) -> RunResult:
    """Send `trace` to an idle engine at its times and return what became of each request, when all have ended.

    Prompts are random token ids (`seed`), and every request gets exactly its output tokens: stop tokens are ignored.
    Requests arrive when the trace says, however late the engine takes note, on either clock. The result holds slices,
    and the routing of each pass. priorities: of each of the trace's classes, lower is more urgent.

    Raises KeyError for a class without priority, RequestError for lengths beyond the model's positions, ExecutorError
    where a pass broke, EngineClosed.
    """
    levels = [priorities[name] for name in trace.classes]
    rng = np.random.default_rng(seed)
    arrival = ticks(trace.arrival)
    jobs = [
        engine.job(rng.integers(engine.vocabulary, size=prompt).tolist(), output, levels[cls], SamplingParams(), at)
        for at, prompt, output, cls in zip(
            arrival.tolist(),
            trace.prompt_tokens.tolist(),
            trace.output_tokens.tolist(),
            trace.cls.tolist(),
            strict=True,
        )
    ]
    tape = engine.call(lambda loop: _begin(loop, jobs))
    for job in jobs:
        with suppress(RequestTooLarge):
            job.stream.result()
    passes = engine.call(_end)
    return _result(jobs, arrival, tape, passes)


def _begin(loop: Loop, jobs: list[Job]) -> RunRecorder:
    """Schedule `jobs`, their arrivals counted from now."""
    if loop.jobs or loop.scheduled or loop.tape is not None:
        raise ExecutorError("a replay needs an idle engine")
    now = loop.clock.now()
    for job in jobs:
        job.request.arrival += now
    loop.tape = RunRecorder(now, loop.scheduler.passes)
    loop.scheduled.extend(jobs)
    return loop.tape


def _end(loop: Loop) -> int:
    tape, loop.tape = loop.tape, None
    return loop.scheduler.passes - (tape.passes if tape else 0)


def _result(jobs: list[Job], arrival: np.ndarray, tape: RunRecorder, passes: int) -> RunResult:
    n = len(jobs)
    times = np.full((6, n), np.nan)
    counts = np.zeros((2, n), dtype=np.int64)
    status = np.zeros(n, dtype=np.int8)
    reasons: dict[int, str] = {}
    for i, job in enumerate(jobs):
        r = job.request
        if job.error is not None:
            status[i] = Status.REJECTED
            reasons[i] = str(job.error)
            continue
        waited = (r.queueing_s, r.running_s, r.suspended_s)
        times[:, i] = *(t - tape.origin for t in (r.first_launch, r.first_token, r.finish)), *waited
        counts[:, i] = r.preemptions, r.evictions
    first_launch, first_token, finish, queueing, running, suspended = times
    return RunResult(
        arrival=arrival,
        first_launch=first_launch,
        first_token=first_token,
        finish=finish,
        queueing=queueing,
        running=running,
        suspended=suspended,
        preemptions=counts[0],
        evictions=counts[1],
        status=status,
        reasons=reasons,
        makespan=float(np.nanmax(finish, initial=0.0)),
        passes=passes,
        slices=tape.slices,
        routing=tape.counts(),
    )
