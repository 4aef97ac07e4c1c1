"""A gallery of what `mvmr embed` has made takes its embeddings and finds its images, wherever they are kept."""

import os
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvmr.app.embedders.embedder import Encoder, Provenance
from mvmr.app.embedders.engines import Engines
from mvmr.app.gallery import Gallery, cache_folder
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.serve.batch.job import embed
from tests.app.galleries import colours, picture, pictures, refusal
from tests.serve import serving

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.bundle(tmp_path_factory.mktemp("served"))


def test_rows_are_kept_beside_the_bundle_or_in_the_cache(
    bundle_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles.load(bundle_folder)
    assert os.access(bundle_folder.parent, os.W_OK)
    beside = bundle_folder.with_name("student.app") / bundle.space_id[:16]
    assert cache_folder(bundle) == beside
    monkeypatch.chdir(bundle_folder)
    assert cache_folder(Bundle(Path("."), bundle.manifest)) == beside
    assert cache_folder("0123456789abcdef0123") == cache / "app" / "0123456789abcdef"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cache_folder(bundle) == cache / "app" / bundle.space_id[:16]


def never(prepared: Sequence[Any]) -> np.ndarray:
    raise AssertionError("computed again")


def unable(encoder: Encoder) -> Encoder:
    return replace(encoder, forward=never)


@pytest.mark.slow
@pytest.mark.parametrize("out", ["out", "out.parquet", "out.npy", "shards"])
def test_embeddings_that_are_there_need_no_computation(bundle_folder: Path, tmp_path: Path, out: str) -> None:
    photos = pictures(tmp_path / "photos", 150)
    (photos / "001.png").write_bytes(b"no image")
    for number in range(2 if out == "shards" else 1):
        embed(bundle_folder, photos, out=tmp_path / out, part_rows=40, shard=(number, 2) if out == "shards" else None)
    gallery = Gallery.open(str(tmp_path / out))
    assert list(gallery.keys) == [f"{number:03}.png" for number in range(150) if number != 1]
    encoder = Engines(bundles.load(bundle_folder)).get("onnx-fp32")
    steps: list[tuple[int, int]] = []
    embeddings = gallery.embeddings(unable(encoder), tmp_path / "rows", lambda done, of: steps.append((done, of)))
    assert steps[-1] == (149, 149)
    np.testing.assert_allclose(embeddings, encoder.embed([gallery.load(number) for number in range(149)]), atol=1e-6)
    some = Gallery.open(str(tmp_path / out), limit=30)
    assert (len(some), some.available) == (30, 149)
    assert some.fingerprint != gallery.fingerprint
    rows = [list(gallery.keys).index(key) for key in some.keys]
    assert np.array_equal(some.embeddings(unable(encoder), tmp_path / "rows"), embeddings[rows])
    assert rows == sorted(rows)
    file = next(candidate for candidate in (tmp_path / "rows").glob("*.npy") if some.fingerprint[:16] in candidate.name)
    half = file.rename(file.with_name(f"{file.name}.partial"))
    os.truncate(half, half.stat().st_size - 10 * 4 * serving.DIM - 7)
    assert np.array_equal(some.embeddings(unable(encoder), tmp_path / "rows"), embeddings[rows])


def test_embeddings_of_another_kind_are_not_taken_for_these(
    bundle_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = pictures(tmp_path / "photos", 5)
    embed(bundle_folder, photos, out=tmp_path / "out.parquet")
    embed(bundle_folder, photos, out=tmp_path / "half.parquet", dtype="float16")
    gallery, half = (Gallery.open(str(tmp_path / name)) for name in ("out.parquet", "half.parquet"))
    source = Engines(bundles.load(bundle_folder)).get("onnx-fp32").provenance
    assert source is not None

    def is_computed(of: Gallery, provenance: Provenance | None) -> bool:
        counts: list[int] = []

        def forward(prepared: Sequence[Any]) -> np.ndarray:
            counts.append(len(prepared))
            return np.zeros((len(prepared), serving.DIM), np.float32)

        encoder = colours(provenance=provenance, dim=serving.DIM, forward=forward, identity=f"{next(numbers):064}")
        rows = of.embeddings(encoder, tmp_path / "rows")
        assert bool(counts) == (not rows.any())
        return bool(counts)

    numbers = count()
    assert not is_computed(gallery, source)
    assert not is_computed(gallery, replace(source, file=""))  # a service does not tell its file
    assert is_computed(gallery, None)
    assert is_computed(gallery, replace(source, space_id="f" * 32))
    assert is_computed(gallery, replace(source, precision="int8"))
    assert is_computed(gallery, replace(source, file="0" * 64))
    assert is_computed(half, source)
    for file in photos.iterdir():
        os.utime(file, ns=(2**62, 2**62))
    assert is_computed(Gallery.open(str(tmp_path / "out.parquet")), source)
    assert "newer" in caplog.text


@pytest.mark.slow
def test_normalised_embeddings_are_not_taken_for_raw_ones(bundle_folder: Path, tmp_path: Path) -> None:
    photos = pictures(tmp_path / "photos", 5)
    embed(bundle_folder, photos, out=tmp_path / "out.parquet", normalize=True)
    gallery = Gallery.open(str(tmp_path / "out.parquet"))
    encoder = Engines(bundles.load(bundle_folder)).get("onnx-fp32")
    embeddings = gallery.embeddings(encoder, tmp_path / "rows")
    np.testing.assert_allclose(embeddings, encoder.embed([gallery.load(number) for number in range(5)]), atol=1e-6)


ODD = [
    "plain.png",
    "sp ace.png",
    "back\\slash.png",
    "new\nline.png",
    "tab\t.png",
    "ünï.png",
    "\u00a0.png",
    "\u200b.png",
]


def test_files_of_any_name_are_found(bundle_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    names = [*(os.fsencode(name) for name in ODD), b"byte\xa0\xff.png"]
    for number, name in enumerate(sorted(names)):
        with open(os.fsencode(tmp_path / "photos") + b"/" + name, "wb") as file:
            picture(number).save(file, "PNG")
    embed(bundle_folder, tmp_path / "photos", out=tmp_path / "out.parquet")
    gallery = Gallery.open(str(tmp_path / "out.parquet"))
    assert len(gallery) == len(set(gallery.keys)) == len(names)
    assert all(np.array_equal(gallery.load(i), np.asarray(picture(i))) for i in range(len(names)))
    assert all(key.isprintable() for key in gallery.keys)


def test_relative_paths_are_looked_up_here_and_beside_the_embeddings(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    pictures(home / "photos" / "deep", 3)
    pictures(home / "photos", 1, start=9)
    (home / "out").mkdir()
    away.mkdir()
    monkeypatch.chdir(home)
    embed(bundle_folder, "photos", out="beside.parquet")
    embed(bundle_folder, "photos", out="out/inside.parquet")
    for spec in ("beside.parquet", "out/inside.parquet"):
        assert list(Gallery.open(spec).keys) == ["009.png", "deep/000.png", "deep/001.png", "deep/002.png"]
    monkeypatch.chdir(away)
    gallery = Gallery.open(str(home / "beside.parquet"))
    assert np.array_equal(np.asarray(gallery.load(1)), np.asarray(picture(0)))
    reason = refusal(home / "out" / "inside.parquet")
    assert f"image photos/009.png of the gallery {home}/out/inside.parquet is not there (4 of 4 are missing)" in reason
    assert "start the app in the folder where `mvmr embed` was run" in reason
    (home / "photos" / "deep" / "001.png").unlink()
    assert "image photos/deep/001.png" in refusal(home / "beside.parquet")
    assert "(1 of 4 are missing)" in refusal(home / "beside.parquet")


def test_images_inside_tar_files_are_no_gallery(bundle_folder: Path, tmp_path: Path) -> None:
    photos = pictures(tmp_path / "photos", 3)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, "inside")
    embed(bundle_folder, str(tmp_path / "photos.tar"), out=tmp_path / "out.parquet")
    assert "photos.tar/inside/000.png" in refusal(tmp_path / "out.parquet")


def test_what_is_no_output_of_mvmr_embed_is_one_sentence(bundle_folder: Path, tmp_path: Path) -> None:
    photos = pictures(tmp_path / "photos", 3)
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    assert "no Parquet file of embeddings" in refusal(tmp_path / "bad.parquet")
    (tmp_path / "list.txt").write_text("gone.png\n")
    embed(bundle_folder, tmp_path / "list.txt", out=tmp_path / "none.parquet")
    assert "is empty: it holds no embedding" in refusal(tmp_path / "none.parquet")
    embed(bundle_folder, photos / "001.png", out=tmp_path / "one.parquet")
    assert "has 1 image" in refusal(tmp_path / "one.parquet")
    (photos / "manifest.json").write_text("{}")  # a folder of images that has one of its own
    assert len(Gallery.open(str(photos))) == 3
