"""Every endpoint that gives embeddings gives them normalised when asked, and says of which space they are."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient

from mvmr.errors import MvmrError
from mvmr.serve import Engine
from mvmr.serve.http.app import create_app
from mvmr.serve.http.settings import Settings
from tests.serve import serving
from tests.serve.inprocess import (
    BROKEN,
    INFER,
    PHOTOGRAPHS,
    Index,
    Session,
    as_json,
    base,
    close,
    embeddings_of,
    errors,
    files,
    pixels,
    serve,
    tensor,
)
from tests.serve.serving import DIM, FLOAT16, FLOAT32, jpeg, problem, read_json, rows
from tests.serve.test_vectors import normalize_by_hand

TRUE = "/v1/embed?normalize=true"


def space_in_header(answer: httpx2.Response) -> str:
    return answer.headers["x-embedding-space"]


@pytest.mark.parametrize(("accept", "tolerance"), [(FLOAT32, 1e-6), (FLOAT16, 5e-4), ("application/json", 1e-6)])
def test_embed_by_query(client: TestClient, engine: Engine, accept: str, tolerance: float) -> None:
    answer = client.post(TRUE, files=files(*map(jpeg, PHOTOGRAPHS)), headers={"accept": accept})
    assert space_in_header(answer) == engine.space_of(normalize=True)
    wanted = normalize_by_hand(embeddings_of(*PHOTOGRAPHS))
    if accept == "application/json":
        document = read_json(answer)
        assert document["space_id"] == engine.space_of(normalize=True)
        close([result["embedding"] for result in document["results"]], wanted, tolerance)
    else:
        close(rows(answer), wanted, tolerance)


@pytest.mark.parametrize(
    ("query", "field", "normalize"),
    [
        ("", {"normalize": True}, True), ("?normalize=true", {"normalize": False}, True), ("?normalize=1", {}, True),
        ("?normalize=false", {}, False), ("", {"normalize": False}, False), ("", {}, False),
    ],
)  # fmt: skip
def test_embed_by_query_or_json(
    client: TestClient, engine: Engine, query: str, field: dict[str, bool], normalize: bool
) -> None:
    answer = client.post(f"/v1/embed{query}", **as_json({"input": base(jpeg()), **field}))
    raw = embeddings_of("astronaut")
    close([read_json(answer)["results"][0]["embedding"]], normalize_by_hand(raw) if normalize else raw)
    assert space_in_header(answer) == read_json(answer)["space_id"] == engine.space_of(normalize=normalize)


@pytest.mark.parametrize("wrong", ["maybe", "", "2"])
def test_what_is_neither_true_nor_false_is_refused(client: TestClient, wrong: str) -> None:
    assert problem(client.post(f"/v1/embed?normalize={wrong}", content=jpeg())) == "invalid"
    answer = client.post("/v1/embed", **as_json({"input": base(jpeg()), "normalize": wrong}))
    assert problem(answer) == "invalid"
    assert answer.json()["errors"][0]["at"] == "normalize"


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openais_by_a_field_of_the_body(client: TestClient, engine: Engine, encoding: str) -> None:
    request = {"model": "student", "input": [base(jpeg())], "encoding_format": encoding, "normalize": True}
    answer = client.post("/v1/embeddings", **as_json(request))
    values = read_json(answer)["data"][0]["embedding"]
    if encoding == "base64":
        values = np.frombuffer(base64.b64decode(values), "<f4")
    close([values], normalize_by_hand(embeddings_of("astronaut")))
    assert space_in_header(answer) == engine.space_of(normalize=True)


def test_the_inference_protocol_by_a_parameter_that_leaves_the_logits(client: TestClient, engine: Engine) -> None:
    images = pixels(2)
    request: dict[str, Any] = {"inputs": [tensor(images, data=images.ravel().tolist())]}
    raw = client.post(INFER, **as_json(request))
    answer = client.post(INFER, **as_json(request | {"parameters": {"normalize": True, "priority": 1}}))
    before, now = (
        {output["name"]: output["data"] for output in read_json(document)["outputs"]} for document in (raw, answer)
    )
    close(np.reshape(now.pop("embedding"), (2, DIM)), normalize_by_hand(serving.embed_by_hand(images)))
    del before["embedding"]
    assert before == now
    assert now.keys() == {"logits_animals", "logits_colours"}
    assert (space_in_header(raw), space_in_header(answer)) == (engine.space_id, engine.space_of(normalize=True))
    wrong = client.post(INFER, **as_json(request | {"parameters": {"normalize": "true"}}))
    assert problem(wrong) == "invalid"


def test_an_embedding_of_zeros_stays_one(engine: Engine) -> None:
    session = Session(lambda images: np.zeros((len(images), DIM), np.float32))
    with serve(session.within(engine)) as client:
        answer = client.post(TRUE, content=jpeg(), headers={"accept": FLOAT16})
    np.testing.assert_array_equal(rows(answer), np.zeros((1, DIM)))


def test_what_halves_cannot_hold_raw_they_hold_normalised(engine: Engine) -> None:
    session = Session(lambda images: serving.embed_by_hand(images) * np.float32(1e6))
    with serve(session.within(engine)) as client:
        answer = client.post(TRUE, content=jpeg(), headers={"accept": FLOAT16})
    close(rows(answer), normalize_by_hand(embeddings_of("astronaut")), 5e-4)


def test_broken_images_are_told_as_ever_and_of_the_same_space(client: TestClient, engine: Engine) -> None:
    some = client.post(TRUE, files=files(BROKEN, jpeg()), headers={"accept": FLOAT32})
    assert np.isnan(rows(some)[0]).all()
    assert json.loads(some.headers["x-errors"])[0]["index"] == 0
    none = client.post(TRUE, files=files(BROKEN))
    assert errors(none.json()["errors"]) == {0: "undecodable"}
    assert {space_in_header(some), space_in_header(none)} == {engine.space_of(normalize=True)}


def test_models_names_both_spaces(client: TestClient, engine: Engine) -> None:
    model = read_json(client.get("/v1/models/student"))
    assert [model["space_id"], model["normalized_space_id"]] == [engine.space_of(normalize=n) for n in (False, True)]


@pytest.mark.parametrize("normalize", [False, True])
def test_an_index_of_either_kind_is_searched_by_vectors_of_its_kind(engine: Engine, normalize: bool) -> None:
    space = engine.space_of(normalize=normalize)
    with serve(engine, Index(space)) as client:
        answer = client.post("/v1/search", files=files(jpeg(), jpeg("coffee")))
    document = read_json(answer)
    assert space_in_header(answer) == document["space_id"] == space
    raw = embeddings_of("astronaut", "coffee")
    wanted = (normalize_by_hand(raw) if normalize else raw)[:, 0]
    close([float(result["hits"][0]["path"]) for result in document["results"]], np.asarray(wanted, np.float32), 1e-3)


def test_an_index_of_normalised_vectors_of_another_student_is_refused(engine: Engine) -> None:
    from mvmr.serve.vectors import normalized_space

    index: Any = Index(normalized_space("f" * 32))
    with pytest.raises(MvmrError, match="student is not of"):
        create_app(engine, Settings(), index)
