"""What /openapi.json tells, as far as the framework does not tell it by itself."""

from __future__ import annotations

import pytest

from qllm.executor import Engine
from tests.server.worlds import ask, server

JSON = "application/json"


@pytest.fixture(scope="module")
def document(engine: Engine, tmp_path_factory):
    return ask(server(engine, batches={"folder": str(tmp_path_factory.mktemp("batches"))}), "/openapi.json").json()


def test_every_route_tells_the_format_of_errors_and_no_other(document) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert sorted(operation["responses"]) == ["200", "4XX", "5XX"], path
            for status in ("4XX", "5XX"):
                found = operation["responses"][status]["content"][JSON]["schema"]
                assert found == {"$ref": "#/components/schemas/ErrorBody"}


def test_bodies_that_routes_read_themselves_are_told(document) -> None:
    for path, kind, field in (
        ("/v1/completions", JSON, "prompt"),
        ("/v1/chat/completions", JSON, "messages"),
        ("/v1/requests/{id}/priority", JSON, "class"),
        ("/tokenize", JSON, "prompt"),
        ("/detokenize", JSON, "tokens"),
        ("/v1/batches", JSON, "input_file_id"),
        ("/v1/files", "multipart/form-data", "purpose"),
    ):
        schema = document["paths"][path]["post"]["requestBody"]["content"][kind]["schema"]
        assert field in schema["properties"]
        assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("path", "method", "kinds"),
    [
        ("/v1/completions", "post", {JSON, "text/event-stream"}),
        ("/v1/chat/completions", "post", {JSON, "text/event-stream"}),
        ("/metrics", "get", {"text/plain"}),
        ("/v1/files/{id}/content", "get", {"application/octet-stream"}),
    ],
)
def test_what_is_answered_besides_json_is_told(document, path, method, kinds) -> None:
    assert set(document["paths"][path][method]["responses"]["200"]["content"]) == kinds
