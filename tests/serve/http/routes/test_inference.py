"""The Open Inference Protocol takes tensors in JSON and in binary, and refuses those that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.serve import serving
from tests.serve.inprocess import DATA, INFER, LENGTH, ONE, SIZE, as_json, close, pixels, softmax, tensor
from tests.serve.serving import DIM, problem, read_json


@pytest.mark.parametrize("data", [pixels(2).ravel().tolist(), pixels(2).tolist()], ids=["flat", "nested"])
def test_infer_in_json(client: TestClient, path: Path, data: list[Any]) -> None:
    request = {"id": "7", "inputs": [tensor(pixels(2), data=data)]}
    answer = read_json(client.post(INFER, **as_json(request)))
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("7", "student", "1")
    outputs = {output["name"]: np.reshape(output["data"], output["shape"]) for output in answer["outputs"]}
    close(outputs["embedding"], serving.embed_by_hand(pixels(2)))
    powers = np.exp(outputs["logits_animals"])
    close(powers / powers.sum(1, keepdims=True), softmax(serving.embed_by_hand(pixels(2)), path, "animals"))


def test_infer_in_binary(client: TestClient) -> None:
    images = pixels(3)
    head = json.dumps({
        "inputs": [tensor(images, parameters={"binary_data_size": images.nbytes})],
        "outputs": [{"name": "embedding", "parameters": {"binary_data": True}}, {"name": "logits_colours"}],
    }).encode()  # fmt: skip
    answer = client.post(
        "/v2/models/student/versions/1/infer", content=head + images.tobytes(), headers={LENGTH: str(len(head))}
    )
    assert answer.status_code == 200
    length = int(answer.headers[LENGTH])
    embedding, logits = json.loads(answer.content[:length])["outputs"]
    assert embedding["parameters"] == {"binary_data_size": 4 * 3 * DIM}
    close(np.frombuffer(answer.content[length:], "<f4").reshape(3, DIM), serving.embed_by_hand(images))
    assert np.shape(logits["data"]) == (6,)


@pytest.mark.parametrize(
    ("wrong", "detail"),
    [
        (tensor(ONE, name="x", data=DATA), "the input is x UINT8"),
        (tensor(ONE, datatype="FP32", data=DATA), "the input is image FP32"),
        (tensor(ONE, shape=[1, SIZE, SIZE], data=DATA), "the input's shape is"),
        (tensor(ONE, shape=[1, SIZE, SIZE, 1], data=DATA), "the input's shape is"),
        (tensor(ONE, shape=[0, SIZE, SIZE, 3], data=[]), "the input's shape is"),
        (tensor(ONE, shape=[-1, SIZE, SIZE, 3], data=DATA), "the input's shape is"),
        (tensor(ONE, shape=[2**62, SIZE, SIZE, 3], data=DATA), "inputs.0.data is not of shape"),
        (tensor(ONE, data=DATA[1:]), "inputs.0.data is not of shape"),
        (tensor(ONE), "inputs.0.data"),
        (tensor(ONE, data=[256, *DATA[1:]]), "whole numbers from 0 to 255"),
        (tensor(ONE, data=[-1, *DATA[1:]]), "whole numbers from 0 to 255"),
        (tensor(ONE, data=[0.5, *DATA[1:]]), "whole numbers from 0 to 255"),
        (tensor(ONE, data=[1e300, *DATA[1:]]), "whole numbers from 0 to 255"),
        (tensor(ONE, data=[None, *DATA[1:]]), "inputs.0.data"),
        (tensor(ONE, data=["x", *DATA[1:]]), "whole numbers from 0 to 255"),
        (tensor(ONE, data=["7", *DATA[1:]]), "whole numbers from 0 to 255"),
        (tensor(ONE, data=[True, *DATA[1:]]), "whole numbers from 0 to 255"),
        (tensor(ONE, data=[[1], *DATA[1:]]), "whole numbers from 0 to 255"),
    ],
)
def test_tensors_that_are_refused(client: TestClient, wrong: dict[str, Any], detail: str) -> None:
    answer = client.post(INFER, **as_json({"inputs": [wrong]}))
    assert problem(answer) == "invalid"
    assert detail in answer.json()["detail"]
    assert answer.json()["error"] == answer.json()["detail"]


@pytest.mark.parametrize(
    ("length", "size", "raw"),
    [
        ("x", 3072, 3072), ("-1", 3072, 3072), ("9999999", 3072, 3072), (None, 3071, 3072), (None, 3072, 3073),
        (None, 3072, 0),
    ],
)  # fmt: skip
def test_binary_tensors_that_are_refused(client: TestClient, length: str | None, size: int, raw: int) -> None:
    head = json.dumps({"inputs": [tensor(ONE, parameters={"binary_data_size": size})]}).encode()
    answer = client.post(INFER, content=head + bytes(raw), headers={LENGTH: length or str(len(head))})
    assert problem(answer) == "malformed"


def test_an_output_that_is_not_there(client: TestClient) -> None:
    request = {"inputs": [tensor(ONE, data=DATA)], "outputs": [{"name": "logits_animal"}]}
    answer = client.post(INFER, **as_json(request))
    assert problem(answer) == "invalid"
    assert "this model has embedding, logits_animals, logits_colours" in answer.json()["detail"]
