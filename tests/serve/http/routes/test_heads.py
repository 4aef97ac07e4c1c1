"""Heads give classes with their probabilities, and are read again while the service runs."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from mvmr.bundles import bundle as bundles
from mvmr.serve import Engine
from mvmr.serve.http.service import Service
from tests.serve import serving
from tests.serve.inprocess import BROKEN, close, embeddings_of, errors, files, serve, softmax
from tests.serve.serving import HEADS, jpeg, problem, read_json


@pytest.mark.parametrize("name", sorted(HEADS))
def test_classes_with_their_probabilities_best_first(client: TestClient, path: Path, name: str) -> None:
    answer = client.post("/v1/classify", params={"head": name}, files=files(jpeg(), BROKEN, jpeg("coffee")))
    assert read_json(answer)["head"] == name
    results = read_json(answer)["results"]
    assert errors(results) == {1: "undecodable"}
    for result, chances in zip(results[::2], softmax(embeddings_of("astronaut", "coffee"), path, name), strict=True):
        probabilities = {label["label"]: label["probability"] for label in result["labels"]}
        assert list(probabilities) == [HEADS[name][number] for number in np.argsort(-chances)]
        close([probabilities[label] for label in HEADS[name]], chances)


def test_only_as_many_classes_as_asked_for(client: TestClient) -> None:
    answer = client.post("/v1/classify", params={"head": "animals", "top_k": "1"}, content=jpeg())
    assert len(read_json(answer)["results"][0]["labels"]) == 1


def test_where_there_is_one_head_it_need_not_be_named(engine: Engine) -> None:
    alone = dataclasses.replace(engine, heads={"animals": engine.heads["animals"]})
    with serve(alone) as client:
        assert read_json(client.post("/v1/classify", content=jpeg()))["head"] == "animals"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "params", "detail"),
    [
        (2, {}, "give ?head=; this bundle has animals, colours"),
        (2, {"head": "animal"}, "there is no head 'animal'; this bundle has animals, colours"),
        (0, {}, "give ?head=; this bundle has none; fit one by `mvmr probe`"),
    ],
)
def test_a_head_that_is_not_there(engine: Engine, count: int, params: dict[str, str], detail: str) -> None:
    heads = dict(list(engine.heads.items())[:count])
    with serve(dataclasses.replace(engine, heads=heads)) as client:
        answer = client.post("/v1/classify", params=params, content=jpeg())
    assert (problem(answer), answer.status_code, answer.json()["detail"]) == ("unknown-head", 404, detail)


def test_heads_are_read_again_and_a_damaged_one_changes_nothing(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = serving.copy_bundle(path, tmp_path)
    with serve(Engine.load(mine, threads=1)) as client:
        running: Service = client.app.state.service  # type: ignore[attr-defined]
        serving.add_head(mine, "shapes", ("round", "square"))
        assert client.post("/v1/classify?head=shapes", content=jpeg()).status_code == 404
        running.reload_heads()
        assert client.post("/v1/classify?head=shapes", content=jpeg()).status_code == 200
        assert "shapes" in read_json(client.get("/v1/models/student"))["heads"]
        (mine / "heads" / "shapes" / "head.json").write_text("{}")
        with caplog.at_level(logging.ERROR):
            running.reload_heads()
        assert "heads not reloaded" in caplog.text
        assert "heads/shapes/head.json has changed" in caplog.text
        assert client.post("/v1/classify?head=shapes", content=jpeg()).status_code == 200


@pytest.mark.slow
def test_heads_of_another_bundle_in_its_place_are_not_served(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = serving.copy_bundle(path, tmp_path)
    engine = Engine.load(mine, threads=1)
    with serve(engine) as client:
        running: Service = client.app.state.service  # type: ignore[attr-defined]
        wanted = read_json(client.post("/v1/classify?head=animals", content=jpeg()))
        manifest = json.loads((mine / "bundle.json").read_text())
        changed = manifest | {"files": manifest["files"] | {"encoder.safetensors": "0" * 64}}
        (mine / "bundle.json").write_text(json.dumps(changed))
        serving.add_head(mine, "animals", ("cat", "dog", "eel"), seed=1)
        running.reload_heads()
        space = bundles.load(mine, verify=False).space_id
        assert (
            f"of another embedding space ({space[:12]}) than the one in service ({engine.space_id[:12]})" in caplog.text
        )
        assert "restart to serve it" in caplog.text
        assert read_json(client.post("/v1/classify?head=animals", content=jpeg())) == wanted
        # The same weights, announced as wider: the space has the same id, and the heads don't fit the engine.
        (mine / "bundle.json").write_text(json.dumps(manifest | {"embedding_dim": 2 * serving.DIM}))
        for name in serving.HEADS:
            serving.add_head(mine, name, ("round", "square"), dim=2 * serving.DIM)
        running.reload_heads()
        assert f"head animals of {mine} does not take the {serving.DIM} features served" in caplog.text
        assert read_json(client.post("/v1/classify?head=animals", content=jpeg())) == wanted
