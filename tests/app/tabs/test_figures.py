"""The table of figures: where each comes from, the report's own dependence, and times by a clock that is known."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvmr.app.embedders.embedder import Encoder
from mvmr.app.embedders.engines import Engines
from mvmr.app.gallery import Gallery
from mvmr.app.tabs import figures as module
from mvmr.app.tabs.figures import (
    COLUMNS,
    Cell,
    Line,
    Row,
    accuracies,
    figures,
    figures_csv,
    speed,
    student_parameters,
)
from mvmr.app.tabs.probes import Training
from mvmr.app.tabs.records import Records
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import WHITE
from mvmr.distillation import comparison
from mvmr.distillation.comparison import compare
from mvmr.distillation.report import report as report_module
from mvmr.distillation.report import subject
from mvmr.distillation.report.images import draw_rows
from mvmr.distillation.report.report import report
from mvmr.errors import MvmrError
from mvmr.evaluation import protocols
from mvmr.evaluation.evaluate import record
from tests.app.tabs.test_disagreement import pictures, side
from tests.distill.test_report import Corners, a_bundle

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

PICTURE = Image.new("RGB", (9, 7))


@pytest.fixture
def corners(monkeypatch: pytest.MonkeyPatch) -> Corners:
    """The teacher of every bundle; no page of a report, and no processes that load a dozen images."""
    teacher = Corners()
    for patched in (subject, comparison):
        monkeypatch.setattr(patched, "teacher_of", lambda *_, **__: teacher)
    for patched in (report_module, protocols):
        monkeypatch.setattr(patched, "usable_cores", lambda: 0)
    monkeypatch.setattr(report_module, "write_page", lambda *_: None)
    return teacher


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    described = {"name": Corners.name, "weights": Corners.weights, "identity": Corners.identity}
    return a_bundle(tmp_path / "student", {"teachers": {"teacher": described}})


def records_of(bundle: Bundle | None, data: str, *, labelled: bool = True, **teacher: str) -> Records:
    facts = {"teacher": Corners.name, "weights": Corners.weights, "identity": Corners.identity} | teacher
    return Records(bundle=bundle, data=data, labelled=labelled, **facts)


def by_key(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.key: row for row in rows}


class Slow:
    """An encoder that takes so many seconds of a clock of its own for each call."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.now, self.sizes = seconds, 0.0, list[int]()

    def clock(self) -> float:
        return self.now

    def embed(self, images: Sequence[Image.Image]) -> np.ndarray:
        self.now += len(images) * self.seconds[len(self.sizes) % len(self.seconds)]
        self.sizes.append(len(images))
        return np.zeros((len(images), 2), np.float32)


# -- the report's figures


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1000, 10])
def test_dependence_on_the_teacher_is_that_of_the_report_to_the_last_digit(
    bundle: Bundle, corners: Corners, tmp_path: Path, limit: int
) -> None:
    data, folder = str(pictures(tmp_path / "photos", 40)), tmp_path / "kept"
    content = report(bundle.path, data, out=tmp_path / "report", k=3, permutations=2, limit=limit)
    gallery, student, teacher = Gallery.open(data), Engines(bundle).get("torch"), side(corners)
    numbers = draw_rows(len(gallery), limit)
    assert len(numbers) == content["data"]["images"] == min(24, limit)
    rows = {encoder.key: gallery.embeddings(encoder, folder)[numbers] for encoder in (teacher, student)}
    table = by_key(
        figures(
            [Line(key=key, label=key, encoder=None, rows=rows[key]) for key in ("teacher", "torch")],
            records_of(bundle, data),
        )
    )
    (wanted,) = [
        cell
        for cell in content["dependence"]["cells"]
        if (cell["row"], cell["column"]) == ("student.layer4", "teacher")
    ]
    cells = table["torch"].cells
    assert (cells["dcor"].value, cells["cka"].value) == (wanted["dcor"], wanted["cka"])
    assert cells["dcor"].text == f"{wanted['dcor']:.3f}"
    assert f"on {len(numbers)} images" in cells["cka"].source
    assert 0 < wanted["dcor"] < 1
    for name in ("dcor", "cka"):
        assert table["teacher"].cells[name] == Cell.missing("this is the teacher")


def test_the_images_drawn_are_those_of_the_report(tmp_path: Path) -> None:
    images = Gallery.open(str(pictures(tmp_path / "photos", 40))).images
    keys = [images.keys[i] for i in draw_rows(len(images), 7)]
    assert keys == list(subject.draw(images, 7).keys)
    assert draw_rows(5, 1000).tolist() == [0, 1, 2, 3, 4]
    assert len(np.unique(draw_rows(30_000, 1000))) == 1000


