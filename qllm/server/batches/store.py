"""Files and batches on disk. What a transaction wrote survives the end of the process at any moment.

A line's answer and the count that it adds to are written in one transaction, and a line that has an answer gets no
second one. A line that was in flight when the process ended has none, and is run again.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qllm.server.batches.pauses import with_pauses
from qllm.server.batches.schema import FILE_COLUMNS, OPEN, batch_object, connect, file_object
from qllm.server.batches.validation import Line, check_lines

#: What the API says of lines that were not run, by what became of their batch.
NOT_RUN = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed, since its batch was cancelled."),
}


class StoreError(Exception):
    """The state folder cannot be used."""


class NotFound(LookupError):
    """There is no file, or no batch, of that id."""


class Conflict(Exception):
    """The batch is not in a state for that; the message says in which."""


class Store:
    """Files, batches and their lines in a folder. For one thread at a time; times are whole seconds of the epoch.

    Args:
        folder: made where it is not there; no other process may use it meanwhile.

    Raises:
        StoreError: another process uses the folder, or it cannot be read or written.
    """

    def __init__(self, folder: str | Path):
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = open(path / "lock", "w")  # noqa: SIM115  # held as long as the store
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process that ends lets go of it
            self._db = connect(str(path / "batches.sqlite"))
        except BlockingIOError:
            self._lock.close()
            raise StoreError(f"{path}: another server uses this folder") from None
        except (OSError, sqlite3.Error) as error:
            self._lock.close()
            raise StoreError(f"{path}: {error}") from None

    def close(self) -> None:
        """Let go of the folder."""
        self._db.close()
        self._lock.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # ---- files -------------------------------------------------------------------------------------------------

    def add_file(self, filename: str, content: bytes, now: float, purpose: str = "batch") -> dict[str, Any]:
        """Keep a file, and return it as the API shows it."""
        with self._transaction():
            id = self._add_file(filename, content, now, purpose)
        return self.file(id)

    def _add_file(self, filename: str, content: bytes, now: float, purpose: str) -> str:
        id = f"file-{secrets.token_hex(12)}"
        values = (id, filename, purpose, int(now), len(content), content)
        columns = "id, filename, purpose, created_at, bytes, content"
        self._db.execute(f"INSERT INTO files ({columns}) VALUES (?, ?, ?, ?, ?, ?)", values)
        return id

    def file(self, id: str) -> dict[str, Any]:
        """A file as the API shows it. Raises NotFound."""
        return file_object(self._row("files", id, FILE_COLUMNS))

    def content(self, id: str) -> bytes:
        """A file's content. Raises NotFound."""
        return bytes(self._row("files", id, "content")["content"])

    def delete_file(self, id: str) -> None:
        """Forget a file. Raises NotFound, and Conflict while a batch has yet to read it."""
        row = self._row("files", id, FILE_COLUMNS)
        reading = self._db.execute("SELECT 1 FROM batches WHERE input_file_id = ? AND status = 'validating'", (id,))
        if reading.fetchone() is not None:
            raise Conflict("a batch that is being validated reads this file")
        self._db.execute("DELETE FROM files WHERE seq = ?", (row["seq"],))

    def files(
        self, after: str | None, limit: int, purpose: str | None = None, ascending: bool = False
    ) -> tuple[list[dict[str, Any]], bool]:
        """Up to `limit` files that come after the file `after`, and whether there are more. Raises NotFound."""
        where, values = ("purpose = ?", [purpose]) if purpose is not None else ("1", [])
        rows, more = self._page("files", FILE_COLUMNS, after, limit, where, values, ascending)
        return [file_object(row) for row in rows], more

    # ---- batches -----------------------------------------------------------------------------------------------

    def create(
        self,
        endpoint: str,
        input_file_id: str,
        now: float,
        window: str = "24h",
        window_s: float = 86400.0,
        metadata: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """A new batch, to be validated. Raises NotFound where there is no such file."""
        self._row("files", input_file_id, FILE_COLUMNS)
        id = f"batch_{secrets.token_hex(12)}"
        kept = None if metadata is None else json.dumps(metadata)
        values = (id, endpoint, input_file_id, window, kept, int(now), int(now + window_s))
        self._db.execute(
            "INSERT INTO batches (id, endpoint, input_file_id, completion_window, metadata, status, created_at,"
            " expires_at) VALUES (?, ?, ?, ?, ?, 'validating', ?, ?)",
            values,
        )
        return self.batch(id)

    def batch(self, id: str) -> dict[str, Any]:
        """A batch as the API shows it. Raises NotFound."""
        return batch_object(self._row("batches", id))

    def batches(self, after: str | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """Up to `limit` batches older than `after`, newest first, and whether there are more. Raises NotFound."""
        rows, more = self._page("batches", "*", after, limit, "1", [], ascending=False)
        return [batch_object(row) for row in rows], more

    def open_batches(self) -> list[dict[str, Any]]:
        """Those that are not at their end, oldest first."""
        marks = ", ".join("?" * len(OPEN))
        found = self._db.execute(f"SELECT * FROM batches WHERE status IN ({marks}) ORDER BY seq", OPEN)
        return [batch_object(row) for row in found]

    def validate(self, id: str, now: float, most: int) -> None:
        """Read the input of a batch that is being validated: it is in progress then, or has failed."""
        row = self._row("batches", id)
        if row["status"] != "validating":
            return
        try:
            content = self.content(row["input_file_id"])
        except NotFound:
            error = {"code": "missing_file", "line": None, "message": "The input file is gone.", "param": None}
            lines: list[Line] = []
            errors = [error]
        else:
            lines, errors = check_lines(content, row["endpoint"], most)
        with self._transaction() as db:
            if errors:
                self._stamp(row, "failed", now)
                db.execute("UPDATE batches SET errors = ? WHERE seq = ?", (json.dumps(errors), row["seq"]))
                return
            rows = ((row["seq"], *line) for line in with_pauses(lines))
            db.executemany("INSERT INTO lines (batch, number, custom_id, body) VALUES (?, ?, ?, ?)", rows)
            db.execute("UPDATE batches SET total = ? WHERE seq = ?", (len(lines), row["seq"]))
            self._stamp(row, "in_progress", now)

    def cancel(self, id: str, now: float) -> dict[str, Any]:
        """Run no more of its lines. Raises NotFound, and Conflict where the batch is at its end already."""
        row = self._row("batches", id)
        if row["status"] in ("validating", "in_progress"):
            self._stamp(row, "cancelling", now)
        elif row["status"] != "cancelling":
            raise Conflict(f"a batch that is {row['status']} cannot be cancelled")
        return self.batch(id)

    # ---- lines -------------------------------------------------------------------------------------------------

    def pending(self, id: str, after: int, limit: int) -> list[Line]:
        """The next lines without an answer of a batch in progress, whose numbers are above `after`."""
        found = self._db.execute(
            "SELECT number, custom_id, body FROM lines JOIN batches ON batch = seq"
            " WHERE id = ? AND status = 'in_progress' AND number > ? AND answered IS NULL ORDER BY number LIMIT ?",
            (id, after, limit),
        )
        return [Line(*row) for row in found]

    def answer(self, id: str, number: int, status: int, body: dict[str, Any] | None, error: str | None = None) -> bool:
        """Keep the answer to a line, unless it has one or its batch takes none any more; whether it was kept.

        Args:
            id: of the batch.
            number: of the line.
            status: HTTP's; 200 goes to the output file, others to the error file.
            body: of the answer; None: there is none, for `error`.
            error: what broke, where no answer came.
        """
        with self._transaction() as db:
            row = self._row("batches", id)
            if row["status"] not in ("in_progress", "cancelling"):
                return False
            key = row["seq"], number
            line = db.execute("SELECT custom_id, answered FROM lines WHERE batch = ? AND number = ?", key).fetchone()
            if line is None or line["answered"] is not None:
                return False
            good = status == 200 and body is not None
            failure = None if error is None else ("server_error", error)
            result = _result(f"batch_req_{id[6:]}_{number}", line["custom_id"], status, body, failure)
            db.execute(
                "UPDATE lines SET answered = ?, result = ? WHERE batch = ? AND number = ?", (int(good), result, *key)
            )
            count = "completed" if good else "failed"
            db.execute(f"UPDATE batches SET {count} = {count} + 1 WHERE seq = ?", key[:1])
            return True

    # ---- the end of a batch ------------------------------------------------------------------------------------

    def finalize(self, id: str, ends_as: str, now: float) -> None:
        """No more lines are run. It becomes `ends_as` (completed, expired, cancelled) once `write_files` ran."""
        row = self._row("batches", id)
        with self._transaction() as db:
            db.execute("UPDATE batches SET ends_as = ? WHERE seq = ?", (ends_as, row["seq"]))
            if row["status"] == "cancelling":  # the API shows it as cancelling to its end
                return
            self._stamp(row, "finalizing", now)

    def write_files(self, id: str, now: float) -> None:
        """Write the output and error files of a batch that was finalized, and let go of its lines."""
        row = self._row("batches", id)
        ends_as, seq = row["ends_as"], row["seq"]
        with self._transaction() as db:
            files: dict[int, list[bytes]] = {0: [], 1: []}
            asked = "SELECT number, custom_id, answered, result FROM lines WHERE batch = ? ORDER BY number"
            for line in with_pauses(db.execute(asked, (seq,))):
                result = line["result"]
                if line["answered"] is None:
                    request = f"batch_req_{id[6:]}_{line['number']}"
                    result = _result(request, line["custom_id"], 0, None, NOT_RUN[ends_as])
                files[line["answered"] or 0].append(f"{result}\n".encode())
            for answered, column, name in ((1, "output_file_id", "output"), (0, "error_file_id", "error")):
                if files[answered]:
                    content = b"".join(files[answered])
                    file = self._add_file(f"{id}_{name}.jsonl", content, now, "batch_output")
                    db.execute(f"UPDATE batches SET {column} = ? WHERE seq = ?", (file, seq))
            db.execute("DELETE FROM lines WHERE batch = ?", (seq,))
            self._stamp(row, ends_as, now)

    def ends_as(self, id: str) -> str | None:
        """What a batch becomes once its files are written; None: `finalize` was not called. Raises NotFound."""
        found: str | None = self._row("batches", id, "ends_as")["ends_as"]
        return found

    # ---- SQL ---------------------------------------------------------------------------------------------------

    def _row(self, table: str, id: str, columns: str = "*") -> sqlite3.Row:
        row: sqlite3.Row | None = self._db.execute(f"SELECT {columns} FROM {table} WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise NotFound(id)
        return row

    def _stamp(self, row: sqlite3.Row, status: str, now: float) -> None:
        """The batch has this status since now."""
        set_to = f"status = ?, {status}_at = ?"
        self._db.execute(f"UPDATE batches SET {set_to} WHERE seq = ?", (status, int(now), row["seq"]))

    def _page(
        self, table: str, columns: str, after: str | None, limit: int, where: str, values: list[Any], ascending: bool
    ) -> tuple[list[sqlite3.Row], bool]:
        if after is not None:
            where += f" AND seq {'>' if ascending else '<'} ?"
            values = [*values, self._row(table, after, "seq")["seq"]]
        order = "ASC" if ascending else "DESC"
        asked = f"SELECT {columns} FROM {table} WHERE {where} ORDER BY seq {order} LIMIT ?"
        rows = self._db.execute(asked, (*values, limit + 1)).fetchall()
        return rows[:limit], len(rows) > limit


def _result(
    request: str, custom_id: str, status: int, body: dict[str, Any] | None, error: tuple[str, str] | None
) -> str:
    """A line of an output or error file."""
    told = None if error is None else {"code": error[0], "message": error[1]}
    response = None if body is None else {"status_code": status, "request_id": request, "body": body}
    return json.dumps({"id": request, "custom_id": custom_id, "response": response, "error": told})
