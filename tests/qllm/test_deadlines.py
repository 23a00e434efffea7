"""The deadline of a class: from the configuration to the requests that the scheduler sees."""

from __future__ import annotations

import numpy as np
import pytest

from qllm.config.config import load_config
from qllm.config.workload import request_trace
from qllm.traces.requests.trace import RequestTrace, TraceError
from tests.cli_support import write_config


def test_a_class_gives_its_requests_their_bounds(tmp_path) -> None:
    path = write_config(tmp_path)
    plain = request_trace(load_config(path, ["rate=5"]), 0)
    assert plain.max_ttft_s is None
    assert plain.wants(0) == {}
    trace = request_trace(load_config(path, ["rate=5", "classes.ls.deadline={ttft: 2, tpot: 0.05}"]), 0)
    ls = trace.cls == trace.classes.index("ls")
    assert (trace.max_ttft_s == np.where(ls, 2.0, np.inf)).all()
    assert (trace.max_tpot_s == np.where(ls, 0.05, np.inf)).all()
    first = int(np.flatnonzero(ls)[0])
    assert trace.wants(first) == {"max_ttft_s": 2.0, "max_tpot_s": 0.05}
    assert trace != plain
    assert trace.head(3).max_tpot_s.tolist() == trace.max_tpot_s[:3].tolist()
    assert (trace.arrival == plain.arrival).all(), "the workload is the same"


def test_columns_that_are_none() -> None:
    two = np.array([1, 1])
    with pytest.raises(TraceError, match=r"max_tpot_s: must hold 2 numbers > 0"):
        RequestTrace(np.zeros(2), two, two, np.zeros(2, dtype=int), max_tpot_s=np.array([1.0, 0.0]))
    with pytest.raises(TraceError, match="tenants: has 1 elements, arrival has 2"):
        RequestTrace(np.zeros(2), two, two, np.zeros(2, dtype=int), tenants=("a",))
    trace = RequestTrace(np.zeros(2), two, two, np.zeros(2, dtype=int), tenants=("a", "b"))
    assert trace.wants(1) == {"tenant": "b"}
    assert trace.head(1).tenants == ("a",)
