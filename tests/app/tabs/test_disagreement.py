"""Disagreement of teacher and student: the report's own figures, the worst first, probes kept, and CSV that is safe."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvmr.app.embedders.embedder import Encoder
from mvmr.app.embedders.engines import Engines
from mvmr.app.gallery import Gallery
from mvmr.app.table import to_csv
from mvmr.app.tabs import probes as module
from mvmr.app.tabs.disagreement import RIGHT, Fidelity, Interval, fidelity_of
from mvmr.app.tabs.probes import ProbeResult, Probes, Training
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import WHITE
from mvmr.distillation.report import report as report_module
from mvmr.distillation.report import subject
from mvmr.distillation.report.report import report
from mvmr.errors import MvmrError
from tests.distill.test_report import COLOURS, Corners, a_bundle

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

K = 3


def pictures(folder: Path, count: int = 20, extra: Sequence[str] = ()) -> Path:
    """Noisy pictures of three colours, with a folder to each, some of them hard to tell apart."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.array(colour) + random.integers(-180, 180, (3, 4, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((24, 18), Image.Resampling.BICUBIC)
            image.save(folder / name / f"{number}.png")
    return folder


def side(teacher: Corners) -> Encoder:
    """A teacher as the app has it."""
    return Encoder(
        key="teacher", label="corners", identity=teacher.identity, dim=teacher.dim, nbytes=None,
        prepare=teacher.prepare, forward=lambda prepared: teacher(torch.stack(list(prepared))).numpy(),
    )  # fmt: skip


