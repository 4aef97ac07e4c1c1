"""Which row is of which image: contents beside names, copies, names that are there twice."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from mvmr.data import open_images
from mvmr.data.image_set import ImageSet
from mvmr.distillation.distill import leave_out_unknown
from mvmr.distillation.embedding import embed
from mvmr.distillation.teachers import contents
from mvmr.errors import MvmrError
from mvmr.representations.cache import represent
from tests.distill.small_onnx import small_onnx
from tests.distill.test_stored_rows import numbered, open_rows, write

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

COUNT = 40


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Small pictures of one colour each, 00.png to 39.png, below photos/."""
    (tmp_path / "photos").mkdir()
    for number in range(COUNT):
        Image.new("RGB", (4, 4), (6 * number, 0, 0)).save(tmp_path / "photos" / f"{number:02}.png")
    return reopen(tmp_path)


def reopen(folder: Path) -> ImageSet:
    return open_images(str(folder / "photos"), "unlabelled")


def sha256(images: ImageSet) -> list[str]:
    root = Path(images.name)
    return [hashlib.sha256((root / key).read_bytes()).hexdigest() for key in images.keys]


def columns(images: ImageSet) -> dict[str, Any]:
    return {"path": list(images.keys), "embedding": numbered(COUNT), "sha256": sha256(images)}


@pytest.mark.parametrize("number", [0, 1, 2, 3, 38, 39])
def test_one_image_that_was_exchanged_under_its_name_is_refused(images: ImageSet, tmp_path: Path, number: int) -> None:
    file = write(tmp_path / "rows.parquet", columns(images))
    shutil.copy(tmp_path / "photos" / "20.png", tmp_path / "photos" / f"{number:02}.png")
    with pytest.raises(MvmrError, match=rf"has a row of the name {number:02}\.png, but its sha256 is that of another"):
        open_rows(file).numbers(reopen(tmp_path))


def test_rows_without_a_hash_are_not_compared_and_those_with_one_are(images: ImageSet, tmp_path: Path) -> None:
    table = columns(images)
    table["sha256"][5:] = [None] * 35
    file = write(tmp_path / "rows.parquet", table)
    shutil.copy(tmp_path / "photos" / "20.png", tmp_path / "photos" / "30.png")
    np.testing.assert_array_equal(open_rows(file).numbers(reopen(tmp_path)), np.arange(COUNT))
    shutil.copy(tmp_path / "photos" / "20.png", tmp_path / "photos" / "03.png")
    shutil.copy(tmp_path / "photos" / "20.png", tmp_path / "photos" / "04.png")
    with pytest.raises(MvmrError, match=r"of the name 03\.png, .* another file, and 1 more are; embed these"):
        open_rows(file).numbers(reopen(tmp_path))


def test_a_file_is_hashed_once_whatever_subset_is_asked_for(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[bytes] = []
    sha256_of = contents._sha256
    monkeypatch.setattr(contents, "_sha256", lambda path: hashed.append(path) or sha256_of(path))
    teacher = open_rows(write(tmp_path / "rows.parquet", columns(images)))
    teacher.numbers(images)
    np.testing.assert_array_equal(teacher.numbers(images.subset([7, 3])), [7, 3])
    assert represent(images.subset([7, 3]), teacher)[:, 0].tolist() == [7.0, 3.0]
    assert teacher.hashes(images).to_pylist() == sha256(images)
    assert len(hashed) == COUNT


def test_an_image_that_is_gone_when_it_is_compared_is_one_line(images: ImageSet, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", columns(images))
    (tmp_path / "photos" / "11.png").unlink()
    with pytest.raises(MvmrError, match=r"cannot read image .*11\.png: .*; it was there when the data were opened"):
        open_rows(file).numbers(images)


# -- what is written anew


@pytest.mark.parametrize("query", ["?key=path", ""])
def test_a_hash_is_written_only_where_the_rows_file_says_it_and_it_is_so(
    images: ImageSet, tmp_path: Path, query: str
) -> None:
    file = write(tmp_path / "rows.parquet", columns(images))
    embed(f"rows:{file}{query}", images.name, tmp_path / "again.parquet", device="cpu")
    written = parquet.read_table(tmp_path / "again.parquet").column("sha256").to_pylist()
    assert written == ([None] * COUNT if query else sha256(images))


def test_no_hash_is_written_beside_rows_that_say_none_or_are_gone(images: ImageSet, tmp_path: Path) -> None:
    table = columns(images)
    del table["sha256"]
    file = write(tmp_path / "rows.parquet", table)
    for name in ("there", "gone"):
        embed(f"rows:{file}", images.name, tmp_path / f"{name}.parquet", device="cpu")
        assert parquet.read_table(tmp_path / f"{name}.parquet").column("sha256").null_count == COUNT
        file.unlink(missing_ok=True)
    embed(f"onnx:{small_onnx(tmp_path / 'm.onnx')}", images.name, tmp_path / "live.parquet", device="cpu")
    assert parquet.read_table(tmp_path / "live.parquet").column("sha256").to_pylist() == sha256(images)


# -- copies, and names that are there twice


def test_a_copy_that_was_rounded_otherwise_teaches_as_the_first(images: ImageSet, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "photos" / "07.png", tmp_path / "photos" / "copy.png")
    images = reopen(tmp_path)
    rows = np.random.default_rng(0).normal(size=(COUNT + 1, 3)).astype(np.float32)
    rows[COUNT] = rows[7] * np.float32(1 + 1e-6)
    assert (rows[COUNT] != rows[7]).any()
    table = {"sha256": sha256(images), "embedding": rows.tolist()}
    teacher = open_rows(write(tmp_path / "rows.parquet", table))
    np.testing.assert_array_equal(represent(images, teacher)[[7, COUNT]], rows[[7, 7]])
    with pytest.raises(MvmrError, match="has two embeddings of one content"):
        rows[COUNT] = rows[7] * np.float32(1.002)
        open_rows(write(tmp_path / "rows.parquet", table | {"embedding": rows.tolist()}))


def test_a_column_of_names_with_two_rows_of_one_name_is_named(images: ImageSet, tmp_path: Path) -> None:
    names = list(images.keys)
    table = {"file": [*names[:-1], names[3]], "caption": [f"no. {n}" for n in range(COUNT)]}
    file = write(tmp_path / "rows.parquet", table | {"embedding": numbered(COUNT)})
    with pytest.raises(MvmrError, match=r"its column file names the images of .*two rows of one name, '03\.png'; keep"):
        open_rows(file).numbers(images)


def test_a_row_of_a_whole_name_is_of_no_other_image(images: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "photos" / "deep").mkdir()
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "photos" / "deep" / "00.png")
    names = ["deep/00.png", *list(images.keys)[1:]]
    file = write(tmp_path / "rows.parquet", {"path": names, "embedding": numbered(COUNT)})
    numbers = open_rows(file).numbers(reopen(tmp_path))
    assert (numbers[0], numbers[-1]) == (-1, 0)


def test_what_several_files_lack_counts_together(images: ImageSet, tmp_path: Path) -> None:
    teachers = {}
    for part in range(3):
        kept = [number for number in range(COUNT) if number // 4 != part]
        table = {"path": [images.keys[number] for number in kept], "embedding": numbered(len(kept))}
        teachers[f"t{part}"] = open_rows(write(tmp_path / f"{part}.parquet", table))
    assert len(leave_out_unknown(images, teachers, 0.3, progress=False)) == 28
    with pytest.raises(MvmrError, match=r"all files together lack 12 of the 40 images .* more than the 20 % allowed"):
        leave_out_unknown(images, teachers, 0.2, progress=False)
