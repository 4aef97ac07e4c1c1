"""The report end to end: what is in it, what is refused before work begins, and the same bytes twice."""

import hashlib
import json
import math
import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mvmr.bundles.bundle import Bundle
from mvmr.data import ImageSet, open_images
from mvmr.distillation.report import report as module
from mvmr.distillation.report import subject
from mvmr.distillation.report.report import report
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.errors import MvmrError
from mvmr.evaluation import protocols
from mvmr.evaluation.classifiers import linear_probe
from mvmr.models.student import Student
from tests.making import SMALL, write_bundle

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 210)}
STAGES = ["student.stem", "student.layer1", "student.layer2", "student.layer3", "student.layer4"]
HAND_CRAFTED = ["pixels", "scattering", "hog", "local_std"]
BRIEF = {"k": 3, "permutations": 20}


class Corners:
    """A teacher of the mean colours of a picture's quarters."""

    name, weights, identity, dim = "corners", "none", "c" * 64, 12

    def prepare(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(image.convert("RGB").resize((2, 2)), dtype=np.float32)).permute(2, 0, 1)

    def __call__(self, batch: Tensor) -> Tensor:
        return batch.flatten(1)


class Itself:
    """A student as its own teacher."""

    weights = "its own"

    def __init__(self, student: Student) -> None:
        self.name, self.identity, self.dim = student.name, student.identity, student.dim
        self.prepare, self.embed = student.prepare, student.__call__

    def __call__(self, batch: Tensor) -> Tensor:
        return self.embed(batch)


