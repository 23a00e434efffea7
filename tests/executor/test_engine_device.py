"""What the engine does differently on an accelerator, as far as a CPU can tell."""

from types import SimpleNamespace

import pytest
import torch

from qllm.executor.engine.clock import RealClock
from qllm.executor.engine.loop import Loop
from qllm.executor.model.kv_cache import PagedKVCache
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
