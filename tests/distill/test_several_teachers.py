"""A student of several teachers: its order, its line at the start, and what evaluation, report and app say of each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import mvmr
from mvmr.app.opening import open_workbench
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.cli.main import main
from mvmr.distillation.comparison import compare
from mvmr.distillation.report.report import report
from mvmr.errors import MvmrError
from tests.distill.small_onnx import small_onnx
from tests.distill.test_run import TINY, a_teacher

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

BRIEF = {"k": 3, "permutations": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of three colours in class folders, below train/ and test/, and a model of mean colours."""
    folder, random = tmp_path_factory.mktemp("several"), np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 10)):
        for name, colour in {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 210)}.items():
            place = folder / "photos" / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = (np.array(colour) + random.integers(-60, 60, (3, 4, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).resize((24, 18), Image.Resampling.BICUBIC).save(place / f"{number}.png")
    small_onnx(folder / "colours.onnx")
    return folder


@pytest.fixture(scope="module")
def student(folder: Path) -> Bundle:
    a_teacher(folder / "clip")
    specs = [f"clip={folder / 'clip'}", f"colours=onnx:{folder / 'colours.onnx'}"]
    return mvmr.distill(specs, str(folder / "photos"), folder / "student", assign=TINY, device="cpu")


@pytest.mark.slow
def test_the_order_in_which_teachers_are_given_does_not_matter(folder: Path, student: Bundle, tmp_path: Path) -> None:
    specs = [f"colours=onnx:{folder / 'colours.onnx'}", f"clip={folder / 'clip'}"]
    other = mvmr.distill(specs, str(folder / "photos"), tmp_path / "other", assign=TINY, device="cpu")
    first, second = ((bundle.path / "encoder.safetensors").read_bytes() for bundle in (student, other))
    assert first == second


@pytest.mark.slow
def test_evaluation_measures_each_beside_the_student(folder: Path, student: Bundle) -> None:
    data = str(folder / "photos")
    comparison = compare(student.path, data)
    assert comparison.keys() == {"clip", "colours", "student"}
    assert comparison["clip"].keys() == {"zeroshot by clip", "linear", "knn"}
    assert comparison["colours"].keys() == {"linear", "knn"}
    assert comparison["student"].keys() == {"zeroshot by clip", "linear", "knn"}
    assert comparison["colours"]["linear"]["top1"] > 90  # the classes are colours
    records = {record["protocol"]: record for record in bundles.load(student.path).manifest.metrics}
    assert records["linear, teacher onnx:colours.onnx"]["values"] == comparison["colours"]["linear"]
    assert records["linear, teacher onnx:colours.onnx"]["command"].endswith("--table --teacher colours")
    alone = compare(student.path, data, teacher="colours", protocols=["linear"])
    assert alone["teacher"]["linear"] == comparison["colours"]["linear"]
    with pytest.raises(MvmrError, match="has no text tower"):
        compare(student.path, data, protocols=["zeroshot"])


@pytest.mark.slow
def test_the_report_has_a_page_for_each_and_one_that_leads_to_them(
    folder: Path, student: Bundle, tmp_path: Path
) -> None:
    data, out = str(folder / "photos"), tmp_path / "report"
    content = report(student.path, data, out=out, **BRIEF)
    assert list(content["teachers"]) == ["clip", "colours"]
    overview = (out / "index.html").read_text()
    for name, each in content["teachers"].items():
        assert json.loads((out / name / "report.json").read_text())["teacher"] == each["teacher"]
        assert (out / name / "index.html").is_file()
        assert f'href="{name}/index.html"' in overview
        assert f"{each['neighbours']['overlap']['mean']:.1f}</td>" in overview
        assert f"--teacher {name} " in each["command"]
    alone = report(student.path, data, teacher="colours", out=tmp_path / "alone", **BRIEF)
    assert alone["dependence"] == content["teachers"]["colours"]["dependence"]
    again = CliRunner().invoke(
        main, ["report", str(student.path), "--data", data, "--out", str(out), "--k", "3", "--permutations", "20"]
    )
    assert again.exit_code == 0, again.output
    assert "colours: neighbours of the teacher kept" in again.stdout
    assert "clip: linear probe: teacher" in again.stdout
    (out / "notes.txt").touch()
    with pytest.raises(MvmrError, match=r"holds 'notes\.txt', which is no part of a report"):
        report(student.path, data, out=out, **BRIEF)


def test_the_app_shows_the_first_and_names_the_others(
    folder: Path, student: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = str(folder / "photos")
    bench = open_workbench(student.path, gallery=gallery, progress=True)
    assert bench.teacher is not None
    assert bench.teacher.teacher.name == "clip"
    assert "also distilled from colours: --teacher colours" in " ".join(capsys.readouterr().err.split())
    other = open_workbench(student.path, teacher="colours", gallery=gallery)
    assert other.teacher is not None
    assert other.teacher.teacher.name == "onnx:colours.onnx"
