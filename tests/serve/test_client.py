"""The client, both of its classes, against a real service, and its patience against a server that refuses by script."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from mvmr.bundles import bundle as bundles
from mvmr.errors import MvmrError
from mvmr.serve.client import AsyncClient, Client, Embeddings, Hit, ImageError
from mvmr.serve.client import client as module
from tests.serve import serving

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
ITEMS = 3
KEY = "0123456789abcdef"


class Awaited:
    """AsyncClient with the face of Client, so that each test holds for both."""

    def __init__(self, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(url, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def method(*arguments: Any, **options: Any) -> Any:
            return self._runner.run(getattr(self._client, name)(*arguments, **options))

        return method

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *raised: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


both = pytest.mark.parametrize("kind", [Client, Awaited])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.bundle(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def service(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Running]:
    with serving.running(bundle, tmp_path_factory.mktemp("service"), env={"MVMR_MAX_ITEMS": str(ITEMS)}) as started:
        yield started


@pytest.fixture(scope="module")
def locked(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Running]:
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text(f"{KEY}\n")
    with serving.running(bundle, folder, "--api-keys", str(folder / "keys")) as started:
        yield started


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that clients would have waited, in this test."""
    seconds: list[float] = []

    async def noted(wanted: float) -> None:
        seconds.append(wanted)

    monkeypatch.setattr(module, "sleep", seconds.append)
    monkeypatch.setattr(module, "async_sleep", noted)
    return seconds