def a_bundle(out: Path, training: dict[str, Any] | None = None) -> Bundle:
    return write_bundle(out, training=training, seed=1)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    student = a_bundle(tmp_path / "student", {"method": "distillation", "recipe": {"name": "brief"}, "steps": 7})
    lines = [{"step": step, "loss": 1 / step, "rank_h": math.nan if step == 2 else 3.0} for step in range(1, 701)]
    (student.path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return student


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Noisy pictures of three colours, with a folder to each."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.array(colour) + random.integers(-60, 60, (3, 4, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((24, 18), Image.Resampling.BICUBIC)
            image.save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def flat(tmp_path: Path, photos: Path) -> Path:
    """The same without labels."""
    (tmp_path / "flat").mkdir()
    for number, file in enumerate(sorted(photos.glob("*/*.png"))[::4]):
        file.rename(tmp_path / "flat" / f"{number}.png")
    return tmp_path / "flat"


@pytest.fixture
def corners(monkeypatch: pytest.MonkeyPatch) -> Corners:
    """The teacher of every bundle."""
    teacher = Corners()
    monkeypatch.setattr(subject, "teacher_of", lambda *_, **__: teacher)
    return teacher


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that load a dozen images cost more than they bring."""
    for patched in (module, protocols):
        monkeypatch.setattr(patched, "usable_cores", lambda: 0)


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the figures alone."""
    monkeypatch.setattr(module, "write_page", lambda *_: None)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def reasons(content: dict[str, Any]) -> dict[str, str]:
    return {gap["what"]: gap["why"] for gap in content["not_measured"]}


# -- what is in it


def test_a_report_holds_every_figure_and_leaves_the_bundle_alone(
    bundle: Bundle, photos: Path, corners: Corners, tmp_path: Path
) -> None:
    before = digests(bundle.path)
    content = report(bundle.path, str(photos), out=tmp_path / "out", **BRIEF)  # type: ignore[arg-type]
    assert digests(bundle.path) == before
    assert sorted(os.listdir(tmp_path / "out")) == ["index.html", "report.json"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == content
    assert "<html" in (tmp_path / "out" / "index.html").read_text()

    options = "--k 3 --permutations 20"
    assert content["command"] == f"mvmr report {bundle.path} --data {photos} --out {tmp_path / 'out'} {options}"
    assert content["bundle"] == {
        "path": str(bundle.path), "space_id": bundle.space_id, "backbone": SMALL.name, "embedding_dim": SMALL.width,
        "method": "distillation", "recipe": "brief", "trained_on": "not recorded", "steps": 7,
    }  # fmt: skip
    assert content["teacher"] == {"name": "corners", "weights": "none", "identity": "c" * 64, "dim": 12}
    test = open_images(photos, "test")
    assert content["data"] == {
        "name": str(photos), "split": "test", "images": 12, "available": 12, "classes": ["blue", "green", "red"],
        "seed": 0,
    }  # fmt: skip

    table = content["dependence"]
    assert table["rows"] == [*STAGES, "untrained", "teacher"]
    assert table["columns"] == ["teacher", *HAND_CRAFTED]
    assert [(entry["row"], entry["column"]) for entry in table["cells"]] == [
        (row, column) for row in table["rows"] for column in table["columns"]
    ]
    cells = {(entry["row"], entry["column"]): entry for entry in table["cells"]}
    assert cells["teacher", "teacher"]["dcor"] == pytest.approx(1)
    assert cells["teacher", "pixels"]["dcor"] > 0.8  # of these pictures both know the colour
    assert (content["neighbours"]["k"], content["neighbours"]["chance"]) == (3, 3 / 11)
    assert {entry["name"] for entry in content["neighbours"]["classes"]} == set(COLOURS)
    assert {name: (entry["dim"], len(entry["values"])) for name, entry in content["spectrum"].items()} == {
        "student": (SMALL.width, 12), "teacher": (12, 12), "untrained": (SMALL.width, 12),
    }  # fmt: skip

    student, train = bundle.student(), open_images(photos, "train")
    h, queries = (student.embed([part.load(i) for i in range(len(part))]).numpy() for part in (train, test))
    predicted = linear_probe(h, train.labels, 3).predict(queries)  # type: ignore[arg-type]
    assert content["probe"]["student"]["top1"] == pytest.approx(100 * (predicted == test.labels).mean())
    assert np.sum(content["probe"]["confusion"]["student"]) == 12
    assert content["probe"]["teacher"]["top1"] == 100
    assert len(content["training"]) == 300
    assert [content["training"][i]["step"] for i in (0, -1)] == [1, 700]
    assert {"zero-shot classification and text search", "speed and memory"} <= reasons(content).keys()
    assert not any("teacher" in what or "probe" in what for what in reasons(content))


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(
    bundle: Bundle, photos: Path, corners: Corners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(bundle.path, str(photos), out=tmp_path / "out", **BRIEF)  # type: ignore[arg-type]
    first = digests(tmp_path / "out")
    torch.manual_seed(5)
    monkeypatch.setenv("MVMR_CACHE", str(tmp_path / "another cache"))
    report(bundle.path, str(photos), out=tmp_path / "out", **BRIEF)  # type: ignore[arg-type]
    assert digests(tmp_path / "out") == first


@pytest.mark.usefixtures("no_page")
def test_a_student_that_is_its_own_teacher_is_wholly_faithful(
    bundle: Bundle, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "teacher_of", lambda bundle, *_, **__: Itself(bundle.student()))
    content = report(bundle.path, str(photos), out=tmp_path / "out", **BRIEF)  # type: ignore[arg-type]
    own = next(
        cell
        for cell in content["dependence"]["cells"]
        if (cell["row"], cell["column"]) == ("student.layer4", "teacher")
    )
    assert own["dcor"] == pytest.approx(1)
    assert own["cka"] == pytest.approx(1)
    assert content["neighbours"]["overlap"] == {"mean": 100, "low": 100, "high": 100}
    assert content["probe"]["agreement"] == 100
    assert content["probe"]["student"] == content["probe"]["teacher"]
    assert content["spectrum"]["student"] == content["spectrum"]["teacher"]


def test_of_many_images_some_are_drawn_and_the_probe_takes_all(
    bundle: Bundle, photos: Path, corners: Corners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {}
    monkeypatch.setattr(module, "write_page", lambda content, thumbnail, path: arguments.update(thumbnail=thumbnail))
    content = report(bundle.path, str(photos), out=tmp_path / "out", limit=7, **BRIEF)  # type: ignore[arg-type]
    assert (content["data"]["images"], content["data"]["available"]) == (7, 12)
    assert sum(entry["images"] for entry in content["neighbours"]["classes"]) == 7
    assert np.sum(content["probe"]["confusion"]["teacher"]) == 12
    everyone = [np.asarray(image) for image in map(open_images(photos, "test").load, range(12))]
    keys = [
        next(i for i, image in enumerate(everyone) if np.array_equal(image, np.asarray(arguments["thumbnail"](number))))
        for number in range(7)
    ]
    assert keys == sorted(set(keys))
    labels = open_images(photos, "test").labels
    assert labels is not None
    for entry in content["neighbours"]["worst"]:
        assert content["data"]["classes"][labels[keys[entry["image"]]]] == entry["class"]
        assert all(0 <= number < 7 for number in entry["teacher"] + entry["student"])


# -- what is not there


@pytest.mark.slow
def test_images_without_labels_are_all_taken_and_the_probe_is_said_to_be_missing(
    bundle: Bundle, flat: Path, corners: Corners, tmp_path: Path
) -> None:
    content = report(bundle.path, str(flat), out=tmp_path / "out", **BRIEF)  # type: ignore[arg-type]
    assert (content["data"]["split"], content["data"]["images"], content["data"]["classes"]) == ("unlabelled", 15, None)
    assert content["probe"] is None
    assert content["neighbours"]["classes"] is None
    assert len(content["neighbours"]["worst"]) == 12
    assert "has no labels to measure with" in reasons(content)["the probe, and figures by label"]


def test_a_bundle_without_a_teacher_is_measured_alone(bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    (bundle.path / "metrics.jsonl").unlink()
    content = report(bundle.path, str(photos), out=tmp_path / "out", **BRIEF)  # type: ignore[arg-type]
    assert (content["teacher"], content["neighbours"], content["training"]) == (None, None, None)
    assert content["dependence"]["rows"] == [*STAGES, "untrained"]
    assert content["dependence"]["columns"] == HAND_CRAFTED
    assert set(content["spectrum"]) == {"student", "untrained"}
    probe = content["probe"]
    assert (probe["teacher"], probe["agreement"], probe["confusion"]["teacher"]) == (None, None, None)
    assert "names no teacher to compare with; give one: --teacher" in reasons(content)["all that takes a teacher"]
    assert reasons(content)["training curves"].startswith("the bundle holds no metrics.jsonl")


@pytest.mark.usefixtures("no_page")
def test_the_teacher_that_the_bundle_records_is_found(photos: Path, tmp_path: Path) -> None:
    tower = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    config = {"embed_dim": 6, "vision_cfg": tower, "text_cfg": text}
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(CLIP(**deepcopy(config)).state_dict(), tmp_path / "clip" / "open_clip_model.safetensors")
    clip = ClipTeacher.load(tmp_path / "clip")
    record = {"name": clip.name, "weights": clip.weights, "identity": clip.identity}
    student = a_bundle(tmp_path / "student", {"teachers": {"teacher": record}})
    content = report(student.path, str(photos), out=tmp_path / "out", **BRIEF)  # type: ignore[arg-type]
    assert content["teacher"] == record | {"dim": 6}
    assert content["spectrum"]["teacher"]["dim"] == 6


@pytest.mark.usefixtures("no_page")
def test_a_recorded_teacher_that_is_gone_is_said_and_one_that_was_named_is_an_error(
    photos: Path, tmp_path: Path
) -> None:
    gone = {"name": "clip", "weights": str(tmp_path / "gone" / "open_clip_model.safetensors"), "identity": "0" * 64}
    student = a_bundle(tmp_path / "student", {"teachers": {"teacher": gone}})
    (student.path / "metrics.jsonl").write_text("not a record\n")
    content = report(student.path, str(photos), out=tmp_path / "out", **BRIEF)  # type: ignore[arg-type]
    with pytest.raises(MvmrError):
        report(student.path, str(photos), teacher="clip", pretrained=gone["weights"], out=tmp_path / "out", k=3)
    assert content["neighbours"] is None
    reason = reasons(content)["all that takes a teacher"]
    assert gone["weights"] in reason
    assert "say where: --teacher" in reason
    assert "holds no records of a training" in reasons(content)["training curves"]


@pytest.mark.usefixtures("no_page")
def test_several_labels_to_an_image_are_left_to_evaluate(
    bundle: Bundle, photos: Path, corners: Corners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def several(data: str, split: Any, **_: Any) -> ImageSet:
        images = open_images(data, split)
        return replace(images, read_labels=lambda: np.ones((60, 3), np.int64))

    monkeypatch.setattr(subject, "open_images", several)
    content = report(bundle.path, str(photos), out=tmp_path / "out", **BRIEF)  # type: ignore[arg-type]
    assert (content["data"]["split"], content["data"]["classes"], content["probe"]) == ("test", None, None)
    assert content["neighbours"]["classes"] is None
    assert "several labels" in reasons(content)["the probe, and figures by label"]


@pytest.mark.usefixtures("no_page")
def test_where_the_probe_cannot_be_fitted_the_classes_stay(
    bundle: Bundle, photos: Path, corners: Corners, tmp_path: Path
) -> None:
    for part, names in {"train": ["red", "green"], "test": ["red", "blue"]}.items():
        for name in names:
            (tmp_path / "split" / part / name).mkdir(parents=True)
            for file in sorted((photos / name).iterdir())[:5]:
                Image.open(file).save(tmp_path / "split" / part / name / file.name)
    content = report(bundle.path, str(tmp_path / "split"), out=tmp_path / "out", **BRIEF)  # type: ignore[arg-type]
    assert {row["name"] for row in content["neighbours"]["classes"]} == {"red", "blue"}
    assert content["probe"] is None
    assert "class 'blue' is in the test split and has no image in the training" in reasons(content)["the probe"]


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 12}, r"12 images of .* and k = 12 nearest neighbours: .* 13 images or more"),
        ({"k": 0}, r"k = 0 nearest neighbours: a report takes k of 1 or more"),
        ({"k": 2, "limit": 3}, r"3 of the 12 images of .* 4 images or more"),
        ({"permutations": 0}, "permutations = 0: give 1 or more"),
        ({"teacher": "ViT-B-61"}, "unknown teacher 'ViT-B-61'; did you mean 'ViT-B-16'?"),
        ({"data": "sample:patch"}, "did you mean 'sample:patches'?"),
        ({"bundle": "nowhere"}, "no bundle at nowhere"),
        ({"device": "abacus"}, "cannot use device 'abacus'"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(
    bundle: Bundle, photos: Path, tmp_path: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("work has begun")

    for name in ("represent", "stages_of", "build_untrained", "Measured"):
        monkeypatch.setattr(module, name, never)
    arguments = {"bundle": bundle.path, "data": str(photos), "out": tmp_path / "out", "k": 3} | options
    with pytest.raises(MvmrError, match=message) as excinfo:
        report(**arguments)
    assert "\n" not in str(excinfo.value)
    assert not (tmp_path / "out").exists()


def test_other_files_are_never_touched(bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    before = digests(bundle.path)
    with pytest.raises(MvmrError, match=r"student holds 'README.md', which is no part of a report; give a folder of"):
        report(bundle.path, str(photos), out=bundle.path)
    assert digests(bundle.path) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MvmrError, match=r"cannot write a report to .*file: Not a directory; give another folder"):
        report(bundle.path, str(photos), out=tmp_path / "file")
