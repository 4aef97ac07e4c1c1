"""Services in the process of the test, engines that do something else, and ways to ask it."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt
from fastapi import FastAPI
from starlette.testclient import TestClient

from mvmr.bundles import bundle as bundles
from mvmr.errors import MvmrError
from mvmr.serve import Engine
from mvmr.serve.http.app import create_app
from mvmr.serve.http.settings import Settings
from tests.serve import serving
from tests.serve.serving import PREPROCESS, jpeg

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")
SIZE = PREPROCESS.crop
KEY = "0123456789abcdef"
SECONDS = 20.0
BROKEN = jpeg()[: len(jpeg()) // 2]  # cut in the middle


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

    def __init__(self, result: Callable[[Pixels], Floats] = serving.embed_by_hand) -> None:
        self.batches: list[int] = []
        self.result, self._held = result, False
        self._begun, self._go = queue.SimpleQueue[None](), threading.Semaphore(0)

    def __call__(self, pixels: Pixels) -> dict[str, Floats]:
        self.batches.append(len(pixels))
        self._begun.put(None)
        if self._held:
            assert self._go.acquire(timeout=SECONDS)
        return {"embedding": self.result(pixels)}

    def wait_for_batch(self) -> None:
        """Wait until it is at the next batch."""
        self._begun.get(timeout=SECONDS)

    def let_go(self, batches: int = 1) -> None:
        self._go.release(batches)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """From here on, after those at the start, each batch waits for `let_go`; until the block ends."""
        for _ in range(3):  # two to warm up, and the canary
            self.wait_for_batch()
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

    def search(self, vectors: Floats, k: int) -> list[list[Any]]:
        self.asked.append((len(vectors), k))
        return [
            [type("Hit", (), {"path": f"{round(float(row[0]), 3)}", "score": 0.5, "row": 0})()] * min(k, 2)
            for row in vectors
        ]


def embeddings_of(*names: str) -> Floats:
    """The embeddings of photographs that went through a JPEG."""
    from mvmr.data.image_bytes import Prepared, prepare

    outcomes = [prepare(jpeg(name), PREPROCESS) for name in names]
    return serving.embed_by_hand(np.stack([outcome.pixels for outcome in outcomes if isinstance(outcome, Prepared)]))


def close(actual: Any, wanted: Floats, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(actual, np.float32), wanted, atol=tolerance)


def as_json(value: object) -> dict[str, Any]:
    return {"content": json.dumps(value), "headers": {"content-type": "application/json"}}


def base(data: bytes) -> str:
    return base64.b64encode(data).decode()


def files(*contents: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (f"{number}.jpg", content)) for number, content in enumerate(contents)]


def errors(results: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """The codes of what could not be embedded, by index."""
    return {result["index"]: result["error"]["code"] for result in results if "error" in result}


def softmax(embeddings: Floats, path: Path, name: str) -> Floats:

    head = bundles.load(path, verify=False).head(name)
    powers = np.exp(embeddings.astype(np.float64) @ head.weight.T + head.bias)
    return np.asarray(powers / powers.sum(1, keepdims=True), np.float32)


def pixels(count: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def tensor(images: Pixels, **more: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": "UINT8", "shape": list(images.shape)} | more


INFER = "/v2/models/student/infer"
LENGTH = "inference-header-content-length"


ONE = pixels(1)
DATA = ONE.ravel().tolist()


def ask_by_hand(app: FastAPI, *pieces: bytes, gone: bool = False) -> httpx2.Response:
    """POST to /v1/embed a body of which so much arrives; then the client waits, or is gone."""

    async def scenario() -> httpx2.Response:
        async with app.router.lifespan_context(app):
            return await post(app, *pieces, more=True, gone=gone)

    return asyncio.run(scenario())


async def post(
    app: FastAPI,
    *pieces: bytes,
    more: bool = False,
    gone: bool | asyncio.Event = False,
    endpoint: str = "/v1/embed",
    client: str = "test",
) -> httpx2.Response:
    events = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    events[-1]["more_body"] = more
    messages = iter(events)
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
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": endpoint,
        "raw_path": endpoint.encode(), "query_string": b"", "root_path": "", "headers": [], "scheme": "http",
        "server": ("test", 80), "client": (client, 1),
    }  # fmt: skip
    async with asyncio.timeout(SECONDS):
        await app(scope, receive, send)
    return httpx2.Response(answer["status"], headers=answer["headers"], content=answer["body"])


def count(app: FastAPI, name: str, **labels: str) -> float | None:
    metrics = app.state.service.metrics
    value: float | None = metrics.registry.get_sample_value(name, labels)
    return value
