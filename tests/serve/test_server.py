"""Every endpoint and every problem of the service, in process, with a real engine; see tests/serve/serving.py."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from mvmr.bundles import bundle as bundles
from mvmr.data.image_bytes import Limits
from mvmr.errors import MvmrError
from mvmr.serve import Engine
from mvmr.serve.http import readiness
from mvmr.serve.http.app import create_app
from mvmr.serve.http.batcher import Batcher
from mvmr.serve.http.problems import PROBLEMS
from mvmr.serve.http.service import Service
from mvmr.serve.http.settings import ConnectionLimits, Settings, read_keys
from tests.serve import serving
from tests.serve.serving import DIM, FLOAT16, FLOAT32, HEADS, PREPROCESS, jpeg, problem, rows, said_in

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")
SIZE = PREPROCESS.crop
KEY = "0123456789abcdef"
SECONDS = 20.0
BROKEN = jpeg()[: len(jpeg()) // 2]  # cut in the middle


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def engine(path: Path) -> Engine:
    return Engine.load(path, threads=1)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with serve(engine) as found:
        yield found


@contextmanager
def serve(engine: Engine, index: Any = None, **settings: Any) -> Iterator[TestClient]:
    """A client of a service with these settings."""
    app = create_app(engine, Settings(**settings), index)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


class Session:
    """An engine's session that does something else, or waits until it is told to go on.

    batches: how many images each batch had
    """

    def __init__(self, result: Callable[[Pixels], Floats] = serving.embedded) -> None:
        self.batches: list[int] = []
        self.result, self._held = result, False
        self._begun, self._go = queue.SimpleQueue[None](), threading.Semaphore(0)

    def __call__(self, pixels: Pixels) -> dict[str, Floats]:
        self.batches.append(len(pixels))
        self._begun.put(None)
        if self._held:
            assert self._go.acquire(timeout=SECONDS)
        return {"embedding": self.result(pixels)}

    def begun(self) -> None:
        """Wait until it is at the next batch."""
        self._begun.get(timeout=SECONDS)

    def let_go(self, batches: int = 1) -> None:
        self._go.release(batches)

    @contextmanager
    def held(self) -> Iterator[None]:
        """From here on, after those at the start, each batch waits for `let_go`; until the block ends."""
        for _ in range(3):  # two to warm up, and the canary
            self.begun()
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self.let_go(999)

    def within(self, engine: Engine) -> Engine:
        """The engine, running this."""
        runner: Any = self
        return dataclasses.replace(engine, runner=runner)


class Index:
    """An index of two images, which finds both for every row."""

    def __init__(self, space_id: str) -> None:
        self.space_id = space_id
        self.asked: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return 2

    def check_space(self, space_id: str, whose: object) -> None:
        if space_id != self.space_id:
            raise MvmrError(f"{whose} is not of {self.space_id}")

    def search(self, found: Floats, k: int) -> list[list[Any]]:
        self.asked.append((len(found), k))
        return [
            [type("Hit", (), {"path": f"{round(float(row[0]), 3)}", "score": 0.5, "row": 0})()] * min(k, 2)
            for row in found
        ]


def expected(*names: str) -> Floats:
    """The embeddings of photographs that went through a JPEG."""
    from mvmr.data.image_bytes import Prepared, prepare

    found = [prepare(jpeg(name), PREPROCESS) for name in names]
    return serving.embedded(np.stack([each.pixels for each in found if isinstance(each, Prepared)]))


def close(found: Any, wanted: Floats, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, atol=tolerance)


def as_json(value: object) -> dict[str, Any]:
    return {"content": json.dumps(value), "headers": {"content-type": "application/json"}}


def base(data: bytes) -> str:
    return base64.b64encode(data).decode()


def files(*contents: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (f"{number}.jpg", content)) for number, content in enumerate(contents)]


def errors(results: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """The codes of what could not be embedded, by index."""
    return {each["index"]: each["error"]["code"] for each in results if "error" in each}


# What is served


def test_models_says_what_is_served(client: TestClient, engine: Engine) -> None:
    (model,) = said_in(client.get("/v1/models"))["data"]
    assert model == said_in(client.get("/v1/models/student"))
    assert (model["id"], model["dim"], model["precision"]) == ("student", DIM, "fp32")
    assert model["space_id"] == engine.space_id
    assert model["preprocessing"] == PREPROCESS.to_dict()
    assert model["heads"] == {name: list(classes) for name, classes in HEADS.items()}
    assert model["index"] is None


def test_the_inference_protocol_says_what_is_served(client: TestClient) -> None:
    assert said_in(client.get("/v2"))["extensions"] == ["binary_tensor_data"]
    model = said_in(client.get("/v2/models/student"))
    assert model == said_in(client.get("/v2/models/student/versions/1"))
    assert model["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, SIZE, SIZE, 3]}]
    assert {each["name"]: each["shape"] for each in model["outputs"]} == {
        "embedding": [-1, DIM], "logits_animals": [-1, 3], "logits_colours": [-1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(
    "place",
    [
        "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/student/ready",
        "/v2/models/student/versions/1/ready",
    ],
)  # fmt: skip
def test_a_service_that_is_well_says_so(client: TestClient, place: str) -> None:
    assert client.get(place).status_code == 200


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


# Ways to send images


@pytest.mark.parametrize("kind", ["image/jpeg", "application/octet-stream", "IMAGE/Jpeg; q=1", None])
def test_the_raw_bytes_of_one_image(client: TestClient, kind: str | None) -> None:
    headers = {"accept": FLOAT32} | ({"content-type": kind} if kind else {})
    answer = client.post("/v1/embed", content=jpeg(), headers=headers)
    assert answer.headers["content-type"] == FLOAT32
    close(rows(answer), expected("astronaut"))


def test_json_tells_size_and_origin(client: TestClient, engine: Engine) -> None:
    found = said_in(client.post("/v1/embed", content=jpeg()))
    (result,) = found.pop("results")
    assert found == {"model": "student", "space_id": engine.space_id, "dim": DIM}
    assert (result["index"], result["width"], result["height"]) == (0, 240, 240)
    close([result["embedding"]], expected("astronaut"))


def test_files_in_their_order(client: TestClient) -> None:
    answer = client.post("/v1/embed", files=files(*map(jpeg, PHOTOGRAPHS)), headers={"accept": FLOAT32})
    close(rows(answer), expected(*PHOTOGRAPHS))


@pytest.mark.parametrize("prefix", ["", "data:image/jpeg;base64,", "data:;base64,", "data:image/x;a=b;base64,"])
def test_base64_and_data_urls(client: TestClient, prefix: str) -> None:
    texts = [prefix + base(jpeg(name)) for name in PHOTOGRAPHS]
    many = client.post("/v1/embed", **as_json({"input": texts}))
    close([each["embedding"] for each in said_in(many)["results"]], expected(*PHOTOGRAPHS))
    one = client.post("/v1/embed", **as_json({"input": texts[0]}))
    close([each["embedding"] for each in said_in(one)["results"]], expected("astronaut"))


# Ways to be answered


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
        close(rows(answer), expected("astronaut"), 1e-5 if kind == FLOAT32 else 2e-3)


def test_one_image_that_is_broken_takes_nothing_from_the_others(client: TestClient) -> None:
    sent = files(jpeg(), BROKEN, b"", jpeg("coffee"))
    results = said_in(client.post("/v1/embed", files=sent))["results"]
    assert errors(results) == {1: "undecodable", 2: "empty"}
    close([results[0]["embedding"], results[3]["embedding"]], expected("astronaut", "coffee"))


def test_in_binary_a_broken_image_is_a_row_of_nan_named_in_a_header(client: TestClient) -> None:
    answer = client.post("/v1/embed", files=files(BROKEN, jpeg()), headers={"accept": FLOAT32})
    found = rows(answer)
    assert np.isnan(found[0]).all()
    close(found[1:], expected("astronaut"))
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
        assert 'stage="infer"' not in str(serving.counted(client.get("/metrics").text, "mvmr_images_total"))
    with serve(engine, limits=Limits(pixels=240 * 240)) as client:
        assert client.post("/v1/embed", content=jpeg()).status_code == 200


# Heads


def softmax(embeddings: Floats, path: Path, name: str) -> Floats:
    from mvmr.bundles import bundle as bundles

    head = bundles.load(path, verify=False).head(name)
    powers = np.exp(embeddings.astype(np.float64) @ head.weight.T + head.bias)
    return np.asarray(powers / powers.sum(1, keepdims=True), np.float32)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_classes_with_their_probabilities_best_first(client: TestClient, path: Path, name: str) -> None:
    answer = client.post("/v1/classify", params={"head": name}, files=files(jpeg(), BROKEN, jpeg("coffee")))
    assert said_in(answer)["head"] == name
    results = said_in(answer)["results"]
    assert errors(results) == {1: "undecodable"}
    for result, chances in zip(results[::2], softmax(expected("astronaut", "coffee"), path, name), strict=True):
        found = {each["label"]: each["probability"] for each in result["labels"]}
        assert list(found) == [HEADS[name][number] for number in np.argsort(-chances)]
        close([found[label] for label in HEADS[name]], chances)


def test_only_as_many_classes_as_asked_for(client: TestClient) -> None:
    answer = client.post("/v1/classify", params={"head": "animals", "top_k": "1"}, content=jpeg())
    assert len(said_in(answer)["results"][0]["labels"]) == 1


def test_where_there_is_one_head_it_need_not_be_named(engine: Engine) -> None:
    alone = dataclasses.replace(engine, heads={"animals": engine.heads["animals"]})
    with serve(alone) as client:
        assert said_in(client.post("/v1/classify", content=jpeg()))["head"] == "animals"


@pytest.mark.parametrize(
    ("kept", "params", "told"),
    [
        (2, {}, "give ?head=; this bundle has animals, colours"),
        (2, {"head": "animal"}, "there is no head 'animal'; this bundle has animals, colours"),
        (0, {}, "give ?head=; this bundle has none; fit one by `mvmr probe`"),
    ],
)
def test_a_head_that_is_not_there(engine: Engine, kept: int, params: dict[str, str], told: str) -> None:
    heads = dict(list(engine.heads.items())[:kept])
    with serve(dataclasses.replace(engine, heads=heads)) as client:
        answer = client.post("/v1/classify", params=params, content=jpeg())
    assert (problem(answer), answer.status_code, answer.json()["detail"]) == ("unknown-head", 404, told)


def test_heads_are_read_again_and_a_damaged_one_changes_nothing(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = serving.copied(path, tmp_path)
    with serve(Engine.load(mine, threads=1)) as client:
        running: Service = client.app.state.service  # type: ignore[attr-defined]
        serving.add_head(mine, "shapes", ("round", "square"))
        assert client.post("/v1/classify?head=shapes", content=jpeg()).status_code == 404
        running.reload_heads()
        assert client.post("/v1/classify?head=shapes", content=jpeg()).status_code == 200
        assert "shapes" in said_in(client.get("/v1/models/student"))["heads"]
        (mine / "heads" / "shapes" / "head.json").write_text("{}")
        with caplog.at_level(logging.ERROR):
            running.reload_heads()
        assert "heads not reloaded" in caplog.text
        assert "heads/shapes/head.json has changed" in caplog.text
        assert client.post("/v1/classify?head=shapes", content=jpeg()).status_code == 200


def test_heads_of_another_bundle_in_its_place_are_not_served(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = serving.copied(path, tmp_path)
    engine = Engine.load(mine, threads=1)
    with serve(engine) as client:
        running: Service = client.app.state.service  # type: ignore[attr-defined]
        wanted = said_in(client.post("/v1/classify?head=animals", content=jpeg()))
        says = json.loads((mine / "bundle.json").read_text())
        other = says | {"files": says["files"] | {"encoder.safetensors": "0" * 64}}
        (mine / "bundle.json").write_text(json.dumps(other))
        serving.add_head(mine, "animals", ("cat", "dog", "eel"), seed=1)
        running.reload_heads()
        space = bundles.load(mine, verify=False).space_id
        assert (
            f"of another embedding space ({space[:12]}) than the one in service ({engine.space_id[:12]})" in caplog.text
        )
        assert "restart to serve it" in caplog.text
        assert said_in(client.post("/v1/classify?head=animals", content=jpeg())) == wanted
        # The same weights, announced as wider: the space has the same id, and the heads don't fit the engine.
        (mine / "bundle.json").write_text(json.dumps(says | {"embedding_dim": 2 * serving.DIM}))
        for name in serving.HEADS:
            serving.add_head(mine, name, ("round", "square"), dim=2 * serving.DIM)
        running.reload_heads()
        assert f"head animals of {mine} does not take the {serving.DIM} features served" in caplog.text
        assert said_in(client.post("/v1/classify?head=animals", content=jpeg())) == wanted


# OpenAI's endpoint


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_as_openai_gives_them(client: TestClient, encoding: str) -> None:
    asked = {"model": "student", "input": [base(jpeg()), base(BROKEN)], "encoding_format": encoding, "user": "me"}
    found = said_in(client.post("/v1/embeddings", **as_json(asked)))
    assert (found["object"], found["model"]) == ("list", "student")
    assert found["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    first, second = found["data"]
    values = first["embedding"]
    if encoding == "base64":
        values = np.frombuffer(base64.b64decode(values), "<f4")
    close([values], expected("astronaut"))
    assert (second["embedding"], second["error"]["code"]) == (None, "undecodable")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"dimensions": DIM - 1}, "invalid"), ({"model": "clip"}, "unknown-model"), ({"model": 7}, "invalid"),
        ({"encoding_format": "int8"}, "invalid"), ({"input": 1}, "invalid"),
    ],
)  # fmt: skip
def test_what_openais_endpoint_refuses(client: TestClient, change: dict[str, Any], name: str) -> None:
    asked = {"model": "student", "input": base(jpeg()), "dimensions": DIM}
    assert client.post("/v1/embeddings", **as_json(asked)).status_code == 200
    answer = client.post("/v1/embeddings", **as_json(asked | change))
    assert problem(answer) == name
    assert answer.json()["error"] == {
        "message": answer.json()["detail"], "type": f"urn:mvmr:problem:{name}", "code": name,
    }  # fmt: skip


# The Open Inference Protocol


def pixels(count: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def tensor(images: Pixels, **more: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": "UINT8", "shape": list(images.shape)} | more


INFER = "/v2/models/student/infer"
LENGTH = "inference-header-content-length"


@pytest.mark.parametrize("data", [pixels(2).ravel().tolist(), pixels(2).tolist()], ids=["flat", "nested"])
def test_infer_in_json(client: TestClient, path: Path, data: list[Any]) -> None:
    asked = {"id": "7", "inputs": [tensor(pixels(2), data=data)]}
    found = said_in(client.post(INFER, **as_json(asked)))
    assert (found["id"], found["model_name"], found["model_version"]) == ("7", "student", "1")
    outputs = {each["name"]: np.reshape(each["data"], each["shape"]) for each in found["outputs"]}
    close(outputs["embedding"], serving.embedded(pixels(2)))
    powers = np.exp(outputs["logits_animals"])
    close(powers / powers.sum(1, keepdims=True), softmax(serving.embedded(pixels(2)), path, "animals"))


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
    close(np.frombuffer(answer.content[length:], "<f4").reshape(3, DIM), serving.embedded(images))
    assert np.shape(logits["data"]) == (6,)


ONE = pixels(1)
DATA = ONE.ravel().tolist()


@pytest.mark.parametrize(
    ("given", "told"),
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
def test_tensors_that_are_refused(client: TestClient, given: dict[str, Any], told: str) -> None:
    answer = client.post(INFER, **as_json({"inputs": [given]}))
    assert problem(answer) == "invalid"
    assert told in answer.json()["detail"]
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
    asked = {"inputs": [tensor(ONE, data=DATA)], "outputs": [{"name": "logits_animal"}]}
    answer = client.post(INFER, **as_json(asked))
    assert problem(answer) == "invalid"
    assert "this model has embedding, logits_animals, logits_colours" in answer.json()["detail"]


# Search


def test_the_neighbours_of_each_image_that_could_be_embedded(engine: Engine) -> None:
    index = Index(engine.space_id)
    with serve(engine, index) as client:
        answer = client.post("/v1/search?k=7", files=files(jpeg(), BROKEN, jpeg("coffee")))
        assert said_in(client.get("/v1/models/student"))["index"]["vectors"] == 2
    results = said_in(answer)["results"]
    assert index.asked == [(2, 7)]
    assert errors(results) == {1: "undecodable"}
    values = [float(results[number]["hits"][0]["path"]) for number in (0, 2)]
    close(values, expected("astronaut", "coffee")[:, 0], 1e-3)


def test_an_index_of_another_space_is_refused(engine: Engine) -> None:
    index: Any = Index("f" * 32)
    with pytest.raises(MvmrError, match=f"student is not of {'f' * 32}"):
        create_app(engine, Settings(), index)


# Problems, each of them


Ask = Callable[[Engine], httpx2.Response]


def asking(method: str, place: str, settings: Mapping[str, Any] | None = None, **sent: Any) -> Ask:
    def ask(engine: Engine) -> httpx2.Response:
        with serve(engine, **settings or {}) as client:
            return client.request(method, place, **sent)

    return ask


def post_to(session: Session, place: str = "/v1/embed") -> Ask:
    return lambda engine: asking("POST", place, content=jpeg())(session.within(engine))


def raising(error: Exception) -> Session:
    def result(pixels: Pixels) -> Floats:
        raise error

    return Session(result)


def slow(engine: Engine) -> httpx2.Response:
    return ask_by_hand(create_app(engine, Settings(connections=ConnectionLimits(body_seconds=0.01))), b"half of it")


def busy(engine: Engine) -> httpx2.Response:
    session = Session()
    with serve(session.within(engine), queue=1, max_items=1) as client:
        answers: list[httpx2.Response] = []
        first = threading.Thread(target=lambda: answers.append(client.post("/v1/embed", content=jpeg())))
        with session.held():
            first.start()
            session.begun()
            refused = client.post("/v1/embed", content=jpeg())
        first.join()
    assert answers[0].status_code == 200
    return refused


def internal(engine: Engine) -> httpx2.Response:
    class Broken(Index):
        def search(self, found: Floats, k: int) -> list[list[Any]]:
            raise ZeroDivisionError

    index = Broken(engine.space_id)
    with serve(engine, index) as client:
        return client.post("/v1/search", content=jpeg())


def no_memory(engine: Engine) -> httpx2.Response:
    class Full(Index):
        def search(self, found: Floats, k: int) -> list[list[Any]]:
            raise MemoryError

    with serve(engine, Full(engine.space_id)) as client:
        return client.post("/v1/search", content=jpeg())


ONE_JPEG: dict[str, Any] = {"content": jpeg()}
PRODUCED: dict[str, list[Ask]] = {
    "malformed": [
        asking("POST", "/v1/embed", content="{", headers={"content-type": "application/json"}),
        asking("POST", "/v1/embed", content=b"\xff\xfe", headers={"content-type": "application/json"}),
        asking("POST", "/v1/embed", content="a", headers={"content-type": "multipart/form-data; boundary=b"}),
        asking("POST", "/v1/embed", content="a", headers={"content-type": "multipart/form-data"}),
    ],
    "wrong-key": [
        asking("POST", "/v1/embed", {"api_keys": (KEY,)}, **ONE_JPEG),
        asking("POST", "/v1/embed", {"api_keys": (KEY,)}, headers={"x-api-key": KEY[:-1]}, **ONE_JPEG),
        asking("GET", "/v1/models", {"api_keys": (KEY,)}, headers={"authorization": f"Basic {KEY}"}),
        asking("GET", "/nowhere", {"api_keys": (KEY,)}),
    ],
    "unknown-path": [asking("GET", "/v3"), asking("POST", "/v1/embed/", **ONE_JPEG)],
    "unknown-model": [
        asking("GET", "/v1/models/clip"), asking("GET", "/v2/models/clip/ready"), asking("GET", "/v2/models/clip"),
        asking("POST", "/v2/models/clip/infer", **as_json({})),
    ],
    "unknown-head": [asking("POST", "/v1/classify?head=x", **ONE_JPEG)],
    "no-index": [asking("POST", "/v1/search", **ONE_JPEG)],
    "wrong-method": [asking("GET", "/v1/embed"), asking("POST", "/healthz"), asking("DELETE", "/v1/models")],
    "not-acceptable": [asking("POST", "/v1/embed", headers={"accept": "text/html"}, **ONE_JPEG)],
    "slow-body": [slow],
    "too-large": [
        asking("POST", "/v1/embed", {"max_body": 999}, content=bytes(1000)),
        asking("POST", "/v1/embed", {"max_body": 999}, content=iter([bytes(500), bytes(500)])),
        asking("POST", "/v1/embed", {"max_json": 99}, **as_json({"input": ["a" * 99]})),
        asking("POST", INFER, {"max_json": 99}, content=bytes(200), headers={"inference-header-content-length": "150"}),
    ],
    "wrong-type": [
        asking("POST", "/v1/embed", headers={"content-type": "text/plain"}, **ONE_JPEG),
        asking("POST", "/v1/embed", headers={"content-encoding": "gzip"}, **ONE_JPEG),
        asking("POST", "/v1/embeddings", headers={"content-encoding": "br"}, **ONE_JPEG),
    ],
    "invalid": [
        asking("POST", "/v1/embed", **as_json({"input": [[0]] * 60_000})),
        asking("POST", INFER, **as_json({"inputs": [tensor(pixels(1), data=[0] * 1_000_001)]})),
        asking("POST", "/v1/classify?top_k=0", **ONE_JPEG),
        asking("POST", "/v1/search?k=x", **ONE_JPEG),
        asking("POST", "/v1/embed", data={"file": "text"}, files=files(jpeg())),
        asking("POST", "/v1/embed", content="--b--\r\n", headers={"content-type": "multipart/form-data; boundary=b"}),
    ],
    "too-many-items": [
        asking("POST", "/v1/embed", {"max_items": 2}, files=files(*[jpeg()] * 3)),
        asking("POST", "/v1/embed", {"max_items": 2}, files=files(*[jpeg()] * 9)),
        asking("POST", "/v1/embed", {"max_items": 2}, **as_json({"input": ["a"] * 3})),
        asking("POST", "/v1/embeddings", {"max_items": 2}, **as_json({"model": "student", "input": ["a"] * 3})),
        asking("POST", INFER, {"max_items": 2}, **as_json({"inputs": [tensor(pixels(3), data=DATA * 3)]})),
    ],
    "bad-image": [asking("POST", "/v1/embed", content=b"hello"), asking("POST", "/v1/classify?head=animals")],
    "busy": [busy],
    "internal": [internal],
    "out-of-memory": [no_memory],
    "engine-failed": [
        post_to(raising(RuntimeError("out of memory"))), post_to(raising(MemoryError()), "/v1/classify?head=animals"),
        post_to(Session(lambda pixels: serving.embedded(pixels) * np.float32(np.nan))),
    ],
    "not-ready": [
        lambda engine: asking("GET", "/readyz")(raising(RuntimeError("the GPU\nis gone")).within(engine)),
        lambda engine: asking("GET", "/v2/health/ready")(Session(lambda p: serving.embedded(p) * 1.01).within(engine)),
        lambda engine: asking("GET", "/v2/models/student/ready")(
            Session(lambda p: serving.embedded(p) * np.float32(np.nan)).within(engine)
        ),
    ],
}  # fmt: skip
AT_THE_CONNECTION = {"slow-head", "large-head"}  # see test_serve_connections.py
CASES = [pytest.param(name, ask, id=f"{name}-{i}") for name, asks in PRODUCED.items() for i, ask in enumerate(asks)]


@pytest.mark.parametrize(("name", "ask"), CASES)
def test_each_problem_has_its_status_and_type(engine: Engine, name: str, ask: Ask) -> None:
    answer = ask(engine)
    assert problem(answer) == name
    status, title = PROBLEMS[name]
    assert (answer.status_code, answer.json()["title"]) == (status, title)


def test_no_problem_is_left_out() -> None:
    assert PRODUCED.keys() | AT_THE_CONNECTION == PROBLEMS.keys()


def test_content_that_is_encoded_as_it_is_is_read(client: TestClient) -> None:
    answer = client.post("/v1/embed", content=jpeg(), headers={"content-encoding": "Identity"})
    assert answer.status_code == 200


def test_a_head_alone_is_answered_like_the_whole(client: TestClient) -> None:
    for place in ("/healthz", "/readyz", "/metrics", "/v1/models", "/openapi.json", "/v2/models/student"):
        assert client.head(place).status_code == 200
    assert client.head("/v1/embed").status_code == 405


def test_headers_of_problems(engine: Engine) -> None:
    assert PRODUCED["wrong-key"][0](engine).headers["www-authenticate"] == "Bearer"
    assert PRODUCED["wrong-method"][0](engine).headers["allow"] == "POST"
    assert int(PRODUCED["busy"][0](engine).headers["retry-after"]) >= 1
    assert PRODUCED["slow-body"][0](engine).headers["connection"] == "close"


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"input": 5}, "input"), ({"input": [5]}, "input.0"), ({"input": None}, "input"), ({"input": []}, "input"),
        ({"input": ""}, "input"), ({"input": ["a", ""]}, "input.1"), ({"input": {"a": 1}}, "input"), ({}, "input"),
        ([], "body"), (5, "body"), (None, "body"),
        ({"input": [["a"]]}, "input.0"),
    ],
)  # fmt: skip
def test_json_that_holds_something_else_where_an_image_belongs(client: TestClient, value: object, place: str) -> None:
    answer = client.post("/v1/embed", **as_json(value))
    assert problem(answer) == "invalid"
    assert place in {each["at"] for each in answer.json()["errors"]}


def test_keys_that_are_not_known_here_are_no_hindrance(client: TestClient) -> None:
    answer = client.post("/v1/embed", **as_json({"input": base(jpeg()), "model": "x", "more": [1]}))
    close([each["embedding"] for each in said_in(answer)["results"]], expected("astronaut"))


# Keys, and pages of other origins


@pytest.mark.parametrize(
    "headers", [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY}"}, {"X-API-Key": KEY}]
)
def test_with_a_valid_key_all_is_as_without(engine: Engine, headers: dict[str, str]) -> None:
    with serve(engine, api_keys=("another-key-of-16", KEY)) as client:
        assert client.post("/v1/embed", content=jpeg(), headers=headers).status_code == 200


PROBES = ["/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2/models/student/ready"]


@pytest.mark.parametrize("place", PROBES)
def test_probes_need_no_key(engine: Engine, place: str) -> None:
    with serve(engine, api_keys=(KEY,)) as client:
        assert client.get(place).status_code == 200


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"{KEY}\n\n# mine\n another-key-of-16 \r\n", None), ("", "holds no API key"), ("# none\n", "holds no API key"),
        ("short\n", "key number 1"), (f"{KEY}\nwith a space inside\n", "key number 2"),
        ("clé-secrète-secrète\n", "number 1"),
    ],
)  # fmt: skip
def test_the_file_of_keys(tmp_path: Path, content: str, told: str | None) -> None:
    (tmp_path / "keys").write_text(content)
    if told is None:
        assert read_keys(tmp_path / "keys") == (KEY, "another-key-of-16")
        return
    with pytest.raises(MvmrError, match=told) as caught:
        read_keys(tmp_path / "keys")
    assert all(key not in str(caught.value) for key in content.split() if key != "#" and len(key) > 6)


def test_only_pages_of_a_named_origin_may_ask(engine: Engine) -> None:
    with serve(engine, cors=("https://mine.example",)) as client:
        for origin, allowed in (("https://mine.example", "https://mine.example"), ("https://other.example", None)):
            answer = client.post("/v1/embed", content=jpeg(), headers={"origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed


def test_a_browser_may_ask_beforehand_without_a_key(engine: Engine) -> None:
    beforehand = {
        "origin": "https://mine.example", "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }  # fmt: skip
    with serve(engine, cors=("https://mine.example",), api_keys=(KEY,)) as client:
        answer = client.options("/v1/embed", headers=beforehand)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://mine.example"
        # else the page could not even read that its key is wrong
        refused = client.post("/v1/embed", content=jpeg(), headers={"origin": "https://mine.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://mine.example"


# Readiness


@pytest.fixture
def asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "_FRESH", -1.0)


def drifted(factor: float, pixels: Pixels) -> Floats:
    return serving.embedded(pixels) * np.float32(factor)


@pytest.mark.usefixtures("asked_every_time")
def test_it_is_not_ready_while_its_engine_drifts(engine: Engine) -> None:
    session = Session()
    with serve(session.within(engine)) as client:
        for factor, status in ((1.0, 200), (1.0 + 1e-2, 503), (1.0, 200)):
            session.result = partial(drifted, factor)
            answer = client.get("/readyz")
            assert answer.status_code == status
            assert serving.counted(client.get("/metrics").text, "mvmr_ready")[""] == (status == 200)
            if status == 503:
                assert "off by 0.01 of its length: it has drifted" in answer.json()["detail"]
                assert client.get("/healthz").status_code == 200


@pytest.mark.usefixtures("asked_every_time")
def test_it_is_not_ready_while_its_engine_is_stuck(engine: Engine) -> None:
    session = Session()
    with serve(session.within(engine), stuck_seconds=0.05) as client:
        with session.held():
            assert "has not answered for 0.05 s" in client.get("/readyz").json()["detail"]
            session.begun()
            assert "has been at one batch for" in client.get("/readyz").json()["detail"]
        serving.wait_until(lambda: client.get("/readyz").status_code == 200, "the engine")


@pytest.mark.usefixtures("asked_every_time")
def test_it_is_ready_while_all_its_room_is_taken_and_a_probe_waits_for_no_request(engine: Engine) -> None:
    session = Session()
    with serve(session.within(engine), queue=6, max_items=1, max_batch=1) as client:
        batcher: Batcher = client.app.state.service._batcher  # type: ignore[attr-defined]
        probes: list[int] = []
        asking = [threading.Thread(target=lambda: client.post("/v1/embed", content=jpeg())) for _ in range(4)]
        probing = threading.Thread(target=lambda: probes.append(client.get("/readyz").status_code))
        with session.held():
            for thread in asking:
                thread.start()
            session.begun()
            serving.wait_until(lambda: batcher._count == 3, "the requests")
            probing.start()
            serving.wait_until(lambda: batcher._count == 4, "the probe")
            session.let_go(2)  # the batch at hand, and the one after it
            probing.join(SECONDS)
            assert probes == [200]
            assert batcher._count >= 2
        for thread in asking:
            thread.join()


def test_probes_cost_the_engine_one_image_a_second(engine: Engine) -> None:
    session = Session()
    with serve(session.within(engine)) as client:
        before = len(session.batches)
        assert [client.get("/readyz").status_code for _ in range(50)] == [200] * 50
    assert len(session.batches) - before <= 3


def test_draining_it_is_not_ready_but_answers_and_ends_the_connection(engine: Engine) -> None:
    with serve(engine) as client:
        assert "connection" not in client.get("/healthz").headers
        client.app.state.service.draining = True  # type: ignore[attr-defined]
        assert "draining" in client.get("/readyz").json()["detail"]
        answer = client.post("/v1/embed", content=jpeg())
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")


# Metrics


def test_what_is_counted(engine: Engine) -> None:
    with serve(engine) as client:
        client.post("/v1/embed", files=files(jpeg(), BROKEN))
        client.post("/v1/embed", content=b"")
        client.get("/v2/models/student")
        client.get("/secret/of-a-stranger")
        text = client.get("/metrics").text
    requests = serving.counted(text, "mvmr_http_requests_total")
    assert requests == {
        'endpoint="/v1/embed",status="200"': 1, 'endpoint="/v1/embed",status="422"': 1,
        'endpoint="/v2/models/{name}",status="200"': 1, 'endpoint="other",status="404"': 1,
    }  # fmt: skip
    assert serving.counted(text, "mvmr_images_total") == {
        'outcome="embedded"': 1, 'outcome="rejected"': 2, 'outcome="dropped"': 0,
    }  # fmt: skip
    causes = serving.counted(text, "mvmr_errors_total")
    assert {name.split('"')[1] for name in causes} == {"undecodable", "empty", "bad-image", "unknown-path"}
    assert serving.counted(text, "mvmr_queue_images") == {"": 0}
    assert serving.counted(text, "mvmr_ready") == {"": 1}


# Clients that go away: by hand, for no client library goes in the middle


def ask_by_hand(app: FastAPI, *pieces: bytes, gone: bool = False) -> httpx2.Response:
    """POST to /v1/embed a body of which so much arrives; then the client waits, or is gone."""

    async def whole() -> httpx2.Response:
        async with app.router.lifespan_context(app):
            return await post(app, *pieces, more=True, gone=gone)

    return asyncio.run(whole())


async def post(
    app: FastAPI,
    *pieces: bytes,
    more: bool = False,
    gone: bool | asyncio.Event = False,
    place: str = "/v1/embed",
    client: str = "test",
) -> httpx2.Response:
    sent = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    sent[-1]["more_body"] = more
    messages = iter(sent)
    answer: dict[str, Any] = {"body": b""}

    async def receive() -> dict[str, Any]:
        if message := next(messages, None):
            return message
        if isinstance(gone, asyncio.Event):
            await gone.wait()
        elif not gone:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        answer.update({key: value for key, value in message.items() if key in ("status", "headers")})
        answer["body"] += message.get("body", b"")

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": place,
        "raw_path": place.encode(), "query_string": b"", "root_path": "", "headers": [], "scheme": "http",
        "server": ("test", 80), "client": (client, 1),
    }  # fmt: skip
    async with asyncio.timeout(SECONDS):
        await app(scope, receive, send)
    return httpx2.Response(answer["status"], headers=answer["headers"], content=answer["body"])


def count(app: FastAPI, name: str, **labels: str) -> float | None:
    metrics = app.state.service.metrics
    value: float | None = metrics.registry.get_sample_value(name, labels)
    return value


def test_a_body_that_ends_early_is_no_request(engine: Engine) -> None:
    session = Session()
    app = create_app(session.within(engine), Settings())
    assert ask_by_hand(app, jpeg()[:1000], gone=True).status_code == 499
    assert session.batches == [4, 4, 1]  # to warm up, and the canary
    assert count(app, "mvmr_errors_total", cause="client-gone") == 1
    assert count(app, "mvmr_queue_images") == 0


def test_full_batches_that_fail_are_told_of_at_the_start(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def result(pixels: Pixels) -> Floats:
        if len(pixels) > 1:
            raise RuntimeError("no memory for so many")
        return serving.embedded(pixels)

    with serve(Session(result).within(engine)) as client:
        assert client.get("/readyz").status_code == 200  # one at a time, it does
    assert [each.getMessage() for each in caplog.records if each.levelno >= 40] == [
        "the engine failed on a batch of 4"
    ] * 2


@pytest.mark.parametrize("place", ["/v1/embed", INFER])
def test_who_has_gone_is_dropped_before_inference(engine: Engine, place: str) -> None:
    session = Session()
    app = create_app(session.within(engine), Settings())
    bodies = {"/v1/embed": jpeg(), INFER: json.dumps({"inputs": [tensor(ONE, data=DATA)]}).encode()}

    async def until(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(SECONDS):
            while not holds():
                await asyncio.sleep(0.001)

    async def whole() -> list[int]:
        async with app.router.lifespan_context(app):
            gone = asyncio.Event()
            with session.held():
                first = asyncio.create_task(post(app, bodies[place], place=place))
                await asyncio.to_thread(session.begun)
                second = asyncio.create_task(post(app, bodies[place], gone=gone, place=place))
                third = asyncio.create_task(post(app, bodies[place], place=place))
                await until(lambda: count(app, "mvmr_queue_images") == 3)
                gone.set()
                statuses = [(await second).status_code]
                await until(lambda: count(app, "mvmr_queue_images") == 2)
            return [*statuses, (await first).status_code, (await third).status_code]

    assert asyncio.run(whole()) == [499, 200, 200]
    assert session.batches == [4, 4, 1, 1, 1]  # to warm up, the canary, the first and the third
    assert count(app, "mvmr_errors_total", cause="client-gone") == 1
    assert count(app, "mvmr_images_total", outcome="embedded") == 2


def test_who_finds_no_room_hears_so_before_his_body_has_come(engine: Engine) -> None:
    session = Session()
    app = create_app(session.within(engine), Settings(queue=1, max_items=1))

    async def whole() -> httpx2.Response:
        async with app.router.lifespan_context(app):
            with session.held():
                first = asyncio.create_task(post(app, jpeg()))
                await asyncio.to_thread(session.begun)
                refused = await post(app, b"", more=True, client="another")  # whose body never comes
            assert (await first).status_code == 200
            return refused

    refused = asyncio.run(whole())
    assert problem(refused) == "busy"
    assert "--queue" in refused.json()["detail"]
    assert count(app, "mvmr_http_requests_total", endpoint="/v1/embed", status="429") == 1


def test_bodies_under_way_take_only_so_much_memory(engine: Engine) -> None:
    app = create_app(engine, Settings(max_body=1000))

    async def whole() -> httpx2.Response:
        async with app.router.lifespan_context(app):
            waiting = [asyncio.create_task(post(app, bytes(1000), more=True)) for _ in range(2)]
            await asyncio.sleep(0)
            while app.state.service._bytes.total < 2000:
                await asyncio.sleep(0)
            assert problem(await post(app, bytes(1000), more=True)) == "busy"  # what is left is for others
            waiting.append(asyncio.create_task(post(app, bytes(1000), more=True, client="another")))
            while app.state.service._bytes.total < 3000:
                await asyncio.sleep(0)
            refused = await post(app, bytes(700), client="a third")
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert (await post(app, jpeg()[:999])).status_code == 422
            return refused

    refused = asyncio.run(whole())
    assert problem(refused) == "busy"
    assert refused.headers["retry-after"] == "1"
