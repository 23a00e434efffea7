"""Whatever happens in whatever order, each line of a batch has one answer."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from qllm.server.batches.store import Conflict, NotFound, Store, StoreError
from qllm.server.batches.validation import check_lines
from tests.server.batch_support import CHAT, answered, jsonl, results


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    yield store
    store.close()


def begin(store: Store, lines: int = 3, now: float = 0.0) -> str:
    id = store.create(CHAT, store.add_file("in.jsonl", jsonl(lines), now)["id"], now)["id"]
    store.validate(id, now, 100)
    return id


class Crashes(RuleBasedStateMachine):
    """Lines are taken up and answered, also twice; between any two steps the process may end."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.store = Store(self.folder)
        self.lines = 5
        self.id = begin(self.store, self.lines)
        self.answers: dict[int, int] = {}  # the first answer to each line, which is the one that counts
        self.tries = 0

    def teardown(self):
        if self.store.batch(self.id)["status"] == "in_progress":
            for line in self.store.pending(self.id, 0, 100):
                self.answer(line.number, True)
        self.end()
        found = answered(self.store, self.id)
        cancelled = self.store.batch(self.id)["status"] == "cancelled"
        assert set(found) == {f"c{i}" for i in range(1, self.lines + 1)}
        for number in range(1, self.lines + 1):
            line = found[f"c{number}"]
            if number in self.answers:
                assert line["response"]["body"]["try"] == self.answers[number]
            else:
                assert cancelled
                assert line["error"]["code"] == "batch_cancelled"
        self.store.close()
        shutil.rmtree(self.folder)

    def end(self):
        """What the worker does once no line is left, or the batch was cancelled."""
        status = self.store.batch(self.id)["status"]
        if status == "in_progress":
            self.store.finalize(self.id, "completed", 1.0)
        elif status == "cancelling":
            self.store.finalize(self.id, "cancelled", 1.0)
        if self.store.batch(self.id)["status"] in ("finalizing", "cancelling"):
            self.store.write_files(self.id, 2.0)

    @rule(number=st.integers(1, 5), good=st.booleans())
    def answer(self, number, good):
        self.tries += 1
        open_ = self.store.batch(self.id)["status"] in ("in_progress", "cancelling")
        kept = self.store.answer(self.id, number, 200 if good else 400, {"try": self.tries})
        assert kept == (open_ and number not in self.answers)
        if kept:
            self.answers[number] = self.tries

    @rule()
    def crash(self):
        """Another process opens the copy that was on disk at this moment."""
        copy = tempfile.mkdtemp()
        shutil.copytree(self.folder, copy, dirs_exist_ok=True)
        self.store.close()
        shutil.rmtree(self.folder)
        self.folder, self.store = copy, Store(copy)

    @rule()
    def look(self):
        counts = self.store.batch(self.id)["request_counts"]
        assert counts["completed"] + counts["failed"] == len(self.answers)
        assert counts["total"] == self.lines
        if self.store.batch(self.id)["status"] == "in_progress":
            left = {line.number for line in self.store.pending(self.id, 0, 100)}
            assert left == set(range(1, self.lines + 1)) - set(self.answers)

    @precondition(lambda self: self.store.batch(self.id)["status"] in ("in_progress", "cancelling"))
    @rule()
    def cancel(self):
        assert self.store.cancel(self.id, 1.0)["status"] == "cancelling"

    @precondition(lambda self: len(self.answers) == 5 or self.store.batch(self.id)["status"] == "cancelling")
    @rule()
    def finish(self):
        self.end()


Crashes.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestCrashes = Crashes.TestCase


def test_each_answer_stands_in_the_file_of_its_kind(store):
    id = begin(store)
    store.answer(id, 1, 200, {"choices": []})
    store.answer(id, 2, 400, {"error": {"message": "no"}})
    store.answer(id, 3, 500, None, "The server broke.")
    store.finalize(id, "completed", 5.0)
    store.write_files(id, 6.0)
    batch = store.batch(id)
    assert (batch["status"], batch["finalizing_at"], batch["completed_at"]) == ("completed", 5, 6)
    assert batch["request_counts"] == {"total": 3, "completed": 1, "failed": 2}
    (good,) = results(store, batch["output_file_id"])
    bad = results(store, batch["error_file_id"])
    assert (good["custom_id"], good["error"], good["response"]["status_code"]) == ("c1", None, 200)
    assert [(line["custom_id"], line["response"] and line["response"]["status_code"]) for line in bad] == [
        ("c2", 400),
        ("c3", None),
    ]
    assert bad[1]["error"] == {"code": "server_error", "message": "The server broke."}
    assert store.file(batch["output_file_id"])["purpose"] == "batch_output"


