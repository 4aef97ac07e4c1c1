"""Every problem of the service is produced, and has its status, its title and its headers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import httpx2
import numpy as np
import pytest

from mvmr.serve import Engine
from mvmr.serve.http.app import create_app
from mvmr.serve.http.problems import PROBLEMS
from mvmr.serve.http.settings import ConnectionLimits, Settings
from tests.serve import serving
from tests.serve.inprocess import (
    DATA,
    INFER,
    KEY,
    Floats,
    Index,
    Pixels,
    Session,
    as_json,
    ask_by_hand,
    files,
    pixels,
    serve,
    tensor,
)
from tests.serve.serving import jpeg, problem

Ask = Callable[[Engine], httpx2.Response]


def asking(method: str, endpoint: str, settings: Mapping[str, Any] | None = None, **options: Any) -> Ask:
    def ask(engine: Engine) -> httpx2.Response:
        with serve(engine, **settings or {}) as client:
            return client.request(method, endpoint, **options)

    return ask


def post_to(session: Session, endpoint: str = "/v1/embed") -> Ask:
    return lambda engine: asking("POST", endpoint, content=jpeg())(session.within(engine))


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
        with session.hold():
            first.start()
            session.wait_for_batch()
            refused = client.post("/v1/embed", content=jpeg())
        first.join()
    assert answers[0].status_code == 200
    return refused


def internal(engine: Engine) -> httpx2.Response:
    class Broken(Index):
        def search(self, vectors: Floats, k: int) -> list[list[Any]]:
            raise ZeroDivisionError

    index = Broken(engine.space_id)
    with serve(engine, index) as client:
        return client.post("/v1/search", content=jpeg())


def no_memory(engine: Engine) -> httpx2.Response:
    class Full(Index):
        def search(self, vectors: Floats, k: int) -> list[list[Any]]:
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
        asking("POST", "/v1/embed?normalise=true", **ONE_JPEG),
        asking("POST", "/v1/embeddings?normalize=true", **as_json({"model": "student", "input": ["a"]})),
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
        post_to(Session(lambda pixels: serving.embed_by_hand(pixels) * np.float32(np.nan))),
    ],
    "not-ready": [
        lambda engine: asking("GET", "/readyz")(raising(RuntimeError("the GPU\nis gone")).within(engine)),
        lambda engine: asking("GET", "/v2/health/ready")(
            Session(lambda p: serving.embed_by_hand(p) * 1.01).within(engine)
        ),
        lambda engine: asking("GET", "/v2/models/student/ready")(
            Session(lambda p: serving.embed_by_hand(p) * np.float32(np.nan)).within(engine)
        ),
    ],
}  # fmt: skip
AT_THE_CONNECTION = {"slow-head", "large-head"}  # see test_connections.py
CASES = [pytest.param(name, ask, id=f"{name}-{i}") for name, asks in PRODUCED.items() for i, ask in enumerate(asks)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ask"), CASES)
def test_each_problem_has_its_status_and_type(engine: Engine, name: str, ask: Ask) -> None:
    answer = ask(engine)
    assert problem(answer) == name
    status, title = PROBLEMS[name]
    assert (answer.status_code, answer.json()["title"]) == (status, title)


def test_no_problem_is_left_out() -> None:
    assert PRODUCED.keys() | AT_THE_CONNECTION == PROBLEMS.keys()


@pytest.mark.slow
def test_headers_of_problems(engine: Engine) -> None:
    assert PRODUCED["wrong-key"][0](engine).headers["www-authenticate"] == "Bearer"
    assert PRODUCED["wrong-method"][0](engine).headers["allow"] == "POST"
    assert int(PRODUCED["busy"][0](engine).headers["retry-after"]) >= 1
    assert PRODUCED["slow-body"][0](engine).headers["connection"] == "close"
