"""What the engine does differently on an accelerator, as far as a CPU can tell."""

from types import SimpleNamespace

import pytest
import torch

from qllm.executor.engine.clock import RealClock
from qllm.executor.engine.loop import Loop
from qllm.executor.model.kv_cache import PagedKVCache
from qllm.executor.model.passes import RunAhead
from qllm.scheduler import Limits, Scheduler, make_policy


@pytest.mark.parametrize(("device", "current"), [("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_the_loops_thread_works_on_the_models_device(monkeypatch, device, current):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    runner = SimpleNamespace(cache=PagedKVCache(1, 1), device=torch.device(device))
    loop = Loop(runner, Scheduler(make_policy("fcfs"), Limits(kv_blocks=1)), RealClock())
    loop.stop()
    loop.run()
    assert chosen == current


def test_the_host_runs_ahead_by_one_point_and_records_the_same_events_anew(monkeypatch):
    made, log = [], []

    class Event:
        def __init__(self, device):
            made.append(self)
            self.moment = None

        def record(self):
            self.moment = len([1 for word, _ in log if word == "record"])
            log.append(("record", self.moment))

        def synchronize(self):
            log.append(("wait", self.moment))

    monkeypatch.setattr(torch, "Event", Event)
    run_ahead = RunAhead(torch.device("cuda"))
    for _ in range(5):
        run_ahead.mark()
    assert [moment for word, moment in log if word == "wait"] == [0, 1, 2, 3]
    assert log.index(("wait", 3)) > log.index(("record", 4))
    assert len(made) == 2
