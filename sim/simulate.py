"""One simulation: a request trace, a policy and a GPU's timings in; a row per request out."""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from heapq import heappop, heappush
from math import inf

import numpy as np
import simpy

from qllm.scheduler import Limits, Pass, Policy, Request, Scheduler, SchedulerError
from qllm.sim.device import Device, Observer, fast_device, step_device
from qllm.sim.isolated import uniform
from qllm.sim.load import WatchedScheduler
from qllm.sim.passes import GpuModel, SimulatedPass
from qllm.sim.replicas import Fleet, Replica
from qllm.sim.routing import RecordedRouting, ResampledRouting, Routing
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import LoadRecord, PassSlice, RunResult, Status
from qllm.traces.sessions import Sessions
from qllm.traces.step_times.cost_model import PassCostModel, ticks
from qllm.traces.step_times.expected import expected_seconds
from qllm.traces.step_times.timings import Timings, TimingWarning

#: called with (seconds, what is recorded so far, the requests in the system by index)
Stop = Callable[[float, RunResult, Mapping[int, Request]], bool]


def simulate(
    trace: RequestTrace,
    *,
    priorities: Mapping[str, int],
    policy: Policy | Sequence[Policy],
    limits: Limits,
    steps: PassCostModel,
    popularity: np.ndarray | None = None,
    router: str = "least_loaded",
    sessions: Sessions | None = None,
    seed: int = 0,
    routing: RecordedRouting | ResampledRouting | None = None,
    timeline: bool = False,
    load: bool = False,
    until: float | None = None,
    stop: Stop | None = None,
    prefix_cache: bool = False,
    step_by_step: bool = False,
) -> RunResult:
    """Simulate a request trace on one GPU, or on several behind a router.

    The same arguments give the same result to the last bit.

    Args:
        trace: The requests.
        priorities: Priority of each of the trace's classes; lower is more urgent.
        policy: Decides what runs; of several GPUs one object for each.
        limits: What each GPU can hold.
        steps: How long the steps of a pass take.
        popularity: Share of tokens routed to each expert, float[layers, experts]; uniform by default.
        router: How requests are shared among several GPUs, one of `qllm.sim.replicas.ROUTERS`.
        sessions: Which requests follow which, of as many as the trace has; by default as the trace says.
        seed: Of the routing's draws.
        routing: Recorded routing to use instead of draws, on one GPU.
        timeline: Whether to record a PassSlice for each stretch that a pass runs.
        load: Whether to record what each GPU holds after each decision and arrival, and the timeline too.
        until: When to stop, in seconds; by default when everybody is served.
        stop: Asked whenever a request arrives that follows no other, before it enters; the run ends where it says so.
            Not with `until`.
        prefix_cache: Whether each GPU keeps the KV of prompts for those that begin alike (`trace.prefixes`).
        step_by_step: Whether to use the slow reference device.

    Returns:
        What became of each request.

    Raises:
        KeyError: A class has no priority.
        SchedulerError: The policy broke, or requests are left that nobody serves.
        ValueError: Both `until` and `stop` are given, recorded routing for several GPUs, no policy, one policy for two
            GPUs, a router that there is not, sessions of another trace, or a prefix cache for a trace without prefixes.
    """
    policies = [policy] if isinstance(policy, Policy) else [*policy]
    if until is not None and stop is not None:
        raise ValueError("give until or stop, not both")
    if not policies or len({id(each) for each in policies}) < len(policies):
        raise ValueError("give a policy for each GPU, each an object of its own: it keeps what it knows of its GPU")
    sessions = trace.sessions if sessions is None else sessions
    if sessions is not None and len(sessions) != len(trace):
        raise ValueError(f"sessions are of {len(sessions)} requests, the trace has {len(trace)}")
    if routing is not None and len(policies) > 1:
        raise ValueError("recorded routing is that of one GPU")
    if prefix_cache and trace.prefixes is None:
        raise ValueError("prefix_cache: the trace says not which prompts begin alike")
    levels = [priorities[name] for name in trace.classes]
    _check_context(trace, steps.timings)
    shares = uniform(steps) if popularity is None else popularity
    env = simpy.Environment()
    workload = _Workload(trace, levels, sessions, env, inf if until is None else until)
    unit = workload.keep_prefixes(limits.block_size) if prefix_cache else 1
    slices: list[PassSlice] | None = [] if timeline or load else None
    watched = LoadRecord(trace.classes, trace.cls.tolist(), np.full(len(trace), np.nan)) if load else None
    workload.result.slices, workload.result.load = slices, watched
    replicas = []
    for i, each in enumerate(policies):
        make = Scheduler if watched is None else partial(WatchedScheduler, watched, i)
        scheduler = make(each, limits, expected_seconds(steps), unit)  # first: it refuses what is no policy
        drawn = routing or Routing(shares, steps.timings.top_k, seed, i)
        gpu = GpuModel(steps, drawn, each.granularity)
        observer = None if slices is None else _observer(gpu, slices, i)
        device = Device(env, scheduler, gpu, partial(workload.ended, i), observer, workload.next_event)
        replicas.append(Replica(scheduler, device))
    workload.fleet = Fleet(replicas, router, workload.rejected)
    for replica in replicas:
        replica.device.start(step_device if step_by_step else fast_device)
    arrivals = env.process(workload.arrivals(stop))
    if stop is not None and env.run(arrivals):
        return workload.end()
    env.run(until)
    left = workload.in_system()
    if until is None and left:
        raise SchedulerError(
            f"the simulation stands still at {env.now:.6g} s with {len(left)} requests in the system, such as "
            f"{next(iter(left.values()))!r}: nothing runs, and nothing will"
        )
    lost = int((workload.result.status == Status.UNFINISHED).sum())
    if until is None and lost:
        raise SchedulerError(f"{lost} requests have not ended and are not in the system: the policy took them out")
    return workload.end()


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


