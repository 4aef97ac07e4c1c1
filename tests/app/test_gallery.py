"""A gallery has the images of `mvmr report`; its embeddings are computed once, exactly, whatever stops them."""

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvmr.app.embedders.engines import Engines
from mvmr.app.gallery import Gallery, cache_folder
from mvmr.bundles.bundle import Bundle
from mvmr.data import ImageSet
from mvmr.data.image_set import Arrays, numbered_names
from mvmr.distillation.report.subject import Subject
from mvmr.errors import MvmrError
from mvmr.representations.cache import represent
from tests.app.galleries import colours, embed_all, picture, pictures, refusal
from tests.distill.test_report import a_bundle
from tests.serve import serving

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A resnet18 at 16 px."""
    return a_bundle(tmp_path_factory.mktemp("runs") / "student")


# -- which images


@pytest.mark.slow
@pytest.mark.parametrize("limit", [20, 5000])
def test_a_gallery_has_the_images_that_a_report_measures(bundle: Bundle, tmp_path: Path, limit: int) -> None:
    for number in range(3):
        pictures(tmp_path / "photos" / "abc"[number], 12, 12 * number)
    for spec in ("sample:patches", str(tmp_path / "photos")):
        reported = Subject.open(
            bundle, spec, teacher=None, pretrained=None, limit=limit, k=3, device="cpu", max_unreadable=0.01,
            progress=False,
        )  # fmt: skip
        gallery = Gallery.open(spec, limit=limit)
        assert list(gallery.keys) == list(reported.images.keys)
        assert gallery.fingerprint == reported.images.fingerprint
        assert gallery.available == reported.available
        assert gallery.classes == reported.classes
        assert np.array_equal(gallery.labels, reported.labels)
        assert gallery.name == spec
    assert len(gallery) == min(limit, 6)  # 20 % of each class
    assert gallery.classes == ("a", "b", "c")


def test_a_folder_without_classes_is_a_gallery_of_all_its_images(tmp_path: Path) -> None:
    pictures(tmp_path / "photos" / "deep" / "inside", 7)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    gallery = Gallery.open(str(tmp_path / "photos"), max_unreadable=0.5)
    assert list(gallery.keys) == [f"deep/inside/{number:03}.png" for number in range(7)]
    assert gallery.labels is None
    assert gallery.classes is None
    assert [file.key for file in gallery.skipped] == ["broken.png"]
    assert np.array_equal(np.asarray(gallery.load(2)), np.asarray(picture(2)))


def test_images_of_several_labels_have_none_to_show() -> None:
    several = ImageSet(
        name="several", split="test", source=Arrays(np.zeros((3, 4, 4, 3), np.uint8), numbered_names("test", 3)),
        fingerprint="f", read_labels=lambda: np.ones((3, 2), np.int64), classes=("a", "b"),
    )  # fmt: skip
    gallery = Gallery(several)
    assert gallery.labels is None
    assert gallery.classes is None


def test_what_can_not_be_a_gallery_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "nothing" in refusal(tmp_path / "empty")
    assert "does not exist" in refusal(tmp_path / "gone")
    assert "no images" in refusal(pictures(tmp_path / "one", 1))
    assert "give a limit of 2 or more" in refusal(pictures(tmp_path / "many", 3), limit=1)
    assert "did you mean 'sample:patches'" in refusal("sample:patch")
    assert "no embeddings at" in refusal(tmp_path / "gone.parquet")
    assert len(Gallery.open(str(pictures(tmp_path / "two", 2)))) == 2


# -- thumbnails


def test_a_thumbnail_is_the_image_made_small(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    (tmp_path / "p").mkdir()
    photograph = serving.photograph().resize((400, 300))
    photograph.save(tmp_path / "p" / "0.jpg", exif=exif, icc_profile=b"a profile")
    picture(1).save(tmp_path / "p" / "1.png")
    gallery = Gallery.open(str(tmp_path / "p"))
    with Image.open(io.BytesIO(gallery.thumbnail(0, 100))) as small:
        assert small.format == "WEBP"
        assert small.size == (100, 75)
        assert not {"exif", "icc_profile", "xmp"} & set(small.info)
        wanted = np.asarray(photograph.resize((100, 75)), float)
        assert np.abs(np.asarray(small.convert("RGB"), float) - wanted).mean() < 6
    with Image.open(io.BytesIO(gallery.thumbnail(1))) as small:
        assert small.size == (24, 18)  # never enlarged
    (tmp_path / "p" / "0.jpg").unlink()
    gallery.thumbnail(0, 100)  # kept
    with pytest.raises(MvmrError, match=r"cannot read image .*0\.jpg"):
        gallery.thumbnail(0, 99)
    for outside in (-1, 2):
        with pytest.raises(IndexError):
            gallery.thumbnail(outside)


# -- embeddings


def test_embeddings_of_torch_are_those_of_a_report_to_the_last_digit(bundle: Bundle, tmp_path: Path) -> None:
    gallery = Gallery.open(str(pictures(tmp_path / "photos", 150)))
    encoder = Engines(bundle).get("torch")
    steps: list[tuple[int, int]] = []
    embeddings = gallery.embeddings(encoder, cache_folder(bundle), lambda done, of: steps.append((done, of)))
    assert embeddings.dtype == np.float32
    assert np.array_equal(embeddings, represent(gallery.images, bundle.student()))
    assert steps == [(64, 150), (128, 150), (150, 150)]
    second = gallery.embeddings(encoder, cache_folder(bundle), lambda *_: pytest.fail("computed twice"))
    assert np.array_equal(second, embeddings)
    assert [file.suffix for file in cache_folder(bundle).iterdir() if file.stem.endswith(gallery.fingerprint[:16])] == [
        ".npy"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0, 1, 63, 64, 65.5, 149])
def test_a_stopped_run_goes_on_and_ends_with_the_same_digits(bundle: Bundle, tmp_path: Path, share: float) -> None:
    gallery = Gallery.open(str(pictures(tmp_path / "photos", 150)))
    counts: list[int] = []
    student = Engines(bundle).get("torch")

    def forward(prepared: Sequence[Any]) -> np.ndarray:
        counts.append(len(prepared))
        return student.forward(prepared)

    encoder = replace(student, forward=forward)
    reference = np.array(gallery.embeddings(encoder, tmp_path / "rows"))
    (file,) = (tmp_path / "rows").glob("*.npy")
    content = file.read_bytes()
    header = len(content) - reference.nbytes
    file.unlink()
    file.with_name(f"{file.name}.partial").write_bytes(content[: header + int(share * 4 * reference.shape[1])])
    counts.clear()
    assert np.array_equal(gallery.embeddings(encoder, tmp_path / "rows"), reference)
    assert counts == [64, 64, 22][int(share) // 64 :]


@pytest.mark.slow
def test_a_killed_run_loses_no_batch_that_was_done(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", 150)
    program = """
