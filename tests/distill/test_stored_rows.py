"""A file of embeddings as teacher: the live teacher's student, rows by name or content, files that can't teach."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from pyarrow import parquet

import mvmr
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.cli.main import main
from mvmr.data import open_images
from mvmr.distillation.embedding import embed
from mvmr.distillation.teachers.recorded import recorded_teachers, teacher_of
from mvmr.distillation.teachers.spec import parse_specs
from mvmr.distillation.teachers.stored_rows import StoredRows
from mvmr.distillation.teachers.table import open_teacher
from mvmr.distillation.teachers.teacher import NoTextTower
from mvmr.errors import MvmrError
from mvmr.representations.cache import represent
from mvmr.storage.atomic import cache_dir
from tests.distill.small_onnx import small_onnx
from tests.distill.test_run import TINY, a_teacher, batch_sizes, photos

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen photographs below photos/, one of them in a folder of its own."""
    folder = tmp_path_factory.mktemp("rows")
    photos(folder / "photos", 16)
    (folder / "photos" / "deep").mkdir()
    (folder / "photos" / "03.jpg").rename(folder / "photos" / "deep" / "03.jpg")
    return folder


def keys(folder: Path) -> list[str]:
    return list(open_images(str(folder / "photos"), "unlabelled").keys)


def write(file: Path, columns: Mapping[str, Any]) -> Path:
    parquet.write_table(pa.table(dict(columns)), file)
    return file


def numbered(count: int, width: int = 3) -> list[list[float]]:
    return [[float(number)] * width for number in range(count)]


def open_rows(what: object) -> StoredRows:
    teacher = open_teacher(parse_specs(f"rows:{what}")[0])
    assert isinstance(teacher, StoredRows)
    return teacher


def distil(teacher: str, folder: Path, out: Path, **options: Any) -> Bundle:
    return mvmr.distill(teacher, str(folder / "photos"), out, assign=TINY, device="cpu", **options)


def weights(bundle: Bundle) -> bytes:
    return (bundle.path / "encoder.safetensors").read_bytes()


def test_a_file_of_rows_gives_the_student_of_the_teacher_whose_rows_they_are(folder: Path, tmp_path: Path) -> None:
    live = f"onnx:{small_onnx(tmp_path / 'model.onnx')}"
    assert embed(live, str(folder / "photos"), tmp_path / "rows.parquet", device="cpu") == (16, 5)
    shutil.rmtree(cache_dir())
    stored = distil(f"rows:{tmp_path / 'rows.parquet'}", folder, tmp_path / "stored")
    shutil.rmtree(cache_dir())
    assert weights(stored) == weights(distil(live, folder, tmp_path / "live"))
    record = recorded_teachers(stored)["teacher"]
    assert record["name"] == "rows:rows.parquet"
    assert teacher_of(stored, None, None, "cpu", text=False).identity == record["identity"]


def test_a_file_says_whose_rows_it_holds_and_of_which_files(folder: Path, tmp_path: Path) -> None:
    teacher = a_teacher(tmp_path / "clip")
    embed(teacher, str(folder / "photos"), tmp_path / "rows.parquet", device="cpu")
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table.schema.metadata[b"teacher"] == b"clip"
    assert table.column("path").to_pylist() == keys(folder)
    images = open_images(str(folder / "photos"), "unlabelled")
    wanted = represent(images, open_teacher(parse_specs(teacher)[0]))
    np.testing.assert_array_equal(np.stack(table.column("embedding").to_pylist()).astype(np.float32), wanted)
    for taken, message in (("rows.parquet", "is there already"), ("rows.npy", r"should end in \.parquet")):
        with pytest.raises(MvmrError, match=message):
            embed(teacher, str(folder / "photos"), tmp_path / taken)


# -- rows and their images


@pytest.mark.parametrize("shift", ["", "/data/photos/", "s3://bucket/photos/"])
def test_rows_are_found_by_path_in_any_order(folder: Path, tmp_path: Path, shift: str) -> None:
    names = [shift + key for key in reversed(keys(folder))]
    file = write(tmp_path / "rows.parquet", {"path": names, "embedding": numbered(16)})
    images = open_images(str(folder / "photos"), "unlabelled")
    np.testing.assert_array_equal(represent(images, open_rows(file))[:, 0], np.arange(15.0, -1, -1))


