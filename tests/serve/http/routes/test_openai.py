"""The endpoint of OpenAI's shape answers as OpenAI does, and refuses what it can't do."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.serve.inprocess import BROKEN, as_json, base, close, embeddings_of
from tests.serve.serving import DIM, jpeg, problem, read_json


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_as_openai_gives_them(client: TestClient, encoding: str) -> None:
    request = {"model": "student", "input": [base(jpeg()), base(BROKEN)], "encoding_format": encoding, "user": "me"}
    answer = read_json(client.post("/v1/embeddings", **as_json(request)))
    assert (answer["object"], answer["model"]) == ("list", "student")
    assert answer["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    first, second = answer["data"]
    values = first["embedding"]
    if encoding == "base64":
        values = np.frombuffer(base64.b64decode(values), "<f4")
    close([values], embeddings_of("astronaut"))
    assert (second["embedding"], second["error"]["code"]) == (None, "undecodable")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"dimensions": DIM - 1}, "invalid"), ({"model": "clip"}, "unknown-model"), ({"model": 7}, "invalid"),
        ({"encoding_format": "int8"}, "invalid"), ({"input": 1}, "invalid"),
    ],
)  # fmt: skip
def test_what_openais_endpoint_refuses(client: TestClient, change: dict[str, Any], name: str) -> None:
    request = {"model": "student", "input": base(jpeg()), "dimensions": DIM}
    assert client.post("/v1/embeddings", **as_json(request)).status_code == 200
    answer = client.post("/v1/embeddings", **as_json(request | change))
    assert problem(answer) == name
    assert answer.json()["error"] == {
        "message": answer.json()["detail"], "type": f"urn:mvmr:problem:{name}", "code": name,
    }  # fmt: skip
