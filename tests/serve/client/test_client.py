"""The client, both of its classes, against a real service."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from mvmr.bundles import bundle as bundles
from mvmr.serve.client import AsyncClient, Client, Embeddings, ImageError
from mvmr.serve.client import client as module
from tests.serve import serving
from tests.serve.client.clients import ITEMS, KEY, PHOTOGRAPHS, both, refusal
from tests.serve.test_vectors import normalize_by_hand


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.bundle(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def service(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Running]:
    with serving.running(bundle, tmp_path_factory.mktemp("service"), env={"MVMR_MAX_ITEMS": str(ITEMS)}) as started:
        yield started


@pytest.fixture(scope="module")
def keyed_service(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Running]:
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text(f"{KEY}\n")
    with serving.running(bundle, folder, "--api-keys", str(folder / "keys")) as started:
        yield started


def expected_embeddings(*images: Image.Image) -> np.ndarray:
    return serving.embed_by_hand(serving.PREPROCESS.batch(images))


def posts(running: serving.Running, endpoint: str, status: int = 200) -> float:
    text = httpx2.get(f"{running.url}/metrics").text
    return serving.read_metric(text, "mvmr_http_requests_total").get(f'endpoint="{endpoint}",status="{status}"', 0)


@both
def test_any_number_of_images_of_any_kind_keep_their_order(kind: Any, service: serving.Running, tmp_path: Path) -> None:
    pictures = [serving.photograph(name) for name in PHOTOGRAPHS]
    path = tmp_path / "photo.png"
    pictures[0].save(path)
    images = [path, str(path), serving.encoded(pictures[1], "PNG"), pictures[2], np.asarray(pictures[3]), pictures[1]]
    before = posts(service, "/v1/embed")
    with kind(service.url, max_items=ITEMS) as client:
        embeddings = client.embed(iter([*images, *images, path]))
        several = client.embed(np.stack([np.asarray(pictures[0])] * 2))
    one = expected_embeddings(pictures[0], pictures[0], pictures[1], pictures[2], pictures[3], pictures[1])
    np.testing.assert_allclose(embeddings.vectors, np.concatenate([one, one, one[:1]]), atol=1e-5)
    assert embeddings.vectors.dtype == np.float32
    assert embeddings.errors == ()
    assert embeddings.space_id == bundles.load(serving_path(service)).space_id
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
    turned = Image.open(io.BytesIO(_turn(picture)))
    images = [picture.convert(mode) for mode in ("L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1", "F")]
    images += [Image.fromarray(grey.astype(np.uint16) * 257), turned]
    with Client(service.url, max_items=ITEMS) as client:
        np.testing.assert_allclose(client.embed(images).vectors, expected_embeddings(*images), atol=1e-5)


def _turn(picture: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return serving.encoded(picture, "JPEG", exif=exif)


def test_a_request_is_no_larger_than_asked_for(service: serving.Running) -> None:
    images = [serving.jpeg(name) for name in PHOTOGRAPHS]
    before = posts(service, "/v1/embed")
    with Client(service.url, max_items=ITEMS, max_bytes=len(images[0]) + len(images[1])) as client:
        several = client.embed(images[:3])
    assert posts(service, "/v1/embed") - before == 2
    with Client(service.url, max_items=ITEMS, max_bytes=1) as client:
        alone = client.embed(images[:3])
    assert posts(service, "/v1/embed") - before == 2 + 3
    np.testing.assert_array_equal(several.vectors, alone.vectors)


@both
def test_an_image_that_cannot_be_embedded_is_named(kind: Any, service: serving.Running, tmp_path: Path) -> None:
    good, cut = serving.jpeg(), serving.jpeg()[:3000]
    text, missing = tmp_path / "letter.jpg", tmp_path / "missing.jpg"
    text.write_text("Dear all")
    with kind(service.url, max_items=ITEMS) as client:
        before = posts(service, "/v1/embed")
        message = refusal(client.embed, [good, good, good, good, text])
        assert message.startswith(f"{service.url}: {text} can't be embedded: not-an-image; mend it, leave it out, or")
        assert "image number 1 can't be embedded" in refusal(client.classify, [good, b""], head="animals")
        assert f"{missing} can't be embedded: missing" in refusal(client.embed, [good, missing])
        assert posts(service, "/v1/embed") - before == 2  # nothing was sent for a call that had failed already
        embeddings = client.embed([good, text, missing, cut, b"", good, text], errors="return")
        ranked = client.classify([text, good, missing], head="animals", errors="return")
    assert [(error.index, error.name, error.code) for error in embeddings.errors] == [
        (1, str(text), "not-an-image"),
        (2, str(missing), "unreadable"),
        (3, "image number 3", "undecodable"),
        (4, "image number 4", "empty"),
        (6, str(text), "not-an-image"),
    ]
    missing_rows = np.isnan(embeddings.vectors).all(axis=1)
    np.testing.assert_array_equal(missing_rows, [False, True, True, True, True, False, True])
    np.testing.assert_array_equal(embeddings.vectors[0], embeddings.vectors[5])
    assert [len(row) for row in ranked.rows] == [0, 3, 0]
    assert [error.index for error in ranked.errors] == [0, 2]
    assert ranked.errors[0] == ImageError(0, str(text), "not-an-image", ranked.errors[0].reason)
    assert ranked.errors[0].reason


@both
def test_there_is_an_answer_without_any_embedding(kind: Any, service: serving.Running) -> None:
    with kind(service.url, max_items=ITEMS) as client:
        space = client.models()[0]["space_id"]
        for embeddings in (client.embed([]), client.embed(np.empty((0, 9, 9, 3), np.uint8))):
            assert (embeddings.vectors.shape, embeddings.space_id) == ((0, serving.DIM), space)
        embeddings = client.embed([b"", b"x"], errors="return")
        assert (embeddings.vectors.shape, embeddings.space_id) == ((2, serving.DIM), space)
        assert np.isnan(embeddings.vectors).all()
        assert [error.code for error in embeddings.errors] == ["empty", "not-an-image"]
        assert all(error.reason for error in embeddings.errors)
        assert client.classify([], head="animals").rows == ()


@both
def test_vectors_are_normalised_when_asked_and_of_a_space_of_their_own(kind: Any, service: serving.Running) -> None:
    pictures = [serving.photograph(name) for name in PHOTOGRAPHS]
    with kind(service.url, max_items=ITEMS) as client:
        (model,) = client.models()
        raw, unit_vectors = client.embed(pictures), client.embed(pictures, normalize=True)
        partial = client.embed([pictures[0], b"x"], normalize=True, errors="return")
        none = [client.embed(images, normalize=True, errors="return") for images in ([], [b"x"])]
    np.testing.assert_allclose(unit_vectors.vectors, normalize_by_hand(expected_embeddings(*pictures)), atol=1e-6)
    np.testing.assert_array_equal(partial.vectors[0], unit_vectors.vectors[0])
    assert np.isnan(partial.vectors[1]).all()
    assert raw.space_id == model["space_id"]
    assert {unit_vectors.space_id, partial.space_id, *(embeddings.space_id for embeddings in none)} == {
        model["normalized_space_id"]
    }


@both
def test_classes_are_those_of_the_head_in_the_order_of_their_probabilities(
    kind: Any, service: serving.Running, bundle: Path
) -> None:
    pictures = [serving.photograph(name) for name in PHOTOGRAPHS]
    head = bundles.load(bundle).head("animals")
    logits = expected_embeddings(*pictures).astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    with kind(service.url, max_items=ITEMS) as client:
        ranked = client.classify(pictures, head="animals", top_k=2)
        assert "give ?head=; this bundle has animals, colours" in refusal(client.classify, pictures)
    for row, expected in zip(ranked.rows, chances, strict=True):
        best = np.argsort(-expected)[:2]
        assert [label.label for label in row] == [head.classes[i] for i in best]
        np.testing.assert_allclose([label.probability for label in row], expected[best], atol=1e-5)


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
        answers = [*pool.map(client.embed, [pictures] * 8), *asyncio.run(tasks())]
    for answer in answers:
        np.testing.assert_allclose(answer.vectors, expected_embeddings(*pictures), atol=1e-5)


@pytest.mark.slow
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
            answers = [*pool.map(client.embed, [[picture] for picture in pictures])]
        assert posts(running, "/v1/embed", 429) > 0
    np.testing.assert_allclose(
        np.concatenate([answer.vectors for answer in answers]), expected_embeddings(*pictures), atol=1e-5
    )


@both
def test_what_the_service_refuses_is_said_in_its_words(kind: Any, service: serving.Running) -> None:
    images = [serving.jpeg()] * (ITEMS + 1)
    with kind(service.url) as client:
        message = refusal(client.embed, images)
        assert message == (
            f"{service.url}/v1/embed answered 422: 4 images in one request, at most 3 are taken (--max-items); "
            "send several requests; give the client that number as max_items"
        )
        assert "answered 404: there is no head 'birds'" in refusal(client.classify, images[:1], head="birds")
        assert "answered 422: query.top_k" in refusal(client.classify, images[:1], head="animals", top_k=0)
    with kind(f"{service.url}/elsewhere/") as client:
        assert f"{service.url}/elsewhere/v1/models answered 404: there is no" in refusal(client.models)
        assert client.ready() is False


@pytest.mark.slow
@both
def test_a_key_opens_the_door_and_another_is_refused_whatever_is_sent(
    kind: Any, keyed_service: serving.Running
) -> None:
    large = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    with kind(keyed_service.url, api_key=KEY) as client:
        assert client.embed([large]).vectors.shape == (1, serving.DIM)
    for wrong in (None, KEY[::-1]):
        with kind(keyed_service.url, api_key=wrong) as client:
            assert client.ready() is True
            message = refusal(client.embed, [large] * 4)  # refused before it is read
            assert message.startswith(f"{keyed_service.url}/v1/embed answered 401: send a valid key")
            assert message.endswith("give it to the client as api_key")
    assert KEY not in keyed_service.log_text