def features(count: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def lines(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


# -- the report's figures


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return a_bundle(tmp_path / "student")


@pytest.fixture
def corners(monkeypatch: pytest.MonkeyPatch) -> Corners:
    """The teacher of every bundle, and no page of a report."""
    teacher = Corners()
    monkeypatch.setattr(subject, "teacher_of", lambda *_, **__: teacher)
    monkeypatch.setattr(report_module, "write_page", lambda *_: None)
    return teacher


@pytest.mark.slow
def test_every_figure_is_that_of_the_report_to_the_last_digit(bundle: Bundle, corners: Corners, tmp_path: Path) -> None:
    data, folder = str(pictures(tmp_path / "photos", 40)), tmp_path / "kept"
    content = report(bundle.path, data, out=tmp_path / "report", k=K, permutations=2)
    gallery, student, teacher = Gallery.open(data), Engines(bundle).get("torch"), side(corners)
    rows = {encoder.key: gallery.embeddings(encoder, folder) for encoder in (teacher, student)}
    training = Training.open(data, gallery.classes, background=WHITE)
    assert gallery.labels is not None
    probes = Probes(
        teacher=ProbeResult.of(training.probe(teacher, folder), rows["teacher"], gallery.labels),
        student=ProbeResult.of(training.probe(student, folder), rows["torch"], gallery.labels),
    )
    fidelity = fidelity_of(rows["teacher"], rows["torch"], K, gallery.labels, gallery.classes, probes=probes)

    assert len(gallery) == 24
    assert vars(fidelity.overall) == content["neighbours"]["overlap"]
    assert fidelity.chance == pytest.approx(100 * content["neighbours"]["chance"], abs=1e-12)
    assert fidelity.classes is not None
    assert [{"name": row.name, "images": row.images, **vars(row.overlap)} for row in fidelity.classes] == (
        content["neighbours"]["classes"]
    )
    for row in content["neighbours"]["worst"]:
        assert fidelity.overlap[row["image"]] == row["overlap"]
    accuracies = {row.name: row.accuracy for row in fidelity.classes}
    assert len(accuracies) == len(content["probe"]["classes"]) == 3
    for row in content["probe"]["classes"]:
        own = accuracies[row["name"]]
        assert own is not None
        assert (own.teacher, own.student) == (row["teacher"], row["student"])
        assert own.difference == Interval(row["difference"], row["low"], row["high"])
    assert probes.teacher.top1 == content["probe"]["teacher"]["top1"]
    assert probes.student.top1 == content["probe"]["student"]["top1"]
    assert fidelity.agreement == content["probe"]["agreement"]
    # else the equalities above would hold for a student that is its teacher, too
    assert 0 < fidelity.overall.mean < 100
    assert 0 < fidelity.agreement < 100


@pytest.mark.slow
def test_without_labels_the_figures_are_those_of_the_report_too(
    bundle: Bundle, corners: Corners, tmp_path: Path
) -> None:
    (tmp_path / "flat").mkdir()
    for number, file in enumerate(sorted(pictures(tmp_path / "photos", 5).glob("*/*.png"))):
        file.rename(tmp_path / "flat" / f"{number:02d}.png")
    content = report(bundle.path, str(tmp_path / "flat"), out=tmp_path / "report", k=K, permutations=2)
    gallery, student = Gallery.open(str(tmp_path / "flat")), Engines(bundle).get("torch")
    rows = [gallery.embeddings(row, tmp_path / "kept") for row in (side(corners), student)]
    fidelity = fidelity_of(*rows, K, gallery.labels, gallery.classes)
    assert vars(fidelity.overall) == content["neighbours"]["overlap"]
    assert (fidelity.classes, fidelity.right, fidelity.agreement) == (None, None, None)
    assert [int(i) for i in fidelity.worst()[:12]] == [row["image"] for row in content["neighbours"]["worst"]]
    with pytest.raises(MvmrError, match="has no labels"):
        Training.open(str(tmp_path / "flat"), gallery.classes, background=WHITE)


# -- by hand


def a_fidelity(probes: Probes | None = None) -> Fidelity:
    overlap, labels = np.array([50.0, 0.0, 100.0, 0.0, 50.0]), np.array([0, 1, 0, 0, 1])
    return Fidelity.of(overlap, 2, labels, ["cat", "dog", "eel"], probes=probes)


def some_probes() -> Probes:
    """Labels are 0 1 0 0 1: both right, teacher only, student only, neither, both."""
    teacher, student = np.array([0, 1, 2, 1, 1]), np.array([0, 0, 0, 2, 1])
    return Probes(ProbeResult(teacher, 60.0), ProbeResult(student, 60.0))


def test_the_lowest_overlap_comes_first_and_equals_stay_in_their_order() -> None:
    fidelity = a_fidelity()
    assert fidelity.worst().tolist() == [1, 3, 0, 4, 2]
    assert fidelity.worst("cat").tolist() == [3, 0, 2]
    assert fidelity.worst("eel").tolist() == []
    assert fidelity.chance == 50
    assert fidelity.overall.mean == 40
    assert fidelity.overall.low < 40 < fidelity.overall.high
    assert fidelity.classes is not None
    assert [(row.name, row.images, row.overlap.mean) for row in fidelity.classes] == [("dog", 2, 25), ("cat", 3, 50)]
    assert all(row.accuracy is None for row in fidelity.classes)


def test_a_student_like_its_teacher_keeps_all_and_one_that_knows_nothing_is_at_chance() -> None:
    teacher = features(400, 8, 0)
    same, stranger = (fidelity_of(teacher, rows, 10) for rows in (3 * teacher, features(400, 8, 1)))
    assert same.overall == Interval(100, 100, 100)
    assert stranger.overall.low < stranger.chance < stranger.overall.high


def test_which_side_is_right_is_told_image_by_image() -> None:
    fidelity = a_fidelity(some_probes())
    assert fidelity.right is not None
    assert fidelity.right.dtype == np.uint8
    assert [RIGHT[i] for i in fidelity.right] == ["both", "teacher only", "student only", "neither", "both"]
    assert fidelity.agreement == 40
    assert fidelity.classes is not None
    dog, cat = fidelity.classes
    assert cat.accuracy is not None
    assert dog.accuracy is not None
    assert (cat.accuracy.teacher, cat.accuracy.student) == (pytest.approx(100 / 3), pytest.approx(200 / 3))
    assert cat.accuracy.difference.mean == pytest.approx(100 / 3)
    assert (dog.accuracy.teacher, dog.accuracy.student, dog.accuracy.difference.mean) == (100, 50, -50)


def test_more_neighbours_than_other_images_are_refused() -> None:
    with pytest.raises(MvmrError, match="5 neighbours of each of 5 images: give a k from 1 to 4"):
        fidelity_of(features(5, 3, 0), features(5, 3, 1), 5)


# -- probes


def test_a_probe_is_fitted_once_for_a_side_and_again_when_what_it_was_fitted_on_changes(
    corners: Corners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = pictures(tmp_path / "photos"), tmp_path / "kept"
    calls: list[int] = []
    real = module.linear_probe
    monkeypatch.setattr(module, "linear_probe", lambda *arguments: calls.append(1) or real(*arguments))
    first = Training.open(str(data), sorted(COLOURS), background=WHITE).probe(side(corners), folder)
    second = Training.open(str(data), sorted(COLOURS), background=WHITE).probe(side(corners), folder)
    assert len(calls) == 1
    assert np.array_equal(first.weight, second.weight)
    assert np.array_equal(first.bias, second.bias)
    assert first.chosen == second.chosen
    assert second.weight.dtype == np.float32

    (file,) = folder.glob("probe-*.json")
    text = file.read_text()
    for damaged in ("", text[:-30], "[]", json.dumps(json.loads(text) | {"shape": [7, 7]})):
        file.write_text(damaged)
        mended = Training.open(str(data), sorted(COLOURS), background=WHITE).probe(side(corners), folder)
        assert np.array_equal(first.weight, mended.weight)
        assert file.read_text() == text
    assert len(calls) == 5

    newcomer = Corners()
    newcomer.identity = "d" * 64
    Training.open(str(data), sorted(COLOURS), background=WHITE).probe(side(newcomer), folder)
    assert len(calls) == 6
    (data / "red" / "0.png").rename(data / "blue" / "99.png")
    Training.open(str(data), sorted(COLOURS), background=WHITE).probe(side(corners), folder)
    assert len(calls) == 7


def test_a_probe_for_a_gallery_of_other_classes_is_refused(tmp_path: Path) -> None:
    data = str(pictures(tmp_path / "photos", 5))
    with pytest.raises(MvmrError, match="the gallery has other classes than the training split of"):
        Training.open(data, ["blue", "green"], background=WHITE)
    with pytest.raises(MvmrError, match="the gallery has other classes"):
        Training.open(data, None, background=WHITE)


# -- CSV


def test_images_are_written_worst_first_with_what_both_sides_say() -> None:
    keys = ["a.png", "b.png", "c.png", "d.png", "e.png"]
    plain, full = a_fidelity().images_csv(keys), a_fidelity(some_probes()).images_csv(keys)
    assert plain.splitlines()[0] == "image,overlap@2 (%),class"
    assert [row["image"] for row in lines(plain)] == ["b.png", "d.png", "a.png", "e.png", "c.png"]
    assert lines(full)[0] == {
        "image": "b.png", "overlap@2 (%)": "0.0", "class": "dog", "teacher says": "dog", "student says": "cat",
        "right": "teacher only",
    }  # fmt: skip
    bare = Fidelity.of(np.array([100 / 3, 0.0]), 1)
    assert lines(bare.images_csv(["x", "y"])) == [
        {"image": "y", "overlap@1 (%)": "0.0"}, {"image": "x", "overlap@1 (%)": repr(100 / 3)},
    ]  # fmt: skip
    assert lines(bare.classes_csv()) == []


def test_classes_are_written_with_their_intervals_in_full() -> None:
    fidelity = a_fidelity(some_probes())
    assert fidelity.classes is not None
    for line, row in zip(lines(fidelity.classes_csv()), fidelity.classes, strict=True):
        numbers = {name: float(value) for name, value in line.items() if name != "class"}
        assert line["class"] == row.name
        assert row.accuracy is not None
        assert numbers == {
            "images": row.images,
            "overlap@2 (%)": row.overlap.mean,
            "overlap@2, low (%)": row.overlap.low,
            "overlap@2, high (%)": row.overlap.high,
            "teacher's accuracy (%)": row.accuracy.teacher,
            "student's accuracy (%)": row.accuracy.student,
            "difference (points)": row.accuracy.difference.mean,
            "difference, low (points)": row.accuracy.difference.low,
            "difference, high (points)": row.accuracy.difference.high,
        }
    assert len(lines(a_fidelity().classes_csv())[0]) == 5


@pytest.mark.parametrize(
    "name", ["=1+2", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1", '=cmd|"/c calc"!A1', "-2+3"]
)
def test_a_name_that_a_spreadsheet_would_run_is_written_as_text(name: str) -> None:
    text = to_csv(["image", "value"], [[name, -1.5]])
    assert list(csv.reader(io.StringIO(text, newline=""))) == [["image", "value"], [f"'{name}", "-1.5"]]


@pytest.mark.parametrize("name", ["a,b", 'say "x"', "two\nlines", "Käfer 猫", "a=b", "x-y", ""])
def test_other_names_are_read_back_as_they_were(name: str) -> None:
    values: list[Any] = [name, 0.1 + 0.2, math.pi, 10**9, None]
    (line,) = list(csv.reader(io.StringIO(to_csv([], [values]), newline="")))[1:]
    assert line == [name, repr(0.1 + 0.2), repr(math.pi), "1000000000", ""]


def test_a_name_of_any_bytes_can_be_written_as_utf_8() -> None:
    assert to_csv(["caf\udce9"], []).encode("utf-8") == b"caf?\r\n"
