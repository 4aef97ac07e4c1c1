"""Neighbours are found for each image that could be embedded, in an index of the same space alone."""

from __future__ import annotations

from typing import Any

import pytest

from mvmr.errors import MvmrError
from mvmr.serve import Engine
from mvmr.serve.http.app import create_app
from mvmr.serve.http.settings import Settings
from tests.serve.inprocess import BROKEN, Index, close, embeddings_of, errors, files, serve
from tests.serve.serving import jpeg, read_json


def test_the_neighbours_of_each_image_that_could_be_embedded(engine: Engine) -> None:
    index = Index(engine.space_id)
    with serve(engine, index) as client:
        answer = client.post("/v1/search?k=7", files=files(jpeg(), BROKEN, jpeg("coffee")))
        assert read_json(client.get("/v1/models/student"))["index"]["vectors"] == 2
    results = read_json(answer)["results"]
    assert index.asked == [(2, 7)]
    assert errors(results) == {1: "undecodable"}
    values = [float(results[number]["hits"][0]["path"]) for number in (0, 2)]
    close(values, embeddings_of("astronaut", "coffee")[:, 0], 1e-3)


def test_an_index_of_another_space_is_refused(engine: Engine) -> None:
    index: Any = Index("f" * 32)
    with pytest.raises(MvmrError, match=f"student is not of {'f' * 32}"):
        create_app(engine, Settings(), index)