def test_three_images_are_too_few_for_dependence(tmp_path: Path) -> None:
    rows = np.eye(3, dtype=np.float32)
    lines = [Line(key=key, label=key, encoder=None, rows=rows) for key in ("teacher", "torch")]
    cells = by_key(figures(lines, records_of(None, "photos")))["torch"].cells
    assert cells["dcor"] == cells["cka"] == Cell.missing("the unbiased estimator takes 4 images or more")


# -- accuracies


def test_what_evaluate_has_measured_is_read_from_the_bundle_and_else_measured_the_same_here(
    bundle: Bundle, corners: Corners, tmp_path: Path
) -> None:
    data, folder = str(pictures(tmp_path / "photos", 40)), tmp_path / "kept"
    gallery, teacher, student = Gallery.open(data), side(corners), Engines(bundle).get("torch")
    training = Training.open(data, gallery.classes, background=WHITE)
    assert gallery.labels is not None
    accuracy = {}
    for encoder in (teacher, student):
        head, train = training.probe(encoder, folder), training.rows(encoder, folder)
        rows = gallery.embeddings(encoder, folder)
        accuracy[encoder.key] = accuracies(head, train, training.labels, rows, gallery.labels, len(training.classes))
    lines = [Line(key=key, label=key, encoder=None, accuracies=accuracy[key]) for key in ("teacher", "torch")]
    lines.append(Line(key="onnx-int8", label="ONNX int8", encoder=None, accuracies=accuracy["torch"]))
    records = records_of(bundle, data)  # opened before anything was measured, as by a running app

    before = by_key(figures(lines, records))
    assert all("measured here" in before[key].cells["knn"].source for key in before)
    comparison = compare(bundle.path, data, protocols=["linear", "knn"])
    after = by_key(figures(lines, records))
    for ours, theirs in (("torch", "student"), ("teacher", "teacher")):
        linear, knn = comparison[theirs]["linear"]["top1"], comparison[theirs]["knn"]["top1_weighted_k5"]
        for rows_of in (before, after):
            assert (rows_of[ours].cells["linear"].value, rows_of[ours].cells["knn"].value) == (linear, knn)
        table = " --table" if theirs == "teacher" else ""
        command = f"mvmr evaluate {bundle.path} --data {data} --protocol linear{table}"
        assert after[ours].cells["linear"].source == command == records.command("linear", table=bool(table))
        assert after[ours].cells["linear"].text == f"{linear:.1f} %"
    assert after["onnx-int8"] == before["onnx-int8"]  # `mvmr evaluate` says nothing of exports
    assert 34 < after["torch"].cells["linear"].value < 100  # type: ignore[operator]


def note(bundle: Bundle, protocol: str, value: float, *, command: str = "mvmr evaluate", data: str = "photos") -> None:
    name = "top1_weighted_k5" if protocol.startswith("knn") else "top1"
    bundles.add_metrics(bundle, record(command, data, protocol, {name: value}))