def test_a_file_without_lines_of_its_kind_is_not_written(store):
    id = begin(store, 1)
    store.answer(id, 1, 200, {})
    store.finalize(id, "completed", 5.0)
    store.write_files(id, 6.0)
    assert store.batch(id)["error_file_id"] is None


def test_lists_come_newest_first_in_pages(store):
    ids = [begin(store) for _ in range(5)]
    first, more = store.batches(None, 2)
    second, still = store.batches(first[-1]["id"], 10)
    assert [b["id"] for b in first + second] == ids[::-1]
    assert (more, still) == (True, False)
    files, _ = store.files(None, 100, "batch", ascending=True)
    assert [f["id"] for f in files] == [store.batch(id)["input_file_id"] for id in ids]
    assert store.files(None, 100, "batch_output") == ([], False)


def test_what_is_not_there_is_not_found(store):
    for asked in (store.file, store.content, store.delete_file, store.batch, lambda id: store.batches(id, 1)):
        with pytest.raises(NotFound):
            asked("nothing")
    with pytest.raises(NotFound):
        store.create(CHAT, "nothing", 0.0)


def test_a_batch_at_its_end_cannot_be_cancelled(store):
    id = begin(store)
    store.finalize(id, "completed", 1.0)
    with pytest.raises(Conflict, match="finalizing"):
        store.cancel(id, 2.0)


def test_a_deleted_input_fails_its_batch_only_if_it_was_not_read(store):
    id = begin(store)
    store.delete_file(store.batch(id)["input_file_id"])
    assert len(store.pending(id, 0, 10)) == 3
    file = store.add_file("in.jsonl", jsonl(1), 0.0)["id"]
    store.create(CHAT, file, 0.0)
    with pytest.raises(Conflict):
        store.delete_file(file)


def test_a_folder_serves_one_process(store, tmp_path):
    with pytest.raises(StoreError, match="another server"):
        Store(tmp_path)


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        Store(tmp_path / "file" / "folder")
    (tmp_path / "batches.sqlite").write_text("no database, whatever its name says" * 100)
    with pytest.raises(StoreError, match="not a database"):
        Store(tmp_path)


GOOD = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {}}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"custom_id": None}, "invalid_custom_id"),
        ({"custom_id": ""}, "invalid_custom_id"),
        ({"custom_id": "\ud800"}, "invalid_custom_id"),
        ({"method": "GET"}, "invalid_method"),
        ({"url": "/v1/completions"}, "mismatched_endpoint"),
        ({"body": []}, "invalid_body"),
        ({"body": {"stream": True}}, "invalid_body"),
        ({"priority": 1}, "unknown_parameter"),
    ],
)
def test_a_mistake_in_a_line_is_told_with_its_number(change, code):
    content = json.dumps({**GOOD, "custom_id": "b"}) + "\n\n" + json.dumps({**GOOD, **change})
    _, (error,) = check_lines(content.encode(), CHAT, 10)
    assert (error["code"], error["line"]) == (code, 3)


@pytest.mark.parametrize("line", ["{", "[]", "NaN", '{"a": NaN}', "[" * 100_000, "\xff"])
def test_a_line_that_is_no_json_object_is_told(line):
    _, (error,) = check_lines(line.encode("latin-1"), CHAT, 10)
    assert (error["code"], error["line"]) == ("invalid_json_line", 1)


def test_missing_keys_doubled_ids_and_too_many_lines_are_told():
    line = json.dumps(GOOD).encode()
    assert check_lines(b"{}", CHAT, 9)[1][0]["code"] == "missing_required_parameter"
    assert check_lines(line + b"\n" + line, CHAT, 9)[1][0]["code"] == "duplicate_custom_id"
    assert check_lines(jsonl(4), CHAT, 3)[1][0] == {
        "code": "too_many_tasks", "line": 4, "message": "A batch has at most 3 requests.", "param": None
    }  # fmt: skip
    assert check_lines(b"\n \n", CHAT, 9)[1][0]["code"] == "empty_file"
    assert len(check_lines(b"{\n" * 500, CHAT, 9)[1]) == 100


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_lines_or_errors(content):
    lines, errors = check_lines(content, CHAT, 5)
    assert lines or errors


def test_a_batch_with_mistakes_fails_and_says_why(store):
    id = store.create(CHAT, store.add_file("in", b"{", 0.0)["id"], 0.0)["id"]
    store.validate(id, 3.0, 100)
    batch = store.batch(id)
    assert (batch["status"], batch["failed_at"]) == ("failed", 3)
    assert batch["errors"]["data"][0]["line"] == 1
    assert batch["request_counts"]["total"] == 0


def test_the_folder_is_for_its_owner_alone(tmp_path):
    Store(tmp_path / "state").close()
    assert os.stat(Path(tmp_path / "state")).st_mode & 0o077 == 0
