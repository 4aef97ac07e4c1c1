"""Images may be sent and embeddings answered in several ways; what is no image is said, one by one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from starlette.testclient import TestClient

from mvmr.data.image_bytes import Limits
from mvmr.serve import Engine
from tests.serve import serving
from tests.serve.inprocess import BROKEN, PHOTOGRAPHS, as_json, base, close, embeddings_of, errors, files, serve
from tests.serve.serving import DIM, FLOAT16, FLOAT32, jpeg, problem, read_json, rows


@pytest.mark.parametrize("kind", ["image/jpeg", "application/octet-stream", "IMAGE/Jpeg; q=1", None])
def test_the_raw_bytes_of_one_image(client: TestClient, kind: str | None) -> None:
    headers = {"accept": FLOAT32} | ({"content-type": kind} if kind else {})
    answer = client.post("/v1/embed", content=jpeg(), headers=headers)
    assert answer.headers["content-type"] == FLOAT32
    close(rows(answer), embeddings_of("astronaut"))


def test_json_tells_size_and_origin(client: TestClient, engine: Engine) -> None:
    document = read_json(client.post("/v1/embed", content=jpeg()))
    (result,) = document.pop("results")
    assert document == {"model": "student", "space_id": engine.space_id, "dim": DIM}
    assert (result["index"], result["width"], result["height"]) == (0, 240, 240)
    close([result["embedding"]], embeddings_of("astronaut"))


def test_files_in_their_order(client: TestClient) -> None:
    answer = client.post("/v1/embed", files=files(*map(jpeg, PHOTOGRAPHS)), headers={"accept": FLOAT32})
    close(rows(answer), embeddings_of(*PHOTOGRAPHS))


@pytest.mark.parametrize("prefix", ["", "data:image/jpeg;base64,", "data:;base64,", "data:image/x;a=b;base64,"])
def test_base64_and_data_urls(client: TestClient, prefix: str) -> None:
    texts = [prefix + base(jpeg(name)) for name in PHOTOGRAPHS]
    many = client.post("/v1/embed", **as_json({"input": texts}))
    close([result["embedding"] for result in read_json(many)["results"]], embeddings_of(*PHOTOGRAPHS))
    one = client.post("/v1/embed", **as_json({"input": texts[0]}))
    close([result["embedding"] for result in read_json(one)["results"]], embeddings_of("astronaut"))


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (FLOAT16, FLOAT16), (f"text/html, {FLOAT32};q=0.5, */*", FLOAT32), ("*/*", "application/json"),
        ("application/*", "application/json"), ("text/html,*/*;q=0.1", "application/json"),
        (f"application/json, {FLOAT32}", "application/json"),
    ],
)  # fmt: skip
def test_the_first_type_that_can_be_given_is(client: TestClient, accept: str, kind: str) -> None:
    answer = client.post("/v1/embed", content=jpeg(), headers={"accept": accept})
    assert answer.headers["content-type"] == kind
    if kind != "application/json":
        close(rows(answer), embeddings_of("astronaut"), 1e-5 if kind == FLOAT32 else 2e-3)


def test_one_image_that_is_broken_takes_nothing_from_the_others(client: TestClient) -> None:
    parts = files(jpeg(), BROKEN, b"", jpeg("coffee"))
    results = read_json(client.post("/v1/embed", files=parts))["results"]
    assert errors(results) == {1: "undecodable", 2: "empty"}
    close([results[0]["embedding"], results[3]["embedding"]], embeddings_of("astronaut", "coffee"))


def test_in_binary_a_broken_image_is_a_row_of_nan_named_in_a_header(client: TestClient) -> None:
    answer = client.post("/v1/embed", files=files(BROKEN, jpeg()), headers={"accept": FLOAT32})
    embeddings = rows(answer)
    assert np.isnan(embeddings[0]).all()
    close(embeddings[1:], embeddings_of("astronaut"))
    assert json.loads(answer.headers["x-errors"]) == [{"index": 0, "code": "undecodable"}]
    assert "x-errors" not in client.post("/v1/embed", content=jpeg(), headers={"accept": FLOAT32}).headers


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("****", "not-base64"), ("données", "not-base64"), ("data:image/png,abc", "not-base64"), ("====", "not-base64"),
        (base(b"hello, world"), "not-an-image"), (base(BROKEN), "undecodable"),
        ("https://example.org/a.jpg", "no-fetching"), ("HTTP://127.0.0.1/", "no-fetching"), ("data:;base64,", "empty"),
    ],
)  # fmt: skip
def test_why_an_image_has_no_embedding(client: TestClient, text: str, code: str) -> None:
    answer = client.post("/v1/embed", **as_json({"input": [text]}))
    assert problem(answer) == "bad-image"
    assert errors(answer.json()["errors"]) == {0: code}


def test_an_image_of_more_pixels_than_allowed_is_not_decoded(engine: Engine) -> None:
    with serve(engine, limits=Limits(pixels=240 * 240 - 1)) as client:
        answer = client.post("/v1/embed", content=jpeg())
        assert errors(answer.json()["errors"]) == {0: "too-many-pixels"}
        assert "240 x 240 pixels" in answer.json()["detail"]
        assert 'stage="infer"' not in str(serving.read_metric(client.get("/metrics").text, "mvmr_images_total"))
    with serve(engine, limits=Limits(pixels=240 * 240)) as client:
        assert client.post("/v1/embed", content=jpeg()).status_code == 200


def test_content_that_is_encoded_as_it_is_is_read(client: TestClient) -> None:
    answer = client.post("/v1/embed", content=jpeg(), headers={"content-encoding": "Identity"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("value", "location"),
    [
        ({"input": 5}, "input"), ({"input": [5]}, "input.0"), ({"input": None}, "input"), ({"input": []}, "input"),
        ({"input": ""}, "input"), ({"input": ["a", ""]}, "input.1"), ({"input": {"a": 1}}, "input"), ({}, "input"),
        ([], "body"), (5, "body"), (None, "body"),
        ({"input": [["a"]]}, "input.0"),
    ],
)  # fmt: skip
def test_json_that_holds_something_else_where_an_image_belongs(
    client: TestClient, value: object, location: str
) -> None:
    answer = client.post("/v1/embed", **as_json(value))
    assert problem(answer) == "invalid"
    assert location in {error["at"] for error in answer.json()["errors"]}


def test_keys_that_are_not_known_here_are_no_hindrance(client: TestClient) -> None:
    answer = client.post("/v1/embed", **as_json({"input": base(jpeg()), "model": "x", "more": [1]}))
    close([result["embedding"] for result in read_json(answer)["results"]], embeddings_of("astronaut"))
