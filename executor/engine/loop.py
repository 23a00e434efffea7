"""The engine's loop: one thread that owns the scheduler, the model and the KV cache.

A message is a callable that the loop runs at the next preemption point or between two passes. At one instant a pass
ends, then requests arrive, then the scheduler decides; as in the simulator.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import RLock

import torch

from qllm.executor.engine.block_manager import BlockManager
from qllm.executor.engine.clock import Clock, Deadlines
from qllm.executor.engine.execution import (
    Execution,
    MergePartners,
    cost_of,
    entries_of,
    execution_of,
    sample_rows,
    sampled_by,
)
from qllm.executor.engine.recorder import ActivityRecorder, RunRecorder
from qllm.executor.engine.requests import EngineRequest, RequestTimes
from qllm.executor.errors import EngineClosed, ExecutorError
from qllm.executor.model.runner import Runner
from qllm.executor.model.split import Split
from qllm.scheduler import Pass, PolicyError, Request, RequestTooLarge, Scheduler, SchedulerError
from qllm.scheduler.passes import time_spent

Message = Callable[[], object]

log = logging.getLogger(__name__)


class Loop:
    """Serves requests until `stop()`; `runner` and `scheduler` agree on KV blocks. Only `send` is for other threads."""

    def __init__(self, runner: Runner, scheduler: Scheduler, clock: Clock):
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        self.runner = runner
        self.scheduler = scheduler
        self.clock = clock
        self.memory = BlockManager(runner.cache)
        self.partners = MergePartners(scheduler)
        self.sequences: dict[int, EngineRequest] = {}  #: everything in the system, by request id
        self.scheduled: deque[EngineRequest] = deque()  #: what arrives later, by arrival
        self.deadlines = Deadlines()
        self.recorder: RunRecorder | None = None  #: records passes, if anything does
        self.activity: ActivityRecorder | None = None  #: keeps the last ones, if anybody looks at them
        self.error: BaseException | None = None  #: what broke the loop
        self._stopping = False
        self._closed = False
        self._inbox_lock = RLock()  # nothing is put into the inbox of a closed loop; whoever puts may drop a stream

    # ---- the thread --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until stopped. An error of the engine itself (not of a pass) ends it, and every request with it."""
        try:
            if self.runner.device.type == "cuda":
                torch.cuda.set_device(self.runner.device)  # per thread too: kernels go to the current device
            with torch.inference_mode():  # per thread, and held around the loop: passes are suspended inside it
                while not self._stopping:
                    self._turn()
        except BaseException as error:
            self.error = error
            log.error("engine broke: %s", type(error).__name__)
            raise
        finally:
            self._close()

    def send(self, message: Message) -> None:
        """Have the loop run `message`, from any thread. Raises EngineClosed."""
        with self._inbox_lock:
            if self._closed:
                raise self._closed_error("request")
            self.inbox.put(message)

    def serve_by(self, scheduler: Scheduler, clock: Clock) -> None:
        """Go on by another scheduler, of the same limits, and another clock. Raises ExecutorError unless idle."""
        if self.sequences or self.scheduled:
            raise ExecutorError("an engine that serves requests keeps its scheduler")
        self.scheduler, self.clock, self.partners = scheduler, clock, MergePartners(scheduler)

    def stop(self) -> None:
        """End the loop at the next preemption point."""
        self._stopping = True

    def _turn(self) -> None:
        """One decision and what follows from it: the definition of serving."""
        self._receive()
        if self._stopping:
            return
        now = self.clock.now()
        p = self.scheduler.next(now)
        if p is None:
            self._idle()
        else:
            self._run(p, now)

    def _receive(self) -> None:
        """Take in what was sent and what is due."""
        while not self.inbox.empty():
            self.inbox.get()()
        if self.scheduled:
            now = self.clock.now()
            while self.scheduled and self.scheduled[0].request.arrival <= now:
                self.add(self.scheduled.popleft())
        for number in self.deadlines.due(self.clock):
            if number in self.sequences:
                self.abort(self.sequences[number], "deadline")

    def _idle(self) -> None:
        """Wait for the next message or the next arrival."""
        self.memory.check_idle(self.scheduler, len(self.sequences))
        wait = self.clock.idle(self.scheduled[0].request.arrival if self.scheduled else None)
        try:
            message = self.inbox.get(timeout=wait)
        except Empty:
            return
        message()

    # ---- requests ----------------------------------------------------------------------------------------------

    def add(self, sequence: EngineRequest) -> None:
        """A request arrives. What breaks meanwhile ends it alone, unless it is the policy, which decides for all."""
        request, name = sequence.request, f"request {sequence.request_id}"
        if self._closed:
            self._end(sequence, "error", self._closed_error(name))
            return
        try:
            self.scheduler.add(request, request.arrival)
        except Exception as error:
            if isinstance(error, SchedulerError) and not isinstance(error, PolicyError):
                log.warning("%s refused: %s", name, error)
                told = str(error).removeprefix(f"request {request.id}: ")  # the scheduler knows its number
                self._end(sequence, "error", type(error)(f"{name}: {told}"))
                return
            self.error = error
            self._end(sequence, "error", self._closed_error(name))
            raise
        self.sequences[request.id] = sequence
        if sequence.deadline is not None:
            self.deadlines.add(sequence.deadline, request.id)

    def reprioritize(self, sequence: EngineRequest, priority: int) -> None:
        """Another priority for a request, from the next decision on. Raises PolicyError, as `add` does."""
        if self.sequences.get(sequence.request.id) is not sequence or self._closed:
            return
        try:
            self.scheduler.reprioritize(sequence.request.id, priority, self.clock.now())
        except RequestTooLarge as error:
            log.warning("request %s keeps its priority: %s", sequence.request_id, error)

    def abort(self, sequence: EngineRequest, reason: str = "cancelled") -> None:
        """Remove a request, wherever it stands; its client hears of it at once."""
        if self._closed:
            return
        self._end(sequence, reason)
        if self.sequences.get(sequence.request.id) is sequence:
            self._remove(sequence)
        else:
            self.scheduled = deque(s for s in self.scheduled if s is not sequence)

    def _end(self, sequence: EngineRequest, reason: str, error: ExecutorError | ValueError | None = None) -> None:
        """Tell the client how its request ended, and what became of its time."""
        now, r = self.clock.now(), sequence.request
        p = self.scheduler.pass_of(r) if self.error is None else None  # once it broke, nothing is sure
        sequence.end(reason, RequestTimes.of(r, now, time_spent(r, p, now)), error)

    def _remove(self, sequence: EngineRequest) -> None:
        dropped = self.scheduler.abort(sequence.request.id, self.clock.now())
        if dropped is not None:
            self._discard(execution_of(dropped))
        elif sequence.request.id not in self.scheduler.requests:
            self._release(sequence)

    def _release(self, sequence: EngineRequest) -> None:
        """The request has left the scheduler: free what it holds here."""
        self.memory.release(sequence)
        del self.sequences[sequence.request.id]

    def _discard(self, execution: Execution) -> None:
        """Close a pass in which nobody is left."""
        execution.running.close()
        for sequence in execution.sequences:
            self._end(sequence, "cancelled")
            self._release(sequence)

    # ---- passes ------------------------------------------------------------------------------------------------

    def _run(self, p: Pass, now: float) -> None:
        """Start `p`, or go on with it, until it is suspended or ends."""
        clock, scheduler = self.clock, self.scheduler
        if p.cursor is None:
            try:
                p.cursor = self._begin(p)
            except Exception as error:
                self._fail_pass(p, error)
                return
        else:
            clock.resumed()
            now = clock.now()
        execution = execution_of(p)
        first = (execution.done, execution.place()[0])
        while True:
            try:
                if not execution.advance():
                    break
            except Exception as error:
                self._fail_pass(p, error)
                return
            self._receive()
            if self._stopping:
                return
            if p.cancelled or (execution.may_stop and scheduler.should_yield(p, clock.now())):
                self._record(p, execution, now, first, True)
                self._suspend(p, execution)
                return
        self._record(p, execution, now, first, False)
        self._finish(p, execution)

    def _begin(self, p: Pass) -> Execution:
        """The pass `p` over its sequences, with blocks for their new tokens; nothing of it ran yet."""
        steps = self.clock.steps
        cost = None if steps is None else cost_of(steps, p)
        for sequence, error in self.memory.move(p, self.sequences):
            log.error("request %s failed: its KV could not be moved: %s", sequence.request_id, type(error).__name__)
            self._end(sequence, "error", sequence.failure(error, "its KV could not be moved: "))
            self._remove(sequence)
        entries = entries_of(p, self.sequences, self.memory)
        split = None
        if steps is not None and cost is not None:
            split = Split(cost.experts_per_group, cost.query_blocks, steps.merge_rows)
        policy = self.scheduler.policy
        partners = self.partners if policy.merge else ()
        running = self.runner.begin(entries, split, partners, sample_rows, self.clock.asks_queues)
        sequences = tuple(sequence for sequence, _ in entries)
        return self.clock.execution(p, running, sequences, cost, policy.granularity)

    def _suspend(self, p: Pass, execution: Execution) -> None:
        if self.scheduler.suspended(p, self.clock.now()):
            self.clock.suspended()
        else:
            self._discard(execution)

    def _finish(self, p: Pass, execution: Execution) -> None:
        """`p` ended: hand its tokens out and let go of the requests that are done."""
        now = self.clock.now()
        sampled = sampled_by(execution.running)
        while self.scheduled and self.scheduled[0].request.arrival < now:  # before the pass ended, so added before
            self.add(self.scheduled.popleft())
        ended: list[Request] = []
        for sequence in sampled:
            stopped, error = sequence.take()
            if error is not None:
                self._end(sequence, "error", error)
            if stopped:
                ended.append(sequence.request)
        aborted = p.aborted or ()
        done = self.scheduler.finished(p, now, ended)
        for sequence in sampled:
            sequence.tell(sequence.request in done, now)
        for r in (*done, *aborted):
            sequence = self.sequences[r.id]
            self._end(sequence, "stop" if r in ended else "length")
            self._release(sequence)
        if self.recorder is not None:
            self.recorder.routing[p.id] = execution.running.kept_routing()

    def _fail_pass(self, p: Pass, error: Exception) -> None:
        """An exception in `p`: its requests end with it, and nobody else notices."""
        requests = self.scheduler.failed(p, self.clock.now())
        names = ", ".join(self.sequences[r.id].request_id for r in requests)
        log.error("pass %d failed, with requests [%s]: %s", p.id, names, type(error).__name__)
        for r in requests:
            sequence = self.sequences[r.id]
            self._end(sequence, "error", sequence.failure(error))
            self._release(sequence)
        if isinstance(error, torch.OutOfMemoryError) and self.runner.device.type != "cpu":
            torch.accelerator.empty_cache()

    def _record(self, p: Pass, execution: Execution, start: float, first: tuple[int, int], suspended: bool) -> None:
        for recorder in (self.recorder, self.activity):
            if recorder is not None:
                recorder.record(p, start, self.clock.now(), first, execution.done, execution.place(), suspended)

    # ---- the end -----------------------------------------------------------------------------------------------

    def _close(self) -> None:
        """End everything that is left, and what was sent until now."""
        try:
            for p in (*self.scheduler.suspended_passes, self.scheduler.running):
                if p is not None and p.cursor is not None:
                    execution_of(p).running.close()  # here: a greenlet ends in the thread that made it
        except Exception as error:  # a policy may have put anything in their place
            log.error("engine could not close its passes: %s", type(error).__name__)
        with self._inbox_lock:
            self._closed = True
        while not self.inbox.empty():
            self.inbox.get()()
        left = (*self.sequences.values(), *self.scheduled)
        for sequence in left:
            self._end(sequence, "error", self._closed_error(f"request {sequence.request_id}"))
        log.info("engine closed after %d passes; %d requests were left", self.scheduler.passes, len(left))
        self.sequences.clear()
        self.scheduled.clear()

    def _closed_error(self, what: str) -> EngineClosed:
        closed = EngineClosed(f"{what}: the engine " + (f"broke: {self.error!r}" if self.error else "was closed"))
        closed.__cause__ = self.error
        return closed
