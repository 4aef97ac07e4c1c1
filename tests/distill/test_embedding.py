"""`mvmr embed --teacher`: transparent images, unreadable ones, and what the command refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from pyarrow import parquet

import mvmr
from mvmr.cli.main import main
from mvmr.data import open_images
from mvmr.distillation.embedding import embed
from mvmr.errors import MvmrError
from mvmr.representations.cache import represent
from tests.distill.small_onnx import small_onnx
from tests.distill.test_run import TINY
from tests.distill.test_stored_rows import open_rows

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

COUNT = 16


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model of mean colours, and pictures half of which are transparent."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = random.integers(0, 255, (12, 12, 4), dtype=np.uint8)
        pixels[:6, :, 3] = 0
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:02}.png")
    small_onnx(tmp_path / "m.onnx")
    return tmp_path


def command(*words: str) -> Result:
    return CliRunner().invoke(main, ["embed", *words])


def by_teacher(*words: str) -> Result:
    return command("photos", "--teacher", "onnx:m.onnx", "--out", "rows.parquet", *words)


def column(file: str) -> np.ndarray:
    return np.array(parquet.read_table(file).column("embedding").to_pylist(), np.float32)


@pytest.mark.slow
def test_rows_of_images_on_another_background_give_the_live_teachers_student(here: Path) -> None:
    done = by_teacher("--background", "0,0,0")
    assert done.exit_code == 0, done.output
    assert "mvmr distill --teacher rows:rows.parquet --data photos --set views.background=[0,0,0]" in done.stderr
    assign = (*TINY, "views.background=[0,0,0]")
    students = [
        mvmr.distill(teacher, "photos", here / name, assign=assign, device="cpu")
        for name, teacher in (("live", "onnx:m.onnx"), ("stored", "rows:rows.parquet"))
    ]
    first, second = ((student.path / "encoder.safetensors").read_bytes() for student in students)
    assert first == second


@pytest.mark.parametrize(
    ("words", "record", "shown"),
    [((), b"[255, 255, 255]", "laid on white"), (("--background", "none"), b"null", "without their alpha channel")],
)
def test_rows_are_of_the_background_that_their_file_records_and_of_no_other(
    here: Path, words: tuple[str, ...], record: bytes, shown: str
) -> None:
    assert by_teacher(*words).exit_code == 0
    assert parquet.read_schema("rows.parquet").metadata[b"background"] == record
    message = rf"made of images {shown} where they .*these are laid on RGB 0, 0, 9; embed .*--background 0,0,9"
    with pytest.raises(MvmrError, match=message) as excinfo:
        open_rows("rows.parquet").numbers(open_images("photos", "unlabelled", background=(0, 0, 9)))
    assert ("or distil with --set views.background=[255,255,255]" in str(excinfo.value)) == (not words)


@pytest.mark.parametrize("metadata", [None, {"background": "forest"}, {"background": "[1, 2]"}])
def test_a_file_of_others_says_nothing_of_backgrounds(here: Path, metadata: dict[str, str] | None) -> None:
    table = pa.table({"path": [f"{number:02}.png" for number in range(COUNT)], "embedding": [[1.0, 2.0]] * COUNT})
    parquet.write_table(table.replace_schema_metadata(metadata), "rows.parquet")
    images = open_images("photos", "unlabelled", background=(0, 0, 9))
    np.testing.assert_array_equal(open_rows("rows.parquet").numbers(images), np.arange(COUNT))


def test_the_embeddings_are_of_images_on_that_background(here: Path) -> None:
    embed("onnx:m.onnx", "photos", "black.parquet", background=(0, 0, 0), device="cpu")
    embed("onnx:m.onnx", "photos", "white.parquet", device="cpu")
    images = open_images("photos", "unlabelled", background=(0, 0, 0))
    np.testing.assert_array_equal(represent(images, open_rows("black.parquet")), column("black.parquet"))
    assert (column("black.parquet") != column("white.parquet")).any()


def test_unreadable_images_are_left_out_up_to_a_share(here: Path) -> None:
    (here / "photos" / "broken.png").write_text("no image")
    done = by_teacher()
    assert (done.exit_code, "--max-unreadable" in done.stderr) == (1, True)
    done = by_teacher("--max-unreadable", "0.1")
    assert (done.exit_code, done.stdout) == (0, f"rows.parquet: {COUNT} embeddings of width 5\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("photos", "--teacher", "onnx:m.onnx", "--teacher", "onnx:m.onnx"), "give one --teacher, not 2"),
        (("photos", "--teacher", "onnx:m.onnx", "--background", "black"), "black: give three whole numbers"),
        (("bundle", "photos", "--background", "0,0,0"), "give BUNDLE and IMAGES, or --teacher SPEC"),
        (("bundle", "photos", "--max-unreadable", "0.1"), "give BUNDLE and IMAGES, or --teacher SPEC"),
    ],
)
def test_what_does_not_go_together_is_refused(here: Path, words: tuple[str, ...], message: str) -> None:
    done = command(*words, "--out", "rows.parquet")
    assert done.exit_code == 2
    assert message in done.stderr
    assert not Path("rows.parquet").exists()


def test_a_background_that_is_no_colour_and_several_teachers_are_one_line(here: Path) -> None:
    done = by_teacher("--background", "0,0,300")
    assert (done.exit_code, "background = (0, 0, 300) must be 3 whole numbers" in done.stderr) == (1, True)
    with pytest.raises(MvmrError, match="a file holds the embeddings of one teacher, not of 2"):
        embed(["a=onnx:m.onnx", "b=onnx:m.onnx"], "photos", "rows.parquet")  # type: ignore[arg-type]
