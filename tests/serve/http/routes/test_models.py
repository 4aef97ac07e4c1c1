"""The service says what it serves: its models, its embedding space, its document, its metrics."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from mvmr.serve import Engine
from tests.serve import serving
from tests.serve.inprocess import BROKEN, SIZE, files, serve
from tests.serve.serving import DIM, HEADS, PREPROCESS, jpeg, read_json


def test_models_says_what_is_served(client: TestClient, engine: Engine) -> None:
    (model,) = read_json(client.get("/v1/models"))["data"]
    assert model == read_json(client.get("/v1/models/student"))
    assert (model["id"], model["dim"], model["precision"]) == ("student", DIM, "fp32")
    assert model["space_id"] == engine.space_id
    assert model["preprocessing"] == PREPROCESS.to_dict()
    assert model["heads"] == {name: list(classes) for name, classes in HEADS.items()}
    assert model["index"] is None


def test_the_inference_protocol_says_what_is_served(client: TestClient) -> None:
    assert read_json(client.get("/v2"))["extensions"] == ["binary_tensor_data"]
    model = read_json(client.get("/v2/models/student"))
    assert model == read_json(client.get("/v2/models/student/versions/1"))
    assert model["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, SIZE, SIZE, 3]}]
    assert {output["name"]: output["shape"] for output in model["outputs"]} == {
        "embedding": [-1, DIM], "logits_animals": [-1, 3], "logits_colours": [-1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(
    "endpoint",
    [
        "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/student/ready",
        "/v2/models/student/versions/1/ready",
    ],
)  # fmt: skip
def test_a_service_that_is_well_says_so(client: TestClient, endpoint: str) -> None:
    assert client.get(endpoint).status_code == 200


def test_every_answer_names_the_embedding_space(client: TestClient, engine: Engine) -> None:
    answers = [
        client.get("/healthz"), client.get("/nowhere"), client.post("/v1/embed", content=b""), client.put("/v1/embed"),
        client.post("/v1/embed", content=jpeg()), client.get("/metrics"),
    ]  # fmt: skip
    assert [answer.status_code for answer in answers] == [200, 404, 422, 405, 200, 200]
    assert {answer.headers["x-embedding-space"] for answer in answers} == {engine.space_id}


def test_nothing_in_the_document_leads_elsewhere(client: TestClient) -> None:
    document = client.get("/openapi.json").text
    assert "http" not in document.replace("an http address", "")
    assert "/v1/embed" in json.loads(document)["paths"]
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404


def test_a_head_alone_is_answered_like_the_whole(client: TestClient) -> None:
    for endpoint in ("/healthz", "/readyz", "/metrics", "/v1/models", "/openapi.json", "/v2/models/student"):
        assert client.head(endpoint).status_code == 200
    assert client.head("/v1/embed").status_code == 405


def test_what_is_counted(engine: Engine) -> None:
    with serve(engine) as client:
        client.post("/v1/embed", files=files(jpeg(), BROKEN))
        client.post("/v1/embed", content=b"")
        client.get("/v2/models/student")
        client.get("/secret/of-a-stranger")
        text = client.get("/metrics").text
    requests = serving.read_metric(text, "mvmr_http_requests_total")
    assert requests == {
        'endpoint="/v1/embed",status="200"': 1, 'endpoint="/v1/embed",status="422"': 1,
        'endpoint="/v2/models/{name}",status="200"': 1, 'endpoint="other",status="404"': 1,
    }  # fmt: skip
    assert serving.read_metric(text, "mvmr_images_total") == {
        'outcome="embedded"': 1, 'outcome="rejected"': 2, 'outcome="dropped"': 0,
    }  # fmt: skip
    causes = serving.read_metric(text, "mvmr_errors_total")
    assert {name.split('"')[1] for name in causes} == {"undecodable", "empty", "bad-image", "unknown-path"}
    assert serving.read_metric(text, "mvmr_queue_images") == {"": 0}
    assert serving.read_metric(text, "mvmr_ready") == {"": 1}