def wanted(*images: Image.Image) -> np.ndarray:
    return serving.embedded(serving.PREPROCESS.batch(images))


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(MvmrError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def posts(running: serving.Running, endpoint: str, status: int = 200) -> float:
    text = httpx2.get(f"{running.url}/metrics").text
    return serving.counted(text, "mvmr_http_requests_total").get(f'endpoint="{endpoint}",status="{status}"', 0)


# Against a real service


@both
def test_any_number_of_images_of_any_kind_keep_their_order(kind: Any, service: serving.Running, tmp_path: Path) -> None:
    pictures = [serving.photograph(name) for name in PHOTOGRAPHS]
    path = tmp_path / "photo.png"
    pictures[0].save(path)
    images = [path, str(path), serving.encoded(pictures[1], "PNG"), pictures[2], np.asarray(pictures[3]), pictures[1]]
    before = posts(service, "/v1/embed")
    with kind(service.url, max_items=ITEMS) as client:
        found = client.embed(iter([*images, *images, path]))
        several = client.embed(np.stack([np.asarray(pictures[0])] * 2))
    one = wanted(pictures[0], pictures[0], pictures[1], pictures[2], pictures[3], pictures[1])
    np.testing.assert_allclose(found.vectors, np.concatenate([one, one, one[:1]]), atol=1e-5)
    assert found.vectors.dtype == np.float32
    assert found.errors == ()
    assert found.space_id == bundles.load(serving_path(service)).space_id
    assert posts(service, "/v1/embed") - before == 5 + 1  # 13 images, 3 to a request, and 2
    np.testing.assert_allclose(several.vectors, one[:2], atol=1e-5)


def serving_path(service: serving.Running) -> Path:
    """The bundle that a service has been started with."""
    arguments = service.process.args
    assert isinstance(arguments, list)
    return Path(arguments[4])


def test_what_is_sent_as_png_gives_what_the_engine_would_give(service: serving.Running) -> None:
    """Whatever Pillow's mode, and however the camera was held."""
    picture = serving.photograph()
    grey = np.asarray(picture.convert("L"))
    turned = Image.open(io.BytesIO(_turned(picture)))
    images = [picture.convert(mode) for mode in ("L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1", "F")]
    images += [Image.fromarray(grey.astype(np.uint16) * 257), turned]
    with Client(service.url, max_items=ITEMS) as client:
        np.testing.assert_allclose(client.embed(images).vectors, wanted(*images), atol=1e-5)


def _turned(picture: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return serving.encoded(picture, "JPEG", exif=exif)


def test_a_request_is_no_larger_than_asked_for(service: serving.Running) -> None:
    images = [serving.jpeg(name) for name in PHOTOGRAPHS]
    before = posts(service, "/v1/embed")
    with Client(service.url, max_items=ITEMS, max_bytes=len(images[0]) + len(images[1])) as client:
        found = client.embed(images[:3])
    assert posts(service, "/v1/embed") - before == 2
    with Client(service.url, max_items=ITEMS, max_bytes=1) as client:
        alone = client.embed(images[:3])
    assert posts(service, "/v1/embed") - before == 2 + 3
    np.testing.assert_array_equal(found.vectors, alone.vectors)


@both
def test_an_image_that_cannot_be_embedded_is_named(kind: Any, service: serving.Running, tmp_path: Path) -> None:
    good, cut = serving.jpeg(), serving.jpeg()[:3000]
    text, missing = tmp_path / "letter.jpg", tmp_path / "missing.jpg"
    text.write_text("Dear all")
    with kind(service.url, max_items=ITEMS) as client:
        before = posts(service, "/v1/embed")
        said = refusal(client.embed, [good, good, good, good, text])
        assert said.startswith(f"{service.url}: {text} can't be embedded: not-an-image; mend it, leave it out, or give")
        assert "image number 1 can't be embedded" in refusal(client.classify, [good, b""], head="animals")
        assert f"{missing} can't be embedded: missing" in refusal(client.embed, [good, missing])
        assert posts(service, "/v1/embed") - before == 2  # nothing was sent for a call that had failed already
        found = client.embed([good, text, missing, cut, b"", good, text], errors="return")
        ranked = client.classify([text, good, missing], head="animals", errors="return")
    assert [(each.index, each.name, each.code) for each in found.errors] == [
        (1, str(text), "not-an-image"),
        (2, str(missing), "unreadable"),
        (3, "image number 3", "undecodable"),
        (4, "image number 4", "empty"),
        (6, str(text), "not-an-image"),
    ]
    np.testing.assert_array_equal(np.isnan(found.vectors).all(axis=1), [False, True, True, True, True, False, True])
    np.testing.assert_array_equal(found.vectors[0], found.vectors[5])
    assert [len(row) for row in ranked.rows] == [0, 3, 0]
    assert [each.index for each in ranked.errors] == [0, 2]
    assert ranked.errors[0] == ImageError(0, str(text), "not-an-image", ranked.errors[0].reason)
    assert ranked.errors[0].reason


@both
def test_there_is_an_answer_without_any_embedding(kind: Any, service: serving.Running) -> None:
    with kind(service.url, max_items=ITEMS) as client:
        space = client.models()[0]["space_id"]
        for found in (client.embed([]), client.embed(np.empty((0, 9, 9, 3), np.uint8))):
            assert (found.vectors.shape, found.space_id) == ((0, serving.DIM), space)
        found = client.embed([b"", b"x"], errors="return")
        assert (found.vectors.shape, found.space_id) == ((2, serving.DIM), space)
        assert np.isnan(found.vectors).all()
        assert [(each.code, bool(each.reason)) for each in found.errors] == [("empty", True), ("not-an-image", True)]
        assert client.classify([], head="animals").rows == ()


@both
def test_classes_are_those_of_the_head_in_the_order_of_their_probabilities(
    kind: Any, service: serving.Running, bundle: Path
) -> None:
    pictures = [serving.photograph(name) for name in PHOTOGRAPHS]
    head = bundles.load(bundle).head("animals")
    logits = wanted(*pictures).astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    with kind(service.url, max_items=ITEMS) as client:
        found = client.classify(pictures, head="animals", top_k=2)
        assert "give ?head=; this bundle has animals, colours" in refusal(client.classify, pictures)
    for row, expected in zip(found.rows, chances, strict=True):
        best = np.argsort(-expected)[:2]
        assert [each.label for each in row] == [head.classes[i] for i in best]
        np.testing.assert_allclose([each.probability for each in row], expected[best], atol=1e-5)


@both
def test_what_is_served_can_be_asked(kind: Any, service: serving.Running) -> None:
    with kind(service.url) as client:
        assert client.ready() is True
        (model,) = client.models()
        assert "answered 404: this service was started without one" in refusal(client.search, [serving.jpeg()])
    assert (model["id"], model["dim"]) == ("student", serving.DIM)


def test_a_client_serves_many_threads_and_many_tasks(service: serving.Running) -> None:
    pictures = [serving.photograph(name) for name in PHOTOGRAPHS]

    async def tasks() -> list[Embeddings]:
        async with AsyncClient(service.url, max_items=ITEMS) as client:
            return await asyncio.gather(*(client.embed(pictures) for _ in range(8)))

    with Client(service.url, max_items=ITEMS) as client, ThreadPoolExecutor(8) as pool:
        found = [*pool.map(client.embed, [pictures] * 8), *asyncio.run(tasks())]
    for each in found:
        np.testing.assert_allclose(each.vectors, wanted(*pictures), atol=1e-5)


def test_clients_that_wait_get_their_answers_from_a_service_with_room_for_one(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "sleep", lambda seconds: time.sleep(seconds / 100))
    slow = (
        "import time\nfrom mvmr.serve.engine import Engine\ncompute = Engine.__call__\n"
        "Engine.__call__ = lambda self, pixels: time.sleep(0.1) or compute(self, pixels)"
    )
    pictures = [serving.photograph(name) for name in PHOTOGRAPHS]
    options = ["--queue", "1", "--max-items", "1", "--workers", "1"]
    with serving.running(bundle, tmp_path, *options, wrapped=slow) as running, ThreadPoolExecutor(4) as pool:
        with Client(running.url, max_items=1, retries=500) as client:
            found = [*pool.map(client.embed, [[each] for each in pictures])]
        assert posts(running, "/v1/embed", 429) > 0
    np.testing.assert_allclose(np.concatenate([each.vectors for each in found]), wanted(*pictures), atol=1e-5)


@both
def test_what_the_service_refuses_is_said_in_its_words(kind: Any, service: serving.Running) -> None:
    images = [serving.jpeg()] * (ITEMS + 1)
    with kind(service.url) as client:
        said = refusal(client.embed, images)
        assert said == (
            f"{service.url}/v1/embed answered 422: 4 images in one request, at most 3 are taken (--max-items); "
            "send several requests; give the client that number as max_items"
        )
        assert "answered 404: there is no head 'birds'" in refusal(client.classify, images[:1], head="birds")
        assert "answered 422: query.top_k" in refusal(client.classify, images[:1], head="animals", top_k=0)
    with kind(f"{service.url}/elsewhere/") as client:
        assert f"{service.url}/elsewhere/v1/models answered 404: there is no" in refusal(client.models)
        assert client.ready() is False


@both
def test_a_key_opens_the_door_and_another_is_refused_whatever_is_sent(kind: Any, locked: serving.Running) -> None:
    large = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    with kind(locked.url, api_key=KEY) as client:
        assert client.embed([large]).vectors.shape == (1, serving.DIM)
    for wrong in (None, KEY[::-1]):
        with kind(locked.url, api_key=wrong) as client:
            assert client.ready() is True
            said = refusal(client.embed, [large] * 4)  # refused before it is read
            assert said.startswith(f"{locked.url}/v1/embed answered 401: send a valid key")
            assert said.endswith("give it to the client as api_key")
    assert KEY not in locked.said


# Against a server that follows a script


class Scripted:
    """A server that gives its answers in turn, the last again and again; calls: method, path and body of each request.

    An answer is status, headers and body; None ends the connection without any.
    """

    def __init__(self, *answers: tuple[int, dict[str, str], bytes] | None) -> None:
        self.answers, self.calls = list(answers), list[tuple[str, str, bytes]]()

    @contextmanager
    def running(self) -> Iterator[str]:
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                boundary = self.headers.get("content-type", "").partition("boundary=")[2]
                script.calls.append((self.command, self.path, body.replace(boundary.encode() or b"-", b"")))
                answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, content = answer
                self.send_response(status)
                for name, value in {"content-length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer  # http.server's names

            def log_message(self, *arguments: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()
                thread.join()


def vectors(*rows: list[float], space: str = "a" * 32) -> tuple[int, dict[str, str], bytes]:
    headers = {"content-type": serving.FLOAT32, "x-shape": f"{len(rows)},{len(rows[0])}", "x-embedding-space": space}
    return 200, headers, np.array(rows, "<f4").tobytes()


def told(status: int, detail: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    document = json.dumps({"type": "urn:mvmr:problem:busy", "detail": detail, "status": status}).encode()
    return status, {"content-type": "application/problem+json", **headers}, document


BUSY = told(429, "no room for 1 more images now; try again in 7 s", **{"retry-after": "7"})


@both
def test_a_busy_service_is_asked_again_when_it_says(kind: Any, waits: list[float]) -> None:
    script = Scripted(BUSY, told(503, "starting"), (503, {"retry-after": "nonsense"}, b"<html>"), vectors([1, 2]))
    with script.running() as url, kind(url) as client:
        found = client.embed([b"the same each time"])
    np.testing.assert_array_equal(found.vectors, [[1, 2]])
    assert len(script.calls) == 4
    assert len(set(script.calls)) == 1
    assert b"the same each time" in script.calls[0][2]
    assert 7 <= waits[0] <= 7 + module_waits(1)
    assert 0 <= waits[1] <= module_waits(2)
    assert 0 <= waits[2] <= module_waits(3)


def module_waits(tries: int) -> float:
    """The longest random wait after so many tries: it doubles from a quarter of a second to ten."""
    return min(10.0, 0.25 * 2 ** (tries - 1))


@both
def test_the_random_waits_grow_up_to_a_bound_and_differ(kind: Any, waits: list[float]) -> None:
    script = Scripted(told(429, "no room; try again"))
    with script.running() as url, kind(url, retries=40) as client:
        said = refusal(client.embed, [b"x"])
    assert said == f"{url}/v1/embed answered 429: no room; try again (tried 41 times)"
    assert len(script.calls) == 41
    assert all(0 <= each <= module_waits(tries) for tries, each in enumerate(waits, 1))
    assert len(set(waits)) == 40
    assert max(waits) > 5  # of 34 drawn from [0, 10], not one above 5: once in 10^10 runs


@both
def test_a_date_to_come_back_at_is_understood(kind: Any, waits: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    script = Scripted((503, {"retry-after": date}, b""), vectors([1, 2]))
    with script.running() as url, kind(url) as client:
        client.embed([b"x"])
    assert 25 <= waits[0] <= 30.25


@both
def test_nobody_waits_for_an_hour_or_when_told_not_to_try_again(kind: Any, waits: list[float]) -> None:
    later = told(503, "closed for repairs", **{"retry-after": "3600"})
    for script, options in ((Scripted(later), {}), (Scripted(BUSY), {"retries": 0})):
        with script.running() as url, kind(url, **options) as client:
            said = refusal(client.models)
        assert said.startswith(f"{url}/v1/models answered ")
        assert "tried" not in said
        assert len(script.calls) == 1
    assert waits == []


@both
def test_a_connection_that_breaks_is_made_again(kind: Any, waits: list[float]) -> None:
    script = Scripted(None, None, vectors([1, 2]))
    with script.running() as url, kind(url) as client:
        np.testing.assert_array_equal(client.embed([b"x"]).vectors, [[1, 2]])
    assert len(script.calls) == 3
    assert len(waits) == 2


@both
def test_a_service_that_is_not_there_is_one_line(kind: Any, waits: list[float]) -> None:
    with Scripted(None).running() as url:
        pass
    with kind(url, retries=2) as client:
        assert client.ready() is False
        said = refusal(client.models)
    assert said.startswith(f"{url}/v1/models can't be reached: ConnectError")
    assert said.endswith("check the URL, and that the service is running there (tried 3 times)")
    assert len(waits) == 2


@both
def test_a_service_that_stays_silent_is_not_asked_the_same_again(kind: Any, waits: list[float]) -> None:
    script = Scripted((200, {"content-length": "10"}, b"short"))
    with script.running() as url, kind(url, timeout=0.2) as client:
        said = refusal(client.models)
    assert "has not answered in time: ReadTimeout" in said
    assert "give a longer timeout" in said
    assert len(script.calls) == 1


@both
@pytest.mark.parametrize("status", [400, 401, 404, 413, 415, 422, 500, 502])
def test_what_would_fail_again_is_not_sent_again(kind: Any, status: int, waits: list[float]) -> None:
    script = Scripted(told(status, "the detail; what to do"))
    with script.running() as url, kind(url) as client:
        assert refusal(client.embed, [b"x"]) == f"{url}/v1/embed answered {status}: the detail; what to do"
    assert len(script.calls) == 1


@both
def test_another_bundle_in_the_middle_of_a_call_is_noticed(kind: Any) -> None:
    script = Scripted(vectors([1, 2]), vectors([1, 2]), vectors([3, 4], space="b" * 32))
    with script.running() as url, kind(url, max_items=1) as client:
        said = refusal(client.embed, [b"x", b"y", b"z"])
        assert said == (
            f"{url}: its embedding space changed from aaaaaaaaaaaa to bbbbbbbbbbbb during this call: another bundle "
            "has been deployed; make the call again"
        )
        assert client.embed([b"x", b"y"]).space_id == "b" * 32


@both
@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"<html>welcome"),
        (200, {"content-type": "application/json"}, b"[1, 2]"),
        (200, {"content-type": "application/json"}, b'{"results": []}'),
        (200, {"content-type": serving.FLOAT32, "x-shape": "1,2"}, b"\0" * 8),
        (200, {"content-type": serving.FLOAT32, "x-embedding-space": "a", "x-shape": "1,3"}, b"\0" * 8),
        (200, {"content-type": serving.FLOAT32, "x-embedding-space": "a", "x-shape": "2,1"}, b"\0" * 8),
    ],
)
def test_another_server_than_ours_is_one_line(kind: Any, answer: tuple[int, dict[str, str], bytes]) -> None:
    with Scripted(answer).running() as url, kind(url) as client:
        assert refusal(client.embed, [b"x"]).startswith(f"{url} doesn't answer as an mvmr service does (")


def test_a_page_that_sends_elsewhere_or_fails_is_one_line() -> None:
    with Scripted((301, {"location": "https://there/"}, b"")).running() as url, Client(url) as client:
        said = "answered 301 Moved Permanently, to https://there/, not as an mvmr service does; check the URL"
        assert refusal(client.models) == f"{url}/v1/models {said}"
    with Scripted((502, {}, b"<html>")).running() as url, Client(url) as client:
        assert "answered 502 Bad Gateway, not as an mvmr service does" in refusal(client.models)


@both
def test_neighbours_are_read(kind: Any) -> None:
    hits = [{"path": "a.jpg", "score": 0.75}, {"path": "b.jpg", "score": 0.5}]
    document = json.dumps({"results": [{"index": 0, "hits": hits}]}).encode()
    script = Scripted((200, {"content-type": "application/json", "x-embedding-space": "a" * 32}, document))
    with script.running() as url, kind(f"{url}/behind/a/path") as client:
        assert client.search([b"x"], k=2).rows == ((Hit("a.jpg", 0.75), Hit("b.jpg", 0.5)),)
    assert script.calls[0][:2] == ("POST", "/behind/a/path/v1/search?k=2")


# Mistakes of the caller


@both
@pytest.mark.parametrize(
    ("images", "said"),
    [
        ("a.jpg", "the client takes several images; put the one into a list"),
        (b"bytes", "the client takes several images; put the one into a list"),
        (np.zeros((4, 4, 3), np.uint8), "the client takes arrays of uint8 [N, H, W, 3], this one is uint8 [4, 4, 3]"),
        (np.zeros((1, 4, 4, 3), np.float32), "an array must be uint8 [H, W, 3], image number 0 is float32 [4, 4, 3]"),
        ([b"", np.zeros((4, 4), np.uint8)], "an array must be uint8 [H, W, 3], image number 1 is uint8 [4, 4]"),
        ([7], "the client takes paths, bytes, PIL images and uint8 arrays, image number 0 is a int"),
    ],
)
def test_what_is_no_image_is_refused_before_anything_is_sent(kind: Any, images: Any, said: str) -> None:
    with kind("http://127.0.0.1:9") as client:
        assert refusal(client.embed, images, errors="return") == said


@both
def test_wrong_arguments_are_one_line(kind: Any) -> None:
    for url in ("localhost:8000", "ftp://x", "http://", "http://x:port", ""):
        assert "is no URL" in refusal(Client, url)
    for option in ({"retries": -1}, {"max_items": 0}, {"max_bytes": 0}):
        assert "of a client must be at least" in refusal(Client, "http://x", **option)
    for key in ("", "sch\u00f6n", "a\nb"):
        said = refusal(Client, "http://x", api_key=key)
        assert "the API key is not printable ASCII" in said
        assert not key or key not in said
    with kind("http://user:secret@127.0.0.1:9", retries=0) as client:
        assert "unknown value of errors 'retrun'; did you mean 'return'?" in refusal(client.embed, [], errors="retrun")
        assert "secret" not in refusal(client.models)


def test_the_client_needs_no_torch() -> None:
    program = "import sys, mvmr.serve.client\nassert not {'torch', 'fastapi', 'faiss', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
