"""`qllm serve` killed in the middle of a batch, and started again."""

import json
import time

import openai
import pytest

from tests.server.test_batch_serving import COMPLETIONS, lines
from tests.server.test_process import Process
from tests.server.worlds import WAIT_S


def counts(client, id: str):
    return client.batches.retrieve(id).request_counts


@pytest.mark.slow
def test_a_server_that_is_killed_answers_every_line_once(tmp_path):
    """kill -9 twice, with some answers more each time."""
    total = 400
    bodies = [{"model": "demo", "prompt": f"Number {i}", "max_tokens": 4, "temperature": 0} for i in range(total)]
    settings = {"batches": {"folder": str(tmp_path / "state"), "in_flight": 8}}
    id = None
    for least in (20, 60, total):
        process = Process(tmp_path, **settings)
        try:
            with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", timeout=WAIT_S) as client:
                if id is None:
                    file = client.files.create(file=("in.jsonl", lines(COMPLETIONS, bodies)), purpose="batch")
                    made = client.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
                    id = made.id
                end = time.monotonic() + 5 * WAIT_S
                while counts(client, id).completed < least:
                    assert time.monotonic() < end
                    time.sleep(0.02)
                if least == total:
                    while (batch := client.batches.retrieve(id)).status != "completed":
                        time.sleep(0.02)
                    output = client.files.content(batch.output_file_id).text
        finally:
            process.kill()  # SIGKILL: nothing is tidied up
    assert batch.request_counts.model_dump() == {"total": total, "completed": total, "failed": 0}
    assert batch.error_file_id is None
    answers = [json.loads(line) for line in output.splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"c{i}" for i in range(total)]
    assert len({answer["response"]["body"]["id"] for answer in answers}) == total
    assert all(answer["response"]["body"]["usage"]["completion_tokens"] <= 4 for answer in answers)