import os, signal, sys
from pathlib import Path
from mvmr.app.gallery import Gallery
from tests.app.galleries import colours
def advance(done, of):
    if done == 128:
        os.kill(os.getpid(), signal.SIGKILL)
Gallery.open("photos").embeddings(colours(), Path("rows"), advance)
"""
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=where, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    gallery = Gallery.open(str(tmp_path / "photos"))
    count: list[int] = []
    assert np.array_equal(gallery.embeddings(colours(count), tmp_path / "rows"), embed_all(gallery))
    assert count == [22]


def test_a_changed_image_or_another_encoder_is_computed_anew(tmp_path: Path) -> None:
    photos, count = pictures(tmp_path / "photos", 70), []
    gallery = Gallery.open(str(photos))
    before = gallery.embeddings(colours(count), tmp_path / "rows")
    assert count == [64, 6]
    Image.new("RGB", (9, 9), "red").save(photos / "003.png")
    changed = Gallery.open(str(photos))
    assert changed.fingerprint != gallery.fingerprint
    after = changed.embeddings(colours(count), tmp_path / "rows")
    assert np.array_equal(after, embed_all(changed))
    assert np.flatnonzero((before != after).any(1)).tolist() == [3]
    changed.embeddings(colours(count, identity="b" * 64), tmp_path / "rows")
    assert count == [64, 6] * 3
    changed.embeddings(colours(count), tmp_path / "rows")
    assert count == [64, 6] * 3


def test_those_who_ask_at_once_wait_for_one_computation(tmp_path: Path) -> None:
    gallery, count = Gallery.open(str(pictures(tmp_path / "photos", 70))), []
    arrays: list[np.ndarray] = []
    ask = [
        threading.Thread(target=lambda: arrays.append(gallery.embeddings(colours(count), tmp_path / "rows")))
        for _ in range(4)
    ]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join(60)
    assert [np.array_equal(rows, embed_all(gallery)) for rows in arrays] == [True] * 4
    assert count == [64, 6]


def test_an_image_that_is_gone_by_then_is_named_and_the_rest_stays(tmp_path: Path) -> None:
    photos = pictures(tmp_path / "photos", 70)
    gallery, count = Gallery.open(str(photos)), []
    content = (photos / "066.png").read_bytes()
    times = (photos / "066.png").stat()
    (photos / "066.png").unlink()
    with pytest.raises(MvmrError, match=r"066\.png"):
        gallery.embeddings(colours(count), tmp_path / "rows")
    (photos / "066.png").write_bytes(content)
    os.utime(photos / "066.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert np.array_equal(gallery.embeddings(colours(count), tmp_path / "rows"), embed_all(gallery))
    assert count == [64, 6]