def test_the_newest_record_of_the_same_data_counts(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    records = records_of(bundle, "photos")
    assert records.find("linear", teacher=False) is None
    note(bundle, "linear", 50)
    note(bundle, "linear", 60, command="mvmr probe")
    note(bundle, "linear", 70, data="paintings")
    note(bundle, "linear-paper", 80)
    note(bundle, "linear", 10, data="\0")
    note(bundle, "linear, teacher corners", 90)
    bundles.add_metrics(bundle, record("mvmr evaluate --k 9", "photos", "knn", {"top1_weighted_k9": 1.0}))
    assert records.find("linear", teacher=False) == (60, "mvmr probe")
    assert records.find("knn", teacher=False) is None
    assert replace(records, data=str(tmp_path / "photos")).find("linear", teacher=False) == (60, "mvmr probe")
    assert replace(records, data="sample:digits").find("linear", teacher=False) is None
    assert replace(records, bundle=None).find("linear", teacher=False) is None


@pytest.mark.parametrize(
    ("flags", "teacher", "ours"),
    [
        ("", {}, True),
        ("", {"identity": "d" * 64}, False),
        (" --teacher ViT-B-16", {"teacher": "ViT-B-16", "weights": "datacomp_xl_s13b_b90k", "identity": "d"}, True),
        (" --teacher ViT-B-16", {"teacher": "ViT-B-16", "weights": "openai", "identity": "d"}, False),
        (
            " --teacher ViT-B-16 --pretrained openai",
            {"teacher": "ViT-B-16", "weights": "openai", "identity": "d"},
            True,
        ),
        (" --teacher ViT-B-16 --pretrained openai", {"teacher": "ViT-B-16", "weights": "laion400m_e32"}, False),
        (" --teacher my/clip", {"teacher": "clip", "weights": "my/clip/open_clip_model.safetensors"}, True),
        (" --teacher my/clip", {"teacher": "clip", "weights": "other/clip/open_clip_model.safetensors"}, False),
    ],
)
def test_a_teacher_of_the_same_name_with_other_weights_is_another(
    bundle: Bundle, flags: str, teacher: dict[str, str], ours: bool
) -> None:
    records = records_of(bundle, "photos", **teacher)
    command = f"mvmr evaluate b --data photos --protocol linear --table{flags}"
    note(bundle, f"linear, teacher {records.teacher}", 75, command=command)
    assert records.find("linear", teacher=True) == ((75, command) if ours else None)


@pytest.mark.parametrize("called", ["first", Corners.name])  # beside all of them, and alone
def test_one_of_several_teachers_is_told_by_its_name_in_the_bundle(tmp_path: Path, called: str) -> None:
    first = {"name": Corners.name, "weights": Corners.weights, "identity": Corners.identity}
    teachers = {"first": first, "second": first | {"identity": "d" * 64}}
    bundle = a_bundle(tmp_path / "student", {"teachers": teachers})
    command = "mvmr evaluate b --data photos --protocol linear --table --teacher"
    note(bundle, f"linear, teacher {called}", 75, command=f"{command} first")
    note(bundle, "linear, teacher second", 60, command=f"{command} second")
    assert records_of(bundle, "photos").find("linear", teacher=True) == (75, f"{command} first")
    assert records_of(bundle, "photos", identity="d" * 64).find("linear", teacher=True) == (60, f"{command} second")


def with_report(bundle: Bundle, report_: object) -> Records:
    text = report_ if isinstance(report_, str) else json.dumps(report_)
    return records_of(bundles.add_files(bundle, {"onnx/encoder.int8.json": text.encode()}), "photos")


def test_the_accuracy_of_an_export_is_read_from_the_report_beside_it(bundle: Bundle) -> None:
    content: dict[str, Any] = {
        "data": "photos", "split": "test", "images": 256,
        "heads": {"other": {"accuracy": None}, "photos": {"accuracy": 79.25}},
    }  # fmt: skip
    line = Line(key="onnx-int8", label="ONNX int8", encoder=None)
    (row,) = figures([line], with_report(bundle, content))
    source = "mvmr export, onnx/encoder.int8.json: head photos on 256 images of photos (test)"
    assert row.cells["linear"] == Cell(79.25, "79.2 %", source)
    for variant in (
        content | {"data": "paintings"},
        content | {"heads": {}},
        {},
        [],
        "[",
        content | {"heads": {"a": 1}},
    ):
        (row,) = figures([line], with_report(bundle, variant))
        assert row.cells["linear"].value is None


# -- speed and size


def test_times_are_those_of_the_clock() -> None:
    # a first call to warm up, then 1, 3, 1, 3 ... seconds a call
    encoder = Slow(3.0, 1.0)
    times = speed(encoder, [PICTURE] * 3, seconds=400, clock=encoder.clock)
    assert encoder.sizes[:101] == [1] * 101
    assert (times.calls, times.p50, times.p99) == (100, 2000, 3000)
    # batches of 32, of 32, 96, 32 and 96 seconds: the first is left out, and the time is over after the fourth
    assert encoder.sizes[101:] == [32] * 4
    assert times.batches == 3
    assert times.throughput == pytest.approx(3 * 32 / (96 + 32 + 96))


def test_a_slow_encoder_is_measured_over_few_calls_and_a_fast_one_not_for_ever() -> None:
    slow, fast = Slow(60.0), Slow(1e-9)
    assert replace(speed(slow, [PICTURE], seconds=4, clock=slow.clock), p50=0, p99=0) == module.Speed(
        0,
        0,
        pytest.approx(1 / 60),
        5,
        1,  # type: ignore[arg-type]
    )
    times = speed(fast, [PICTURE], seconds=4, clock=fast.clock)
    assert (times.calls, times.batches) == (1000, 99)


def test_the_images_are_resized_and_normalised_within_the_time() -> None:
    counts: list[int] = []

    def prepare(image: Image.Image) -> int:
        counts.append(image.width)
        return image.width

    encoder = Encoder(
        key="torch", label="torch", identity="0", dim=1, nbytes=None, prepare=prepare,
        forward=lambda prepared: np.zeros((len(prepared), 1), np.float32),
    )  # fmt: skip
    images = [Image.new("RGB", (width, 5)) for width in (11, 22, 33)]
    times = speed(encoder, images, seconds=0.01)
    assert len(counts) == 1 + times.calls + 32 * (times.batches + 1)
    assert counts[:8] == [11, 11, 22, 33, 11, 22, 33, 11][: 1 + times.calls]
    assert counts[-32:] == ([11, 22, 33] * 11)[:32]


def test_parameters_are_those_of_the_student(bundle: Bundle) -> None:
    counted = sum(parameter.numel() for parameter in bundle.student().encoder.parameters())
    assert student_parameters(bundle) == counted == 702_096


def test_every_figure_that_is_measured_has_its_unit_and_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "speed", lambda *_, **__: module.Speed(3.14159, 27.18, 1234.5, 77, 5))
    line = Line(key="onnx-fp32", label="ONNX fp32", encoder=Slow(1), parameters=11_176_512, nbytes=44_712_345)
    done: list[tuple[int, int]] = []
    (row,) = figures([line], records_of(None, "photos"), [PICTURE], advance=lambda *at: done.append(at))
    texts = {name: cell.text for name, cell in row.cells.items() if cell.value is not None}
    assert texts == {
        "parameters": "11.2 M", "bytes": "44.7 MB", "p50": "3.14 ms", "p99": "27.2 ms", "throughput": "1,234 images/s",
    }  # fmt: skip
    assert row.cells["bytes"].value == 44_712_345
    assert "measured here, on this machine: 77 images one by one, decoded, with resizing" in row.cells["p99"].source
    assert done == [(1, 1)]


