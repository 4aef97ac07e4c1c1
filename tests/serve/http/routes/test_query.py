"""A query parameter that an endpoint does not know is refused, but where the protocol is that of others."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from mvmr.serve.http.app import create_probe_app
from tests.serve.inprocess import DATA, INFER, ONE, as_json, base, tensor
from tests.serve.serving import jpeg, problem

OF_OTHERS = ("/v1/models", "/v1/embeddings", "/v2")
ANSWERING = (
    "/v1/models", "/v1/models/student", "/v2", "/v2/models/student", "/v2/models/student/versions/1",
    "/v2/health/live", "/v2/health/ready", "/v2/models/student/ready",
)  # fmt: skip
OPENAI = {"model": "student", "input": base(jpeg())}
TENSOR = {"inputs": [tensor(ONE, data=DATA)]}


@pytest.mark.parametrize(
    ("endpoint", "detail"),
    [
        ("/v1/embed?normalise=true", "'normalise'; did you mean 'normalize'? Known: normalize"),
        ("/v1/embed?normalize=true&k=3", "'k'; Known: normalize"),
        ("/v1/embed?NORMALIZE=true", "'NORMALIZE'; did you mean 'normalize'?"),
        ("/v1/classify?topk=2", "'topk'; did you mean 'top_k'? Known: head, top_k"),
        ("/v1/classify?head=animals&normalize=true", "'normalize'; Known: head, top_k"),
        ("/v1/search?top_k=3", "'top_k'; Known: k"),
        ("/v1/search?k=3&=", "''; Known: k"),
    ],
)
def test_the_unknown_one_is_named_with_the_nearest(client: TestClient, endpoint: str, detail: str) -> None:
    answer = client.post(endpoint, content=jpeg())
    assert problem(answer) == "invalid"
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(f"unknown query parameter {detail}")


def test_every_endpoint_of_ours_looks_at_its_query(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    ours = {path: next(iter(methods)) for path, methods in paths.items() if not path.startswith(OF_OTHERS)}
    assert ours.keys() == {"/v1/embed", "/v1/classify", "/v1/search", "/healthz", "/readyz", "/metrics"}
    service: Any = client.app
    probes = TestClient(create_probe_app(service.state.service))
    for tester, endpoints in (
        (client, {**ours, "/openapi.json": "get"}),
        (probes, ("/healthz", "/readyz", "/metrics")),
    ):
        for endpoint in endpoints:
            answer = tester.request(ours.get(endpoint, "get"), f"{endpoint}?verbose", content=jpeg())
            assert problem(answer) == "invalid"


@pytest.mark.parametrize("endpoint", ANSWERING)
def test_others_protocols_pass_over_what_is_unknown(client: TestClient, endpoint: str) -> None:
    assert client.get(f"{endpoint}?api-version=2024-02-01").status_code == 200


def post(client: TestClient, endpoint: str, query: str) -> httpx2.Response:
    return client.post(f"{endpoint}?{query}", **as_json(TENSOR if endpoint == INFER else OPENAI))


@pytest.mark.parametrize("endpoint", ["/v1/embeddings", INFER])
def test_there_what_would_change_the_answer_is_refused(client: TestClient, endpoint: str) -> None:
    assert post(client, endpoint, "api-version=2024-02-01&user=me").status_code == 200
    names = {"/v1/embeddings": ("normalize", "dimensions", "model"), INFER: ("normalize", "outputs", "parameters")}
    for name in names[endpoint]:
        answer = post(client, endpoint, f"{name}=1")
        assert problem(answer) == "invalid"
        assert f"{name!r} is not read in the query; give it in the JSON of the body" in answer.json()["detail"]
        assert answer.json()["error"]  # where its clients look for it
