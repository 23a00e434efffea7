"""One simulation: a request trace, a policy and a GPU's timings in; a row per request out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import simpy

from qllm.scheduler import Limits, Pass, Policy, Request, RequestShed, RequestTooLarge, Scheduler, SchedulerError
from qllm.sim.device import Device, Observer, Process, fast_device, step_device
from qllm.sim.passes import GpuModel, SimulatedPass
from qllm.sim.routing import RecordedRouting, ResampledRouting, Routing, binomial
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import PassSlice, RunResult, Status
from qllm.traces.step_times.cost_model import PassCostModel, ticks
from qllm.traces.step_times.expected import expected_seconds
from qllm.traces.step_times.timings import Timings, TimingWarning

#: called with (seconds, what is recorded so far, the requests in the system by index)
Stop = Callable[[float, RunResult, Mapping[int, Request]], bool]


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
    stop: Stop | None = None,
    step_by_step: bool = False,
) -> RunResult:
    """Simulate a request trace on one GPU.

    The same arguments give the same result to the last bit.

    Args:
        trace: The requests.
        priorities: Priority of each of the trace's classes; lower is more urgent.
        policy: Decides what runs.
        limits: What the GPU can hold.
        steps: How long the steps of a pass take.
        popularity: Share of tokens routed to each expert, float[layers, experts]; uniform by default.
        seed: Of the routing's draws.
        routing: Recorded routing to use instead of draws.
        timeline: Whether to record a PassSlice for each stretch that a pass runs.
        until: When to stop, in seconds; by default when everybody is served.
        stop: Asked whenever a request arrives, before it enters; the run ends where it says so. Not with `until`.
        step_by_step: Whether to use the slow reference device.

    Returns:
        What became of each request.

    Raises:
        KeyError: A class has no priority.
        SchedulerError: The policy broke, or requests are left that nobody serves.
        ValueError: Both `until` and `stop` are given.
    """
    if until is not None and stop is not None:
        raise ValueError("give until or stop, not both")
    levels = [priorities[name] for name in trace.classes]
    _check_context(trace, steps.timings)
    workload = _Workload(trace, levels, Scheduler(policy, limits, expected_seconds(steps)))
    shares = uniform(steps) if popularity is None else popularity
    drawn = routing or Routing(shares, steps.timings.top_k, seed)
    gpu = GpuModel(steps, drawn, policy.granularity)
    slices: list[PassSlice] | None = [] if timeline else None
    env = simpy.Environment()
    device = Device(env, workload.scheduler, gpu, workload.record, None if slices is None else _observer(gpu, slices))
    device.start(step_device if step_by_step else fast_device)
    arrivals = env.process(workload.arrivals(env, device, stop))
    if stop is not None and env.run(arrivals):
        return workload.end(slices)
    env.run(until)
    left = workload.scheduler.requests
    if until is None and left:
        raise SchedulerError(
            f"the simulation stands still at {env.now:.6g} s with {len(left)} requests in the system, such as "
            f"{next(iter(left.values()))!r}: nothing runs, and nothing will"
        )
    lost = int((workload.result.status == Status.UNFINISHED).sum())
    if until is None and lost:
        raise SchedulerError(f"{lost} requests have not ended and are not in the system: the policy took them out")
    return workload.end(slices)


def _check_context(trace: RequestTrace, timings: Timings) -> None:
    """Warn of requests that the model could not serve, in a text that is the same for all runs of a sweep."""
    limit = timings.context_limit
    if limit is not None and (trace.prompt_tokens + trace.output_tokens > limit).any():
        warnings.warn(
            f"{timings.model} takes {limit} tokens of prompt and output together (max_context of its timings); longer "
            "requests are simulated as if it took them",
            TimingWarning,
            stacklevel=3,
        )


def uniform(steps: PassCostModel) -> np.ndarray:
    """Return the popularity in which all experts get the same share, float64[layers, experts]."""
    return np.full((steps.layers, steps.n_experts), 1.0 / steps.n_experts)


def isolated_ttft(
    prompt_tokens: np.ndarray, *, limits: Limits, steps: PassCostModel, popularity: np.ndarray | None = None
) -> np.ndarray:
    """Compute the TTFT of prompts alone on an idle device, expected over what their tokens may be routed to.

    A lone request of a simulation takes that long on average; what it draws itself may take a little less or more.

    Args:
        prompt_tokens: Length of each prompt, int[n].
        limits: What the GPU can hold.
        steps: How long the steps of a pass take.
        popularity: Share of tokens routed to each expert, float[layers, experts]; uniform by default.

    Returns:
        Seconds, float64[n].
    """
    share = np.minimum((uniform(steps) if popularity is None else popularity) * steps.timings.top_k, 1.0)
    lengths, back = np.unique(prompt_tokens, return_inverse=True)
    return np.array([_isolated_prefill(int(n), limits.max_batched_tokens, steps, share) for n in lengths])[back]


def _isolated_prefill(tokens: int, max_tokens: int, steps: PassCostModel, share: np.ndarray) -> float:
    shares, place = np.unique(share, return_inverse=True)
    with np.errstate(divide="ignore"):
        missed = np.log1p(-share)  # the logarithm of a token's chance to go elsewhere, -inf where all come
    done, seconds = 0, 0.0
    while done < tokens:
        n = min(tokens - done, max_tokens)
        cost = steps.cost([(None, n, done)], 0, 0, int(done + n == tokens))
        # f is no line, so f of the mean is not the mean of f: few tokens at most experts have none.
        expected = np.array([steps.experts(counts) @ chance for counts, chance in (binomial(n, q) for q in shares)])
        empty = np.exp(n * steps.by_group(cost, missed)[:, 1:])  # chance that a further group has no tokens
        seconds += steps.total(cost, float(expected[place].sum() + cost.group_launch_s * (1 - empty).sum()))
        done += n
    return seconds


class _Workload:
    """The requests of one simulation and what is recorded of them."""

    def __init__(self, trace: RequestTrace, levels: list[int], scheduler: Scheduler):
        self.trace = trace
        self.levels = levels
        self.scheduler = scheduler
        self.result = RunResult.of(ticks(trace.arrival))

    def arrivals(self, env: simpy.Environment, device: Device, stop: Stop | None) -> Process:
        """SimPy process: each request enters at its time; returns whether `stop` ended it before."""
        scheduler = self.scheduler
        for r in self.requests():
            wait = r.arrival - env.now
            if wait > 0:
                yield env.timeout(wait)
            if stop is not None and stop(env.now, self.result, scheduler.requests):
                return True
            try:
                scheduler.add(r, r.arrival)
            except (RequestTooLarge, RequestShed) as error:
                self.result.rejected(r.id, str(error))
            else:
                device.poke()
        return False

    def requests(self) -> Iterator[Request]:
        """The trace's requests, made one by one."""
        t, levels = self.trace, self.levels
        rows = zip(
            self.result.arrival.tolist(),
            t.prompt_tokens.tolist(),
            t.output_tokens.tolist(),
            t.cls.tolist(),
            strict=True,
        )
        has_wants = t.has_wants
        for i, (arrival, prompt, output, cls) in enumerate(rows):
            wants = t.wants(i) if has_wants else {}
            yield Request(i, prompt, output, levels[cls], arrival, t.classes[cls], **wants)

    def record(self, done: list[Request]) -> None:
        """Requests have ended: keep what there is to know of them."""
        for r in done:
            self.result.finished(r.id, r)

    def end(self, slices: list[PassSlice] | None) -> RunResult:
        """The simulation is over."""
        result = self.result
        for r in self.scheduler.requests.values():
            result.launched(r.id, r)
        result.passes = self.scheduler.passes
        result.kv_peak = self.scheduler.kv.peak
        result.slices = slices
        return result


def _observer(gpu: GpuModel, slices: list[PassSlice]) -> Observer:
    def observe(p: Pass, run: SimulatedPass, start: float, end: float, first: int, last: int, suspended: bool) -> None:
        layer, stage, _ = gpu.steps.position(run.cost, last)
        slices.append(
            PassSlice(
                start=start,
                end=end,
                pass_id=p.id,
                priority=p.priority(),
                prefills=len(p.prefill),
                decodes=p.n_decode,
                tokens=p.tokens,
                first=first,
                last=last,
                first_layer=gpu.steps.position(run.cost, first)[0],
                layer=layer,
                stage=stage,
                suspended=suspended,
            )
        )

    return observe
