"""The engine's loop: one thread that owns the scheduler, the model and the KV cache.

Around it everything comes as a message, a callable in the inbox that the loop runs at the next preemption point or
between two passes. What happens at one instant happens in this order: a pass ends, requests arrive, the scheduler
decides; as in the simulator.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Lock

import torch

from qllm.executor.engine.block_manager import BlockManager
from qllm.executor.engine.clock import Clock, Execution, cost_of
from qllm.executor.engine.flights import Flight, MergePartners, flight_of
from qllm.executor.engine.jobs import Job
from qllm.executor.engine.recorder import RunRecorder
from qllm.executor.engine.sampling import sample
from qllm.executor.errors import EngineClosed, ExecutorError, RequestFailed
from qllm.executor.model.passes import RunningPass
from qllm.executor.model.runner import Runner
from qllm.executor.model.split import Split
from qllm.scheduler import Chunk, Pass, Request, Scheduler, SchedulerError
from qllm.traces.step_times.cost_model import PassCost

Message = Callable[[], object]


class Loop:
    """Serves jobs with one model until `stop()`. Only `send` is for other threads.

    runner, scheduler: must have the same number of KV blocks of the same size. clock: see `qllm.executor.engine.clock`.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, clock: Clock):
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        self.runner = runner
        self.scheduler = scheduler
        self.clock = clock
        self.memory = BlockManager(runner.cache)
        self.lenders = MergePartners(scheduler)
        self.jobs: dict[int, Job] = {}  #: everything in the system, by request id
        self.scheduled: deque[Job] = deque()  #: what arrives later, by arrival
        self.tape: RunRecorder | None = None  #: what is recorded of passes, if anything
        self.error: BaseException | None = None  #: what broke the loop
        self._stopping = False
        self._closed = False
        self._door = Lock()  # nothing is put into the inbox of a closed loop

    # ---- the thread --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until stopped. An error of the engine itself (not of a pass) ends it, and every request with it."""
        try:
            with torch.inference_mode():  # per thread, and held around the loop: passes are suspended inside it
                while not self._stopping:
                    self._turn()
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._close()

    def send(self, message: Message) -> None:
        """Have the loop run `message`, from any thread. Raises EngineClosed."""
        with self._door:
            if self._closed:
                raise self._why("request")
            self.inbox.put(message)

    def stop(self) -> None:
        self._stopping = True

    def _turn(self) -> None:
        """One decision and what follows from it: the definition of serving."""
        self._listen()
        now = self.clock.now()
        p = self.scheduler.next(now)
        if p is None:
            self._idle()
        else:
            self._fly(p, now)

    def _listen(self) -> None:
        """Take in what was sent and what is due."""
        while not self.inbox.empty():
            self.inbox.get()()
        if self.scheduled:
            now = self.clock.now()
            while self.scheduled and self.scheduled[0].request.arrival <= now:
                self.add(self.scheduled.popleft())

    def _idle(self) -> None:
        self._check()
        wait = self.clock.idle(self.scheduled[0].request.arrival if self.scheduled else None)
        try:
            message = self.inbox.get(timeout=wait)
        except Empty:
            return
        message()

    def _check(self) -> None:
        """Nobody is in the system: then nothing may be held (invariants I1 and I4)."""
        s = self.scheduler
        held = self.memory.held
        if self.jobs or s.requests or s.suspended_passes or held or s.kv.free != s.kv.total:
            raise ExecutorError(
                f"idle with {len(self.jobs)} jobs, {len(s.requests)} requests, {len(s.suspended_passes)} suspended "
                f"passes, {held} KV blocks held ({s.kv.total - s.kv.free} by the scheduler's count)"
            )

    # ---- requests ----------------------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        """A request arrives."""
        if self._closed:
            job.end("error", self._why(f"request {job.request.id}"))
            return
        try:
            self.scheduler.add(job.request, job.request.arrival)
        except SchedulerError as error:
            job.end("error", error)
        else:
            self.jobs[job.request.id] = job

    def abort(self, job: Job) -> None:
        """A request is taken out, wherever it stands; its client hears of it at once."""
        if self._closed:
            return
        if self.jobs.get(job.request.id) is job:
            self._take_out(job)
            job.end("cancelled")
        elif not job.ended:
            self.scheduled = deque(j for j in self.scheduled if j is not job)
            job.end("cancelled")

    def _take_out(self, job: Job) -> None:
        dropped = self.scheduler.abort(job.request.id, self.clock.now())
        if dropped is not None:
            self._discard(flight_of(dropped))
        elif job.request.id not in self.scheduler.requests:
            self._release(job)

    def _release(self, job: Job) -> None:
        """The request has left the scheduler: so does what it holds here."""
        self.memory.release(job)
        del self.jobs[job.request.id]

    def _discard(self, flight: Flight) -> None:
        """A pass in which nobody is left."""
        flight.running.close()
        for job in flight.jobs:
            self._release(job)
            job.end("cancelled")

    # ---- passes ------------------------------------------------------------------------------------------------

    def _fly(self, p: Pass, now: float) -> None:
        """Start `p`, or go on with it, until it is suspended or ends."""
        clock, scheduler = self.clock, self.scheduler
        if p.cursor is None:
            try:
                p.cursor = self._begin(p)
            except Exception as error:
                self._broke(p, error)
                return
        else:
            clock.resumed()
            now = clock.now()
        flight = flight_of(p)
        course, first = flight.course, (flight.course.done, flight.course.place()[0])
        while True:
            try:
                if not course.advance():
                    break
            except Exception as error:
                self._broke(p, error)
                return
            self._listen()
            if self._stopping:
                return
            if p.cancelled or (course.may_stop and scheduler.should_yield(p, clock.now())):
                self._record(p, course, now, first, True)
                self._suspend(p, flight)
                return
        try:
            tokens = self._sample(flight.running)
        except Exception as error:
            self._broke(p, error)
            return
        self._record(p, course, now, first, False)
        self._finish(p, flight, tokens)

    def _begin(self, p: Pass) -> Flight:
        steps = self.clock.steps
        cost: PassCost | None = None if steps is None else cost_of(steps, p)
        self._move(p)
        entries: list[tuple[Job, int]] = []
        chunk: Chunk
        for chunk in p.prefill:
            job = self.jobs[chunk.request.id]
            if chunk.context < job.computed:
                self.memory.forget(job)
            entries.append((job, chunk.tokens))
        if p.decode is not None:
            entries += [(self.jobs[id], 1) for id in p.decode.members]
        for job, n in entries:
            self.memory.grow(job, job.computed + n, self.jobs.values())
        split: Split | None = None
        if steps is not None and cost is not None:
            split = Split(cost.experts_per_group, cost.query_blocks, steps.merge_rows)
        running = self.runner.begin(entries, split)
        policy = self.scheduler.policy
        if policy.merge:
            running.partners = self.lenders
        course = self.clock.course(p, running, cost, policy.granularity)
        return Flight(course, tuple(job for job, _ in entries))

    def _sample(self, running: RunningPass) -> list[tuple[Job, int]]:
        jobs = [_job(entry.seq) for entry in running.sampled]
        if not jobs:
            return []
        generated = [job.generated for job in jobs]
        tokens = sample(running.logits, [job.sampling for job in jobs], generated, [job.seed for job in jobs])
        return list(zip(jobs, tokens, strict=True))

    def _suspend(self, p: Pass, flight: Flight) -> None:
        if self.scheduler.suspended(p, self.clock.now()):
            self.clock.suspended()
        else:
            self._discard(flight)

    def _finish(self, p: Pass, flight: Flight, tokens: list[tuple[Job, int]]) -> None:
        now = self.clock.now()
        while self.scheduled and self.scheduled[0].request.arrival < now:  # before the pass ended, so added before
            self.add(self.scheduled.popleft())
        ended: list[Request] = []
        for job, token in tokens:
            job.tokens.append(token)
            if token in job.sampling.stop:
                ended.append(job.request)
        aborted = p.aborted or ()
        done = self.scheduler.finished(p, now, ended)
        for job, token in tokens:
            if not job.ended:
                job.stream.put(token)
        for r in (*done, *aborted):
            job = self.jobs[r.id]
            self._release(job)
            job.end("stop" if r in ended else "length")
        if self.tape is not None:
            self.tape.routing[p.id] = flight.running.routing

    def _broke(self, p: Pass, error: Exception) -> None:
        """An exception in `p`: its requests end with it, and nobody else notices."""
        for r in self.scheduler.failed(p, self.clock.now()):
            job = self.jobs[r.id]
            self._release(job)
            job.end("error", _failure(job, error))
        if isinstance(error, torch.OutOfMemoryError) and self.runner.device.type != "cpu":
            torch.accelerator.empty_cache()

    def _record(self, p: Pass, course: Execution, start: float, first: tuple[int, int], suspended: bool) -> None:
        if self.tape is not None:
            self.tape.record(p, start, self.clock.now(), first, course.done, course.place(), suspended)

    # ---- memory ------------------------------------------------------------------------------------------------

    def _move(self, p: Pass) -> None:
        """KV to host memory and back, as the scheduler decided since the last launch. Where that breaks, the request
        whose KV it is ends."""
        memory = self.memory
        moves = [(r, memory.offload) for r in p.offloaded or ()] + [(r, memory.restore) for r in p.restored or ()]
        for r, move in moves:
            job = self.jobs.get(r.id)
            if job is None:
                continue  # it was aborted meanwhile
            try:
                move(job, self.jobs.values())
            except Exception as error:
                job.end("error", _failure(job, error, "its KV could not be moved: "))
                self._take_out(job)

    # ---- the end -----------------------------------------------------------------------------------------------

    def _close(self) -> None:
        """End everything that is left, and what was sent until now."""
        for p in (*self.scheduler.suspended_passes, self.scheduler.running):
            if p is not None and isinstance(p.cursor, Flight):
                p.cursor.running.close()  # here: a greenlet ends in the thread that made it
        with self._door:
            self._closed = True
        while not self.inbox.empty():
            self.inbox.get()()
        for job in (*self.jobs.values(), *self.scheduled):
            job.end("error", self._why(f"request {job.request.id}"))
        self.jobs.clear()
        self.scheduled.clear()

    def _why(self, what: str) -> EngineClosed:
        closed = EngineClosed(f"{what}: the engine " + (f"broke: {self.error!r}" if self.error else "was closed"))
        closed.__cause__ = self.error
        return closed


def _failure(job: Job, error: Exception, what: str = "") -> RequestFailed:
    traceback.clear_frames(error.__traceback__)  # they hold the pass's activations
    failure = RequestFailed(f"request {job.request.id}: {what}{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _job(sequence: object) -> Job:
    if not isinstance(sequence, Job):
        raise ExecutorError(f"{sequence!r} is no job of this engine")
    return sequence
