"""One simulation: a request trace, a policy and a GPU's timings in; a row per request out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import simpy

from qllm.scheduler import Limits, Pass, Policy, Request, RequestTooLarge, Scheduler
from qllm.sim.device import Device, Observer, Process, fast_device, step_device
from qllm.sim.passes import GpuModel, SimulatedPass
from qllm.sim.routing import RecordedRouting, ResampledRouting, Routing
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import PassSlice, Status
from qllm.traces.results import RunResult as RunResult
from qllm.traces.step_times.cost_model import PassCostModel, ticks


def simulate(
    trace: RequestTrace,
    *,
    priorities: Mapping[str, int],
    policy: Policy,
    limits: Limits,
    steps: PassCostModel,
    popularity: np.ndarray | None = None,
    seed: int = 0,
    routing: RecordedRouting | ResampledRouting | None = None,
    timeline: bool = False,
    until: float | None = None,
    step_by_step: bool = False,
) -> RunResult:
    """Simulate `trace` on one GPU and return what became of each request.

    priorities: integer priority of each of the trace's classes, lower is more urgent. steps: step times
    (`qllm.traces.step_times.cost_model.PassCostModel`). popularity: share of tokens routed to each expert,
    float[layers, experts]; uniform by default. seed: of the routing's draws. routing: recorded routing to use instead
    of draws. timeline: record a PassSlice for each stretch that a pass runs. until: stop at that time (seconds) instead
    of when everybody is served. step_by_step: use the slow reference device.

    The same arguments give the same result to the last bit. Raises KeyError for a class without priority.
    """
    levels = [priorities[name] for name in trace.classes]
    workload = _Workload(trace, levels, Scheduler(policy, limits))
    shares = uniform(steps) if popularity is None else popularity
    drawn = routing or Routing(shares, steps.timings.top_k, seed)
    gpu = GpuModel(steps, drawn, policy.granularity)
    slices: list[PassSlice] | None = [] if timeline else None
    env = simpy.Environment()
    device = Device(env, workload.scheduler, gpu, workload.record, None if slices is None else _observer(gpu, slices))
    device.start(step_device if step_by_step else fast_device)
    env.process(workload.arrivals(env, device))
    env.run(until)
    return workload.result(slices)


def uniform(steps: PassCostModel) -> np.ndarray:
    """The popularity table in which all experts get the same share."""
    return np.full((steps.layers, steps.n_experts), 1.0 / steps.n_experts)


def isolated_ttft(
    prompt_tokens: np.ndarray, *, limits: Limits, steps: PassCostModel, popularity: np.ndarray | None = None
) -> np.ndarray:
    """TTFT in seconds, float64[n], of prompts of so many tokens alone on an idle device: the floor for any policy.
    Routing is taken at its mean."""
    share = np.minimum((uniform(steps) if popularity is None else popularity) * steps.timings.top_k, 1.0)
    lengths, back = np.unique(prompt_tokens, return_inverse=True)
    return np.array([_isolated_prefill(int(n), limits.max_batched_tokens, steps, share) for n in lengths])[back]


def _isolated_prefill(tokens: int, max_tokens: int, steps: PassCostModel, share: np.ndarray) -> float:
    done, seconds = 0, 0.0
    while done < tokens:
        n = min(tokens - done, max_tokens)
        cost = steps.cost([(None, n, done)], 0, 0, int(done + n == tokens))
        mean = n * share
        low = mean.astype(np.intp)
        experts_s = steps.experts(low)
        experts_s = experts_s + (mean - low) * (steps.experts(low + 1) - experts_s)
        further = np.minimum(steps.by_group(cost, mean)[:, 1:], 1).sum()  # groups with tokens, at most one each
        seconds += steps.total(cost, float(experts_s.sum() + cost.group_launch_s * further))
        done += n
    return seconds


class _Workload:
    """The requests of one simulation and what is recorded of them."""

    def __init__(self, trace: RequestTrace, levels: list[int], scheduler: Scheduler):
        self.trace = trace
        self.levels = levels
        self.scheduler = scheduler
        n = len(trace)
        self.arrival = ticks(trace.arrival)
        self.times = np.full((6, n), np.nan)  # rows as in result()
        self.counts = np.zeros((2, n), dtype=np.int64)
        self.status = np.full(n, int(Status.UNFINISHED), dtype=np.int8)
        self.reasons: dict[int, str] = {}
        self.last = 0.0

    def arrivals(self, env: simpy.Environment, device: Device) -> Process:
        """SimPy process: each request enters at its time."""
        scheduler, status = self.scheduler, self.status
        for r in self.requests():
            wait = r.arrival - env.now
            if wait > 0:
                yield env.timeout(wait)
            try:
                scheduler.add(r, r.arrival)
            except RequestTooLarge as error:
                status[r.id] = Status.REJECTED
                self.reasons[r.id] = str(error)
            else:
                device.poke()

    def requests(self) -> Iterator[Request]:
        """The trace's requests, made one by one."""
        t, levels = self.trace, self.levels
        rows = zip(
            self.arrival.tolist(), t.prompt_tokens.tolist(), t.output_tokens.tolist(), t.cls.tolist(), strict=True
        )
        for i, (arrival, prompt, output, cls) in enumerate(rows):
            yield Request(i, prompt, output, levels[cls], arrival, t.classes[cls])

    def record(self, done: list[Request]) -> None:
        """Requests have ended: keep what there is to know of them."""
        for r in done:
            i = r.id
            self.last = r.finish
            self.times[:, i] = r.first_launch, r.first_token, r.finish, r.queueing_s, r.running_s, r.suspended_s
            self.counts[:, i] = r.preemptions, r.evictions
            self.status[i] = Status.FINISHED

    def result(self, slices: list[PassSlice] | None) -> RunResult:
        for r in self.scheduler.requests.values():
            self.times[:2, r.id] = r.first_launch, r.first_token
        first_launch, first_token, finish, queueing, running, suspended = self.times
        preemptions, evictions = self.counts
        return RunResult(
            arrival=self.arrival,
            first_launch=first_launch,
            first_token=first_token,
            finish=finish,
            queueing=queueing,
            running=running,
            suspended=suspended,
            preemptions=preemptions,
            evictions=evictions,
            status=self.status,
            reasons=self.reasons,
            makespan=self.last,
            passes=self.scheduler.passes,
            slices=slices,
        )


def _observer(gpu: GpuModel, slices: list[PassSlice]) -> Observer:
    def observe(p: Pass, run: SimulatedPass, start: float, end: float, first: int, last: int, suspended: bool) -> None:
        where = gpu.steps.position
        first_layer = where(run.cost, first)[0]
        layer, stage, _ = where(run.cost, last)
        slices.append(
            PassSlice(
                start,
                end,
                p.id,
                p.priority(),
                len(p.prefill),
                p.n_decode,
                p.tokens,
                first,
                last,
                first_layer,
                layer,
                stage,
                suspended,
            )
        )

    return observe
