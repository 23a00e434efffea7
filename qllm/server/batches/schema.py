"""The tables of files, batches and their lines, and what the API shows of them."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

#: The statuses in which lines are left to answer, or files to write.
OPEN = ("validating", "in_progress", "finalizing", "cancelling")
STAMPS = (
    "created_at",
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)

# A line's result is the text that goes to a file, and `answered` says to which: 1 output, 0 errors, NULL not yet.
# `ends_as` is what a batch becomes once its files are written.
TABLES = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    created_at INTEGER NOT NULL, bytes INTEGER NOT NULL, content BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL, completion_window TEXT NOT NULL, metadata TEXT, status TEXT NOT NULL, ends_as TEXT,
    errors TEXT, output_file_id TEXT, error_file_id TEXT,
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, in_progress_at INTEGER, finalizing_at INTEGER,
    completed_at INTEGER, failed_at INTEGER, expired_at INTEGER, cancelling_at INTEGER, cancelled_at INTEGER
);
CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status, seq);
CREATE TABLE IF NOT EXISTS lines (
    batch INTEGER NOT NULL, number INTEGER NOT NULL, custom_id TEXT NOT NULL, body TEXT NOT NULL,
    answered INTEGER, result TEXT, PRIMARY KEY (batch, number)
) WITHOUT ROWID;
"""
FILE_COLUMNS = "seq, id, filename, purpose, created_at, bytes"  # without the content


def connect(path: str) -> sqlite3.Connection:
    """A connection whose commits survive the end of the process; transactions are begun by hand."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.executescript(TABLES)
    return db


def file_object(row: sqlite3.Row) -> dict[str, Any]:
    """A file as the API shows it."""
    shown = {key: row[key] for key in ("id", "bytes", "created_at", "filename", "purpose")}
    return {**shown, "object": "file", "status": "processed"}


def batch_object(row: sqlite3.Row) -> dict[str, Any]:
    """A batch as the API shows it."""
    plain = ("id", "endpoint", "input_file_id", "completion_window", "status", "output_file_id", "error_file_id")
    counts = {key: row[key] for key in ("total", "completed", "failed")}
    errors = None if row["errors"] is None else {"object": "list", "data": json.loads(row["errors"])}
    return {
        "object": "batch",
        **{key: row[key] for key in (*plain, *STAMPS)},
        "errors": errors,
        "request_counts": counts,
        "metadata": None if row["metadata"] is None else json.loads(row["metadata"]),
    }