def test_rows_are_found_by_file_name_where_that_is_of_one_image(folder: Path, tmp_path: Path) -> None:
    names = [Path(key).name for key in keys(folder)]
    file = write(tmp_path / "rows.parquet", {"image": names, "vector": numbered(16)})
    images = open_images(str(folder / "photos"), "unlabelled")
    np.testing.assert_array_equal(open_rows(file).numbers(images), np.arange(16))


def test_rows_are_found_by_content_whatever_a_file_is_called(folder: Path, tmp_path: Path) -> None:
    embed(f"onnx:{small_onnx(tmp_path / 'm.onnx')}", str(folder / "photos"), tmp_path / "all.parquet", device="cpu")
    table = parquet.read_table(tmp_path / "all.parquet").drop_columns("path")
    parquet.write_table(table, tmp_path / "rows.parquet")
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, key in enumerate(reversed(keys(folder))):
        shutil.copy(folder / "photos" / key, renamed / f"{number:03}.jpg")
    images = open_images(str(renamed), "unlabelled")
    np.testing.assert_array_equal(open_rows(tmp_path / "rows.parquet").numbers(images), np.arange(16)[::-1])


def test_rows_of_the_same_names_and_other_files_are_refused_unless_names_are_meant(
    folder: Path, tmp_path: Path
) -> None:
    embed(f"onnx:{small_onnx(tmp_path / 'm.onnx')}", str(folder / "photos"), tmp_path / "rows.parquet", device="cpu")
    others = tmp_path / "others"
    for key in keys(folder):
        (others / key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), "blue").save(others / key)
    images = open_images(str(others), "unlabelled")
    with pytest.raises(MvmrError, match=r"has a row of the name 00\.jpg, but its sha256 is that of another file"):
        open_rows(tmp_path / "rows.parquet").numbers(images)
    by_name = open_rows(f"{tmp_path / 'rows.parquet'}?key=path")
    np.testing.assert_array_equal(by_name.numbers(images), np.arange(16))


def test_the_parts_that_the_batch_job_writes_are_one_file(folder: Path, tmp_path: Path) -> None:
    names = keys(folder)
    for number, part in enumerate((slice(0, 10), slice(10, 16))):
        columns = {"path": names[part], "embedding": numbered(16)[part]}
        write(tmp_path / f"part-0000{number}.parquet", columns)
    write(tmp_path / "errors.parquet", {"path": ["x.jpg"], "code": ["broken"], "reason": ["cut"]})
    images = open_images(str(folder / "photos"), "unlabelled")
    np.testing.assert_array_equal(represent(images, open_rows(tmp_path))[:, 0], np.arange(16.0))


