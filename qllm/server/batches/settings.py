"""What batches may take, as server.yaml says it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qllm.traces.requests.strict_model import Count, Positive, StrictModel


class BatchSettings(StrictModel):
    """Files and batches. Times in seconds."""

    folder: Annotated[str, Field(min_length=1)] | None = None  #: where they are kept; without one there are none
    in_flight: Count = 16  #: lines that are answered at the same time, all batches together
    max_file_bytes: Count = 100 << 20  #: of an uploaded file
    max_lines: Count = 50_000  #: of a batch
    longest_wait: Positive = 30.0  #: between two tries of a line that found the server full
