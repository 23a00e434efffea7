"""The device: a SimPy process that runs what the scheduler returns.

`fast_device` sleeps to the end of a pass with one timeout. Between two events nothing changes, so only an event that
makes `should_yield` true interrupts it; it then finds the next preemption point by bisection. `step_device` asks at
every point, as the engine does. Both give the same schedule to the last bit; the first is the one that is used, the
second is what it is checked against.

At one instant, what ends comes first, then what arrives, then what is decided: each has its priority among SimPy's
events of that instant (`FINISH`, `DECISION`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import simpy
from simpy.events import EventPriority

from qllm.scheduler import Pass, Request, Scheduler
from qllm.scheduler.repeats import goes_on, repeat, repeats
from qllm.sim.merging import Merging, merged_group_seconds, suspended_runs
from qllm.sim.passes import GpuModel, SimulatedPass
from qllm.traces.step_times.cost_model import TICK

#: priorities of events at one instant; arrivals have SimPy's own, 1
FINISH, DECISION = EventPriority(0), EventPriority(2)

Process = Generator[simpy.Event, Any, None]
#: called with (pass, run, start, end, steps done before, steps done after, whether it was suspended)
Observer = Callable[[Pass, SimulatedPass, float, float, int, int, bool], None]


class Device:
    """One GPU: the scheduler that decides for it, and what it does at the moment."""

    def __init__(
        self,
        env: simpy.Environment,
        scheduler: Scheduler,
        gpu: GpuModel,
        on_finished: Callable[[list[Request]], None],
        observer: Observer | None = None,
        next_event: Callable[[], float] | None = None,
    ):
        """`on_finished` hears of the requests that end with a pass, `observer` of each stretch that a pass ran.

        `next_event` tells when something may come to this device that it does not make itself; default: SimPy's next
        event.
        """
        self.env = env
        self.scheduler = scheduler
        self.gpu = gpu
        self.on_finished = on_finished
        self.observer = observer
        self.next_event = next_event or env.peek
        self.idle: simpy.Event | None = None  # what it waits for while nothing runs
        self.rested = False  # it stood idle for a time, and the next pass wakes it up
        self.interruptible: Pass | None = None  # the running pass, while an event may stop it
        self.rechecks = scheduler.rechecks  # what it decides changes with time
        self.process: simpy.Process  # from `start` on

    def start(self, kind: Callable[[Device], Process]) -> None:
        """Begin to run passes, with `fast_device` or `step_device`."""
        self.process = self.env.process(kind(self))

    def poke(self) -> None:
        """Something arrived: wake the device, or stop its pass if the scheduler says so or may say so later."""
        p = self.interruptible
        if p is not None:
            if self.rechecks or self.scheduler.should_yield(p, self.env.now):
                self.interruptible = None
                self.process.interrupt()
        elif self.idle is not None:
            idle, self.idle = self.idle, None
            idle.succeed()

    def rest(self) -> Process:
        """Nothing to do until something arrives."""
        since, self.idle = self.env.now, self.env.event()
        yield self.idle
        self.rested |= self.env.now > since

    def launch(self, p: Pass) -> SimulatedPass:
        """`p` begins."""
        run = self.gpu.start(p)
        if self.rested:
            self.rested = False
            run.wake()
        return run

    def sleep(self, seconds: float, priority: EventPriority = FINISH) -> simpy.Event:
        """An event `seconds` from now, before or after others of the same instant by `priority`."""
        env = self.env
        event = simpy.Event(env)
        event._ok = True  # as SimPy's Timeout does, which has no say in its priority
        event._value = None
        env.schedule(event, priority, seconds)
        return event

    def repeat(self, p: Pass, run: SimulatedPass) -> tuple[float, SimulatedPass]:
        """Passes like `p`, which begins, run to their ends as long as nothing is to be decided between them.

        Returns:
            When the last of them begins, for which `p` stands from then on, and that one.
        """
        start, times = self.env.now, repeats(self.scheduler, p)
        asked = goes_on(self.scheduler, p) if times else False
        if asked is False:
            return start, run
        while times and start + run.total < (until := self.next_event()):
            first, most = start, times if self.observer is None else 1
            ends, draw, seconds = self.gpu.repeat(p, first + run.total, most, until, None if asked is True else asked)
            if not ends:
                break
            if self.observer is not None:
                self.observer(p, run, first, ends[-1], 0, run.steps_in_all(), False)
            repeat(self.scheduler, p, ends, asked is not True)
            start = ends[-1]
            run = SimulatedPass(self.gpu, p, draw, seconds)
            times -= len(ends)
        return start, run

    def suspend(self, p: Pass, run: SimulatedPass) -> None:
        """`p` stops where `run` stands."""
        self.scheduler.suspended(p, self.env.now)
        p.cursor = run


def fast_device(device: Device) -> Process:
    """Runs passes; a pass that nothing interrupts costs one event."""
    env, scheduler, gpu, observer = device.env, device.scheduler, device.gpu, device.observer
    steps = gpu.steps
    stops = gpu.granularity != "iteration"
    merging = Merging(scheduler) if scheduler.policy.merge else None
    rechecks = stops and device.rechecks
    repeats_passes = (scheduler.steady or scheduler.asks_alike) and gpu.ahead is not None
    while True:
        if env.peek() == env._now:
            yield device.sleep(0.0, DECISION)
        p = scheduler.next(env._now)
        if p is None:
            yield from device.rest()
            continue
        run: SimulatedPass | None = p.cursor
        start = env._now
        if run is None:
            run = device.launch(p)
            if repeats_passes and not (merging is not None and scheduler.suspended_passes):
                start, run = device.repeat(p, run)
        else:
            start += steps.resume_s
        if merging is not None:
            merging.begin(run)
        origin, first, stopped = start - run.at, run.done, False
        end = origin + run.total
        while True:
            now = env._now
            until = end
            if rechecks and (again := scheduler.recheck_at(p, now)) < end:
                # No sooner than where it can stop, so that time passes whatever the policy says.
                done = run.next_point(max(again - origin, now - origin + TICK, run.at))
                until = end if done == run.steps_in_all() else origin + run.end(done - 1)
            try:
                if not (stops and scheduler.should_yield(p, now)):
                    if until == end and end < env.peek():  # nothing happens before: no event is needed to get there
                        env._now = end
                        break
                    if stops:
                        device.interruptible = p
                    yield device.sleep(max(until - now, 0.0), FINISH if until == end else DECISION)
                    device.interruptible = None
                    if until == end:
                        break
                    if not scheduler.should_yield(p, env._now):
                        continue
            except simpy.Interrupt:
                if rechecks and not scheduler.should_yield(p, env._now):
                    continue
            done = run.next_point(max(env._now - origin, run.at))
            if done == run.steps_in_all():
                yield device.sleep(end - env._now)
                break
            at = run.end(done - 1)
            yield device.sleep(origin + at - env._now)
            if env.peek() == env._now:
                yield device.sleep(0.0, DECISION)
            if scheduler.should_yield(p, env._now):
                run.done, run.at, stopped = done, at, True
                break
        if merging is not None:
            merging.end(run, first, run.done if stopped else None)
        if stopped:
            if observer is not None:
                observer(p, run, start, env._now, first, run.done, True)
            device.suspend(p, run)
            if steps.suspend_s:
                yield device.sleep(steps.suspend_s)
            continue
        if observer is not None:
            observer(p, run, start, end, first, run.steps_in_all(), False)
        if done_with := scheduler.finished(p, end):
            device.on_finished(done_with)


def step_device(device: Device) -> Process:
    """Runs passes step by step and asks at every preemption point: the reference."""
    env, scheduler, gpu, observer = device.env, device.scheduler, device.gpu, device.observer
    while True:
        yield device.sleep(0.0, DECISION)
        p = scheduler.next(env.now)
        if p is None:
            yield from device.rest()
            continue
        run: SimulatedPass | None = p.cursor
        start = env.now
        if run is None:
            run = device.launch(p)
        else:
            start += gpu.steps.resume_s
            yield device.sleep(gpu.steps.resume_s)
        times = run.steps.times(run.cost, run.counts())
        points = set(run.steps.points(run.cost, gpu.granularity).tolist())
        first, stopped = run.done, False
        for step in range(first, len(times)):
            seconds = float(times[step])
            if scheduler.policy.merge and run.place()[1] == "experts":
                seconds = merged_group_seconds(run, suspended_runs(scheduler))
            yield device.sleep(seconds)
            run.done, run.at = step + 1, run.at + seconds
            if step in points:
                yield device.sleep(0.0, DECISION)
                if scheduler.should_yield(p, env.now):
                    stopped = True
                    break
        if observer is not None:
            observer(p, run, start, env.now, first, run.done, stopped)
        if stopped:
            device.suspend(p, run)
            yield device.sleep(gpu.steps.suspend_s)
        else:
            device.on_finished(scheduler.finished(p, env.now))