class _Workload:
    """The requests of one simulation and what is recorded of them."""

    fleet: Fleet

    def __init__(
        self, trace: RequestTrace, levels: list[int], sessions: Sessions | None, env: simpy.Environment, until: float
    ):
        self.trace = trace
        self.prompts, self.outputs, self.cls = (
            column.tolist() for column in (trace.prompt_tokens, trace.output_tokens, trace.cls)
        )
        self.has_wants = trace.has_wants
        self.sessions = sessions
        self.levels = levels
        self.env = env
        self.result = RunResult.of(ticks(trace.arrival))
        self.followers: dict[int, list[int]] = {}
        self.keys: Callable[[int], list[int]] | None = None  # of the beginning of each, for a prefix cache
        self.until = until
        self.next_arrival = 0.0  # of those that follow none, or the end of the run
        self.coming: list[tuple[float, int]] = []  # of those that follow: when they arrive, a heap
        self.think_s = ticks(np.zeros(0) if sessions is None else sessions.think_s)
        if sessions is not None:
            for i, before in enumerate(sessions.follows.tolist()):
                self.followers.setdefault(before, []).append(i)

    def arrivals(self, stop: Stop | None) -> Generator[simpy.Event, None, bool]:
        """SimPy process: each request that follows none enters at its time; returns whether `stop` ended it before."""
        env = self.env
        if len(self.fleet.replicas) > 1:
            self.result.replica = np.full(len(self.trace), -1, dtype=np.int16)
        for r in self.requests():
            wait = r.arrival - env.now
            if wait > 0:
                self.next_arrival = min(r.arrival, self.until)
                yield env.timeout(wait)
            if stop is not None and stop(env.now, self.result, self.in_system()):
                return True
            self.enter(r)
        self.next_arrival = self.until
        return False

    def next_event(self) -> float:
        """When something may come to a GPU that is not of its own making."""
        reacts = self.sessions is not None or self.fleet.is_queue  # what ends on one GPU makes something come
        return self.env.peek() if reacts else self.next_arrival

    def enter(self, r: Request) -> None:
        """`r` arrives now."""
        replica = self.fleet.arrive(r, r.arrival)
        if replica is not None:
            self.sent(replica, r)

    def sent(self, replica: int, r: Request) -> None:
        """`r` was sent to that replica."""
        if self.result.replica is not None:
            self.result.replica[r.id] = replica

    def requests(self) -> Iterator[Request]:
        """The trace's requests that follow no other, made one by one."""
        follows = None if self.sessions is None else self.sessions.follows
        for i, arrival in enumerate(self.result.arrival.tolist()):
            if follows is None or follows[i] < 0:
                yield self.request(i, arrival)

    def request(self, i: int, arrival: float) -> Request:
        """Request `i`, with what a policy or the prefix cache may know of it."""
        t, prompt, output, cls = self.trace, self.prompts[i], self.outputs[i], self.cls[i]
        more = t.wants(i) if self.has_wants else {}
        if self.keys is not None:
            more["prefix"] = self.keys(i)
        return Request(i, prompt, output, self.levels[cls], arrival, t.classes[cls], **more)

    def keep_prefixes(self, kv_block: int) -> int:
        """Requests say what they begin with from now on; returns the KV blocks of a unit of it."""
        assert self.trace.prefixes is not None  # else there is no prefix cache
        unit, self.keys = self.trace.prefixes.keys(kv_block)
        self.result.cached = np.zeros(len(self.trace), dtype=np.int64)
        return unit

    def follow(self, r: Request) -> None:
        """What follows `r`, which is over, comes once its client has thought."""
        now = self.env.now
        for i in self.followers.get(r.id, ()):
            heappush(self.coming, (now + float(self.think_s[i]), i))
            self.later(self.follow_up, float(self.think_s[i]))

    def follow_up(self) -> None:
        """Those whose clients have thought enter: of one instant in the trace's order, whichever GPU was first."""
        now = self.env.now
        while self.coming and self.coming[0][0] <= now:
            _, i = heappop(self.coming)
            self.result.arrival[i] = now
            self.enter(self.request(i, now))

    def from_queue(self) -> None:
        """Those that wait in front of all GPUs go where there is room."""
        for replica, r in self.fleet.fill(self.env.now):
            self.sent(replica, r)

    def later(self, call: Callable[[], None], seconds: float = 0.0) -> None:
        """Call when all that ends at that instant has ended, before anything is decided."""
        self.env.timeout(seconds).callbacks.append(lambda _: call())

    def in_system(self) -> Mapping[int, Request]:
        """The requests in the system, by index: those of all replicas, and those that wait in front of them."""
        found = [replica.scheduler.requests for replica in self.fleet.replicas]
        if self.fleet.waiting:
            found.append({r.id: r for *_, r in self.fleet.waiting})
        return found[0] if len(found) == 1 else ChainMap(*found)

    def rejected(self, r: Request, reason: str) -> None:
        """`r` cannot be served."""
        self.result.rejected(r.id, reason)
        self.follow(r)

    def ended(self, replica: int, done: list[Request]) -> None:
        """Requests have ended: keep what there is to know of them."""
        self.fleet.ended(replica, done)
        for r in done:
            self.result.finished(r.id, r)
            if self.followers:
                self.follow(r)
        if self.fleet.waiting:
            self.later(self.from_queue)

    def end(self) -> RunResult:
        """The simulation is over."""
        result = self.result
        for r in self.in_system().values():
            result.launched(r.id, r)
        schedulers = [replica.scheduler for replica in self.fleet.replicas]
        result.passes = sum(scheduler.passes for scheduler in schedulers)
        result.kv_peak = max(scheduler.kv.peak for scheduler in schedulers)
        return result


def _observer(gpu: GpuModel, slices: list[PassSlice], replica: int) -> Observer:
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
                replica=replica,
            )
        )

    return observe