def test_images_without_a_row_are_counted_left_out_and_refused_above_a_share(folder: Path, tmp_path: Path) -> None:
    names = keys(folder)
    file = write(tmp_path / "rows.parquet", {"path": names[:14], "embedding": numbered(14)})
    with pytest.raises(MvmrError, match=r"lacks 2 of the 16 images of .* \(15\.jpg, deep/03\.jpg\), more than the 1 %"):
        distil(f"rows:{file}", folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    student = distil(f"rows:{file}", folder, tmp_path / "out", max_missing=0.2)
    assert student.manifest.training["data"]["images"] == 14
    with pytest.raises(MvmrError, match="lacks 2 of the 16 images"):
        represent(open_images(str(folder / "photos"), "unlabelled"), open_rows(file))


def test_a_column_that_tells_no_rows_apart_is_no_key(folder: Path, tmp_path: Path) -> None:
    columns = {"label": ["cat"] * 16, "image": keys(folder), "embedding": numbered(16)}
    images = open_images(str(folder / "photos"), "unlabelled")
    np.testing.assert_array_equal(open_rows(write(tmp_path / "r.parquet", columns)).numbers(images), np.arange(16))
    with pytest.raises(MvmrError, match="has two rows with label 'cat'; keep one"):
        open_rows(f"{tmp_path / 'r.parquet'}?key=label")


def test_copies_of_a_file_have_one_embedding(folder: Path, tmp_path: Path) -> None:
    columns = {"sha256": ["a" * 64, "b" * 64, "a" * 64], "embedding": [[1.0], [2.0], [1.0]]}
    assert open_rows(write(tmp_path / "same.parquet", columns)).dim == 1
    columns["embedding"] = [[1.0], [2.0], [3.0]]
    with pytest.raises(MvmrError, match="has two embeddings of one content"):
        open_rows(write(tmp_path / "other.parquet", columns))


# -- files that can't teach


@pytest.mark.parametrize(
    ("columns", "query", "message"),
    [
        ({"path": ["a", "b", "a"], "embedding": numbered(3)}, "", r"has two rows with path 'a'; keep one"),
        ({"path": ["a", "b"], "embedding": [[1.0, float("nan")], [1.0, 2.0]]}, "", "the embedding of a is not finite"),
        ({"path": ["a", "b"], "embedding": [[1.0, None], [1.0, 2.0]]}, "", "the embedding of a is not finite"),
        ({"path": ["a", "b"], "embedding": [[1.0, 2.0], [1e39, 2.0]]}, "", "the embedding of b is not finite"),
        ({"path": ["a", "b"], "embedding": [[1.0], [1.0, 2.0]]}, "", r"has rows of two widths, 1 and 2 \(b\)"),
        ({"path": ["a", "b"], "embedding": [[1.0], None]}, "", "has no embedding for b"),
        ({"path": ["a"], "embedding": [1.0]}, "", r"has no column of embeddings; name one"),
        ({"path": ["a"], "x": [[1.0]], "y": [[2.0]]}, "", r"several columns of lists of numbers \(x, y\); name one"),
        ({"number": [1], "embedding": [[1.0]]}, "", r"no column holds a text in every row"),
        ({"path": ["a", None], "embedding": [[1.0], [2.0]]}, "", "no column holds a text in every row"),
        ({"path": ["a"], "embedding": [[1.0]]}, "?key=paht", r"unknown column of .* 'paht'; did you mean 'path'\?"),
        (
            {"path": ["a"], "embedding": [[1.0]]},
            "?keys=path",
            r"unknown setting of teacher .* 'keys'; did you mean 'key'",
        ),
        ({"path": ["a"], "embedding": [[1.0]]}, "?embedding=path", r"unknown column of lists of numbers in .* 'path'"),
        ({"path": pa.array([], pa.string()), "embedding": pa.array([], pa.list_(pa.float32()))}, "", "has no rows"),
    ],
)
def test_rows_that_can_not_teach_are_one_line(
    tmp_path: Path, columns: Mapping[str, Sequence[Any]], query: str, message: str
) -> None:
    file = write(tmp_path / "rows.parquet", columns)
    with pytest.raises(MvmrError, match=message) as excinfo:
        open_rows(f"{file}{query}")
    assert "\n" not in str(excinfo.value)


def test_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("path,embedding")
    with pytest.raises(MvmrError, match=r"text\.parquet is not a whole Parquet file"):
        open_rows(tmp_path / "text.parquet")
    with pytest.raises(MvmrError, match=r"gone\.parquet: cannot read it: No such file"):
        open_rows(tmp_path / "gone.parquet")


def test_rows_of_other_images_say_what_both_are_called(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", {"path": ["x.jpg", "y.jpg"], "embedding": numbered(2)})
    message = r"no row of .* is of an image of .*: path has 'x\.jpg', the images are called '00\.jpg'; give rows of"
    with pytest.raises(MvmrError, match=message):
        distil(f"rows:{file}", folder, tmp_path / "out")


def test_two_rows_that_could_be_of_one_image_are_refused(folder: Path, tmp_path: Path) -> None:
    names = [f"old/{key}" for key in keys(folder)] + ["new/00.jpg"]
    file = write(tmp_path / "rows.parquet", {"path": names, "embedding": numbered(17)})
    with pytest.raises(MvmrError, match=r"two rows of .* could be of 00\.jpg: old/00\.jpg and new/00\.jpg"):
        distil(f"rows:{file}", folder, tmp_path / "out")


def test_a_file_of_rows_embeds_nothing_else(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", {"path": ["a"], "embedding": [[1.0]]})
    with pytest.raises(MvmrError, match="is a file of embeddings: it knows its own images and embeds no others"):
        open_rows(file).prepare(Image.new("RGB", (4, 4)))
    with pytest.raises(NoTextTower, match="has no text tower"):
        open_teacher(parse_specs(f"rows:{file}")[0], text=True)


# -- once an image, and without weights


def test_a_teacher_is_computed_once_an_image_and_then_not_needed_any_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, sizes = a_teacher(tmp_path / "clip"), batch_sizes(monkeypatch)
    first = distil(teacher, folder, tmp_path / "first")
    assert sum(sizes) == 16
    shutil.rmtree(tmp_path / "clip")
    second = distil(teacher, folder, tmp_path / "second")
    assert sum(sizes) == 16
    assert weights(first) == weights(second)
    assert second.manifest.training["teachers"] == first.manifest.training["teachers"]
    more = photos(tmp_path / "more", 8)
    with pytest.raises(MvmrError, match=r"teacher .*clip"):
        mvmr.distill(teacher, more, tmp_path / "third", assign=TINY, device="cpu")


def test_a_teacher_that_is_there_and_wrong_is_not_recalled(folder: Path, tmp_path: Path) -> None:
    columns = {"path": keys(folder), "embedding": numbered(16)}
    file = write(tmp_path / "rows.parquet", columns)
    distil(f"rows:{file}", folder, tmp_path / "first")
    write(file, columns | {"path": ["00.jpg"] * 16})
    with pytest.raises(MvmrError, match="has two rows with path"):
        distil(f"rows:{file}", folder, tmp_path / "second")
    file.unlink()
    assert weights(distil(f"rows:{file}", folder, tmp_path / "third")) == weights(bundles.load(tmp_path / "first"))


def test_rows_that_were_embedded_need_no_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its name the teacher is recalled in any folder; a relative path is another file in another folder."""
    model = small_onnx(tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    embed("onnx:model.onnx", str(folder / "photos"), tmp_path / "rows.parquet", device="cpu")
    model.unlink()
    distil("onnx:model.onnx", folder, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(MvmrError, match="cannot read it"):
        distil("onnx:model.onnx", folder, tmp_path / "other")


def test_a_teacher_that_was_never_opened_is_not_recalled(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match=r"gone\.onnx: cannot read it"):
        distil(f"onnx:{tmp_path / 'gone.onnx'}", folder, tmp_path / "out")


# -- the command


def test_the_command_embeds_by_a_teacher(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_onnx(tmp_path / "model.onnx")

    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> Result:
        return CliRunner().invoke(main, ["embed", *words])

    done = command(str(folder / "photos"), "--teacher", f"onnx:{model}", "--out", "rows.parquet")
    assert (done.exit_code, done.stdout) == (0, "rows.parquet: 16 embeddings of width 5\n"), done.stderr
    assert "next: mvmr distill --teacher rows:rows.parquet" in done.stderr
    assert parquet.read_table("rows.parquet").num_rows == 16
    wrong = command("bundle", "photos", "--teacher", f"onnx:{model}", "--out", "other.parquet")
    assert (wrong.exit_code, "give IMAGES alone" in wrong.stderr) == (2, True)
    wrong = command("photos", "--teacher", f"onnx:{model}", "--out", "other.parquet", "--dtype", "float16")
    assert (wrong.exit_code, "--dtype is for bundles" in wrong.stderr) == (2, True)
    wrong = command("photos", "--out", "other.parquet")
    assert (wrong.exit_code, "give BUNDLE and IMAGES" in wrong.stderr) == (2, True)


def test_metadata_of_a_run_name_the_file(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", {"path": keys(folder), "embedding": numbered(16)})
    student = distil(f"rows:{file}", folder, tmp_path / "out")
    manifest = json.loads((student.path / "bundle.json").read_text())
    record = manifest["training"]["teachers"]["teacher"]
    assert (record["kind"], record["what"], record["weights"]) == ("rows", "{weights}", "../rows.parquet")
    assert teacher_of(student, None, None, "cpu", text=False).weights == str(file)
