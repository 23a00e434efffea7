"""Long work on batches lets requests through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllm.server.batches import pauses
from qllm.server.batches.pauses import REST, WORK_S, with_pauses
from qllm.server.batches.store import Store
from tests.server.batch_support import CHAT, answered, jsonl


class Time:
    """A clock that stands still, unless somebody works or sleeps."""

    def __init__(self) -> None:
        self.now = self.slept = self.longest = self._awake = 0.0

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds
        self._awake += seconds
        self.longest = max(self.longest, self._awake)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        self._awake = 0.0


@given(work=st.lists(st.floats(0, 3 * WORK_S)))
def test_who_works_sleeps_in_proportion_and_misses_nothing(work: list[float]) -> None:
    time = Time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pauses, "time", time)
        taken = []
        for seconds in with_pauses(work):
            time.work(seconds)
            taken.append(seconds)
    assert taken == work
    assert time.longest <= WORK_S + max(work, default=0.0)
    assert time.slept <= REST * sum(work) * (1 + 1e-9)
    assert time.slept >= REST * (sum(work) - WORK_S) - 1e-9


def test_validating_and_writing_files_pause(tmp_path, monkeypatch) -> None:
    time = Time()
    monkeypatch.setattr(pauses, "time", time)
    monkeypatch.setattr(time, "perf_counter", lambda: time.work(WORK_S) or time.now)  # each look finds that it is time
    store = Store(tmp_path)
    id = store.create(CHAT, store.add_file("in", jsonl(50), 0)["id"], 0)["id"]
    store.validate(id, 0, 50)
    assert time.slept >= 2 * 50 * REST * WORK_S  # to read the lines, and to keep them
    before = time.slept
    store.finalize(id, "expired", 0)
    store.write_files(id, 0)
    assert time.slept - before >= 50 * REST * WORK_S
    assert len(answered(store, id)) == 50
    store.close()