def test_a_figure_that_cannot_be_had_says_why() -> None:
    class Gone:
        def embed(self, images: Sequence[Image.Image]) -> np.ndarray:
            raise MvmrError("the service is out of reach")

    lines = [
        Line(key="teacher", label="teacher", encoder=None, why="its weights are not there"),
        Line(key="service", label="service", encoder=Gone(), rows=np.eye(5, dtype=np.float32)),
        Line(key="onnx-int8", label="ONNX int8", encoder=None, why="not exported: mvmr export --int8"),
        Line(key="torch", label="torch", encoder=None),
    ]
    table = by_key(figures(lines, records_of(None, "photos"), [PICTURE]))
    why = {key: {name: cell.why for name, cell in row.cells.items()} for key, row in table.items()}
    assert all(cell.value is None and cell.text == "-" for row in table.values() for cell in row.cells.values())
    assert why["service"]["p50"] == why["service"]["throughput"] == "the service is out of reach"
    assert why["service"]["parameters"] == why["service"]["bytes"] == "a service does not say"
    assert why["service"]["dcor"] == "its weights are not there"
    assert set(why["onnx-int8"].values()) == {"not exported: mvmr export --int8"}
    assert why["torch"]["p50"] == "not measured yet"
    assert why["torch"]["knn"] == "`mvmr evaluate BUNDLE --data photos --protocol knn` measures it"
    assert all(all(reasons.values()) for reasons in why.values())

    (alone,) = figures([Line(key="torch", label="torch", encoder=None)], records_of(None, "photos", labelled=False))
    assert alone.cells["cka"].why == "there is no teacher to compare with"
    assert alone.cells["linear"].why == "photos has no labels to measure with, or several to an image"


# -- as JSON and CSV


def a_row() -> Row:
    cells = {column.key: Cell.missing("not measured yet") for column in COLUMNS}
    return Row("torch", "=torch", cells | {"p50": Cell(1 / 3, "0.33 ms", "measured here")})


def test_a_row_is_plain_json() -> None:
    plain = json.loads(json.dumps(a_row().plain()))
    assert list(plain["cells"]) == [column.key for column in COLUMNS]
    assert plain["cells"]["p50"] == {"value": 1 / 3, "text": "0.33 ms", "source": "measured here", "why": ""}
    assert plain["cells"]["cka"] == {"value": None, "text": "-", "source": "", "why": "not measured yet"}
    assert (plain["key"], plain["label"]) == ("torch", "=torch")


def test_the_csv_has_figures_in_full_beside_their_sources() -> None:
    (line,) = csv.DictReader(io.StringIO(figures_csv([a_row()]), newline=""))
    assert len(line) == 1 + 2 * len(COLUMNS)
    assert line["engine"] == "'=torch"
    assert float(line["latency p50, batch 1 (ms)"]) == 1 / 3
    assert line["latency p50, batch 1: source"] == "measured here"
    assert (line["parameters"], line["parameters: source"]) == ("", "not measured yet")
