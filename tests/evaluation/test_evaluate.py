"""Frozen features are measured on labelled data, every test image counted, and the figures kept in the bundle."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, top_k_accuracy_score

import mvmr
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.data import ImageSet, open_images
from mvmr.errors import MvmrError
from mvmr.evaluation.classifiers import linear_probe
from mvmr.evaluation.evaluate import evaluate, newest_or, probe
from mvmr.evaluation.neighbours import knn_predict
from mvmr.evaluation.protocols import Labelled, Measured, protocols_for
from mvmr.models.student import Student
from tests.making import SMALL, write_bundle

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 210)}


def a_bundle(out: Path) -> Bundle:
    """An untrained encoder: on colours that is enough."""
    return write_bundle(out)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return a_bundle(tmp_path / "runs" / "mine")


def write_photos(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """A folder with a folder to a class, its images noisy and of one colour."""
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.array(COLOURS[name]) + random.integers(-35, 35, (18, 21, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", dict.fromkeys(COLOURS, 10))


def test_evaluate_measures_and_keeps_the_figures(bundle: Bundle, photos: Path) -> None:
    figures = evaluate(bundle.path, str(photos))
    right = dict.fromkeys(("top1", "balanced_accuracy", "macro_f1"), 100.0)
    assert figures["linear"] == right | {"C": figures["linear"]["C"]}  # of three classes there is no top 5
    assert set(figures["knn"]) == {f"top1_{vote}_k{k}" for k in (1, 5, 20) for vote in ("weighted", "plain")}
    assert figures["knn"]["top1_weighted_k5"] == 100.0
    now = bundles.load(bundle.path)
    assert [record["protocol"] for record in now.manifest.metrics] == ["linear", "knn"]
    for record in now.manifest.metrics:
        assert record["values"] == figures[record["protocol"]]
        assert record["data"] == str(photos)
        assert record["command"] == f"mvmr evaluate {bundle.path} --data {photos} --protocol {record['protocol']}"
    assert now.space_id == bundle.space_id
    assert mvmr.evaluate(bundle.path, str(photos), protocols=["knn"]) == {"knn": figures["knn"]}
    assert len(bundles.load(bundle.path).manifest.metrics) == 2  # the same measurement again replaces the first


def test_evaluate_takes_the_students_features_of_every_test_image(bundle: Bundle) -> None:
    data = "sample:digits"
    figures = evaluate(bundle.path, data)
    train, test = open_images(data, "train"), open_images(data, "test")
    student = bundle.student()
    x, y = (
        student.embed(np.stack([np.asarray(images.load(i)) for i in range(len(images))])).numpy()
        for images in (train, test)
    )
    labels, answers = train.labels, test.labels
    assert labels is not None
    assert answers is not None
    assert len(answers) == 597
    for k in (1, 5, 20, 200):
        for name, temperature in (("weighted", 0.07), ("plain", None)):
            predictions = knn_predict(x, labels, y, 10, k=k, temperature=temperature)
            assert figures["knn"][f"top1_{name}_k{k}"] == 100 * (predictions == answers).mean()
    head = linear_probe(x, labels, 10)
    assert figures["linear"]["top1"] == pytest.approx(100 * (head.predict(y) == answers).mean(), abs=0.2)
    top5 = top_k_accuracy_score(answers, head.logits(y), k=5)
    assert figures["linear"]["top5"] == pytest.approx(100 * top5, abs=0.2)


def test_what_is_taken_for_what_is_written_and_said(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file = "sample:digits", tmp_path / "confusion.csv"
    figures = evaluate(bundle.path, data, protocols=["linear"], confusion=file, progress=True)["linear"]
    counts = np.loadtxt(file, delimiter=",", skiprows=1, usecols=range(1, 11))
    assert figures["top1"] == pytest.approx(100 * counts.trace() / counts.sum(), abs=0.2)
    assert list(counts.sum(1)) == list(np.bincount(open_images(data, "test").labels))
    assert "taken for another most often: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [({"protocols": ["knn"], "confusion": "a.csv"}, "ask for that one"), ({"confusion": "/"}, "/ is a folder")],
)
def test_a_file_for_what_is_not_counted_is_refused(
    bundle: Bundle, photos: Path, no_features: None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MvmrError, match=message):
        evaluate(bundle.path, str(photos), **options)


def test_probe_stores_a_head_that_predicts_as_it_was_measured(bundle: Bundle, photos: Path) -> None:
    now, values = probe(bundle.path, str(photos), head="colours")
    assert now.heads == ("colours",)
    assert values["top1"] == 100.0
    head = now.head("colours")
    assert head.classes == ("blue", "green", "red")
    assert head.metrics["values"]["top1"] == 100.0
    assert head.metrics["command"] == f"mvmr probe {bundle.path} --data {photos} --head colours"
    test = open_images(photos, "test")
    h = now.student().embed([test.load(i) for i in range(len(test))]).numpy()
    assert test.labels is not None
    assert np.array_equal((h @ head.weight.T + head.bias).argmax(1), test.labels)
    again, _ = probe(bundle.path, str(photos), head="colours")
    assert again.heads == ("colours",)
    assert len(again.manifest.metrics) == 1


def test_a_head_without_a_name_is_called_after_the_data(bundle: Bundle, photos: Path) -> None:
    name = probe(bundle.path, str(photos))[0].heads[0]
    assert name.endswith("photos")
    assert "/" not in name


def test_two_classes(bundle: Bundle, tmp_path: Path) -> None:
    data = str(write_photos(tmp_path / "two", {"red": 6, "blue": 6}))
    assert evaluate(bundle.path, data, protocols=["linear"])["linear"]["top1"] == 100.0
    head = probe(bundle.path, data, head="two")[0].head("two")
    assert head.weight.shape == (2, SMALL.width)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [{"red": 1, "green": 1, "blue": 2}, {"red": 2, "green": 30, "blue": 3}])
def test_classes_of_few_images(bundle: Bundle, tmp_path: Path, counts: dict[str, int]) -> None:
    results = evaluate(bundle.path, str(write_photos(tmp_path / "few", counts)))
    assert all(0 <= values[name] <= 100 for values in results.values() for name in values)
    assert "top1_plain_k200" not in results["knn"]


@pytest.fixture
def no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be measured is refused before anything is computed."""
    monkeypatch.setattr("mvmr.models.student.Student.__call__", pytest.fail)


@pytest.mark.parametrize("action", [evaluate, probe])
def test_a_class_missing_from_the_training_split_is_named(
    bundle: Bundle, tmp_path: Path, action: Callable[..., object], no_features: None
) -> None:
    write_photos(tmp_path / "split" / "train", {"red": 6, "blue": 6})
    write_photos(tmp_path / "split" / "test", {"red": 4, "green": 4, "blue": 4}, seed=1)
    with pytest.raises(MvmrError, match="class 'green' is in the test split and has no image in the training split"):
        action(bundle.path, str(tmp_path / "split"))


def test_a_class_missing_from_the_test_split_is_no_obstacle(bundle: Bundle, tmp_path: Path) -> None:
    write_photos(tmp_path / "split" / "train", {"red": 6, "green": 6, "blue": 6})
    write_photos(tmp_path / "split" / "test", {"red": 4, "blue": 4}, seed=1)
    assert evaluate(bundle.path, str(tmp_path / "split"), protocols=["linear"])["linear"]["top1"] == 100.0


def test_a_training_split_of_one_class_is_one_line(bundle: Bundle, tmp_path: Path, no_features: None) -> None:
    write_photos(tmp_path / "split" / "train", {"red": 6})
    write_photos(tmp_path / "split" / "test", {"red": 4, "blue": 4}, seed=1)
    with pytest.raises(MvmrError, match="all training images are of one class"):
        evaluate(bundle.path, str(tmp_path / "split"))


def test_measuring_twice_gives_the_same_and_changes_no_tensor(bundle: Bundle, photos: Path) -> None:
    def state(student: Student) -> dict[str, bytes]:
        return {name: value.numpy().tobytes() for name, value in student.encoder.state_dict().items()}

    student = bundle.student()
    before = state(student)
    data = Labelled.of(open_images(str(photos), "train"), open_images(str(photos), "test"))
    student.encoder.train()  # as somebody may have left it
    first = Measured(student, data)
    assert first.linear() == Measured(student, data).linear()
    assert state(student) == before
    assert evaluate(bundle.path, str(photos)) == evaluate(bundle.path, str(photos))
    assert (
        bundles.load(bundle.path).manifest.files["encoder.safetensors"] == bundle.manifest.files["encoder.safetensors"]
    )


@pytest.mark.parametrize("action", [evaluate, probe])
def test_images_without_labels_are_one_line(bundle: Bundle, tmp_path: Path, action: Callable[..., object]) -> None:
    write_photos(tmp_path / "flat", {"red": 12})
    for file in (tmp_path / "flat" / "red").iterdir():
        file.rename(tmp_path / "flat" / file.name)
    (tmp_path / "flat" / "red").rmdir()
    with pytest.raises(MvmrError, match=r"flat has no labels to measure with: put the images of each class into"):
        action(bundle.path, str(tmp_path / "flat"))
    assert bundles.load(bundle.path).manifest == bundle.manifest


def a_voc_tree(root: Path, *, train: int = 60, test: int = 40) -> str:
    """Images of one to three coloured quarters, annotated as VOC2007 is, each colour a class; some difficult."""
    home = root / "VOCdevkit" / "VOC2007"
    names = dict(zip(COLOURS, ("aeroplane", "bicycle", "bird"), strict=True))
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (home / part).mkdir(parents=True)
    random, number = np.random.default_rng(0), 0
    for image_set, count in (("trainval", train), ("test", test)):
        lines = []
        for _ in range(count):
            colours = random.permutation(list(COLOURS))[: random.integers(1, 4)]
            pixels = random.integers(90, 160, (24, 24, 3))
            objects = ""
            for quarter, colour in enumerate(colours):
                rows, columns = slice(12 * (quarter // 2), 12 * (quarter // 2) + 12), slice(12 * (quarter % 2), None)
                pixels[rows, columns] = COLOURS[colour]
                difficult = int(random.random() < 0.2)
                objects += f"<object><name>{names[colour]}</name><difficult>{difficult}</difficult></object>"
            name, number = f"{number:06d}", number + 1
            Image.fromarray(pixels.astype(np.uint8)).save(home / "JPEGImages" / f"{name}.jpg")
            (home / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
            lines.append(name)
        (home / "ImageSets" / "Main" / f"{image_set}.txt").write_text("\n".join(lines) + "\n")
    return f"voc07:{root}"


@pytest.mark.slow
def test_voc07_is_the_mean_over_classes_of_their_average_precision(bundle: Bundle, tmp_path: Path) -> None:
    train, test = (open_images(a_voc_tree(tmp_path / "voc") if s == "train" else f"voc07:{tmp_path / 'voc'}", s)
                   for s in ("train", "test"))  # fmt: skip
    three = [replace(images, classes=("aeroplane", "bicycle", "bird"), read_labels=partial(_first_three, images))
             for images in (train, test)]  # fmt: skip
    data = Labelled.of(*three)
    assert data.several
    measurement = Measured(bundle.student(), data)
    values = protocols_for(data, None)["voc07"](measurement)
    expected = []
    for column, logits in enumerate(measurement.head.logits(measurement.test_features).T):
        mask = data.test_labels[:, column] != 0
        assert not mask.all()  # the tree has difficult objects
        expected.append(average_precision_score(data.test_labels[mask, column] == 1, logits[mask]))
    assert values["map_area"] == pytest.approx(100 * np.mean(expected))
    assert values["map_area"] > 60
    assert abs(values["map_11point"] - values["map_area"]) < 10
    by_adam = protocols_for(data, ["voc07-paper"])["voc07-paper"](measurement)
    assert by_adam["lr"] == 1e-4
    assert by_adam["map_area"] > 60
    with pytest.raises(MvmrError, match=r"protocol knn does not fit voc07:.*several labels to an image; use voc07"):
        protocols_for(data, ["knn"])


def _first_three(images: ImageSet) -> np.ndarray:
    labels = images.labels
    assert labels is not None
    return labels[:, :3]


def test_a_class_that_voc_lacks_is_named_before_any_feature_is_computed(
    bundle: Bundle, tmp_path: Path, no_features: None
) -> None:
    with pytest.raises(MvmrError, match="class 'boat' has no image in the test split"):
        evaluate(bundle.path, a_voc_tree(tmp_path / "voc"))


def test_a_missing_annotation_is_named_before_any_feature_is_computed(
    bundle: Bundle, tmp_path: Path, no_features: None
) -> None:
    data = a_voc_tree(tmp_path / "voc")
    (tmp_path / "voc" / "VOCdevkit" / "VOC2007" / "Annotations" / "000007.xml").unlink()
    with pytest.raises(MvmrError, match=r"000007\.xml.*unpack the annotations again"):
        evaluate(bundle.path, data)


def test_several_labels_need_a_protocol_for_them() -> None:
    data = Labelled.of(*(open_images("sample:digits", split) for split in ("train", "test")))
    with pytest.raises(MvmrError, match="protocol voc07 does not fit sample:digits, which has one label to an image"):
        protocols_for(data, ["voc07"])


def test_splits_of_other_classes_are_refused() -> None:
    train = open_images("sample:digits", "train").subset(range(8))
    test = replace(train, classes=(*"012345678", "ten"))
    with pytest.raises(MvmrError, match=r"training and test split have other classes \('9' is in one only\)"):
        Labelled.of(train, test)


def test_more_neighbours_than_images_are_refused(bundle: Bundle, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Labelled.of(open_images(str(photos), "train"), open_images(str(photos), "test"))
    with pytest.raises(MvmrError, match=r"kNN with k = 200: .*photos has \d+ training images"):
        Measured(bundle.student(), data).knn(ks=(1, 200))
    monkeypatch.setattr("mvmr.evaluation.protocols.represent", pytest.fail)
    with pytest.raises(MvmrError, match=r"kNN with k = 200: .*photos has \d+ training images; give a smaller k"):
        evaluate(bundle.path, str(photos), ks=[1, 200])
    with pytest.raises(MvmrError, match="kNN takes one or more neighbours"):
        evaluate(bundle.path, str(photos), ks=[0])
    with pytest.raises(MvmrError, match="protocol knn, which was not asked for"):
        evaluate(bundle.path, str(photos), protocols=["linear"], ks=[3])


def test_the_number_of_neighbours_can_be_chosen(bundle: Bundle, photos: Path) -> None:
    figures = evaluate(bundle.path, str(photos), protocols=["knn"], ks=[3, 7])["knn"]
    assert set(figures) == {f"top1_{kind}_k{k}" for kind in ("weighted", "plain") for k in (3, 7)}
    assert bundles.load(bundle.path).manifest.metrics[-1]["command"].endswith("--protocol knn --k 3,7")


def test_unknown_protocols_data_and_devices_are_one_line(bundle: Bundle, photos: Path) -> None:
    with pytest.raises(MvmrError, match=r"unknown protocol 'kn'; did you mean 'knn'\?"):
        evaluate(bundle.path, str(photos), protocols=["kn"])
    with pytest.raises(MvmrError, match=r"did you mean 'sample:digits'\?"):
        evaluate(bundle.path, "sample:digit")
    with pytest.raises(MvmrError, match="cannot use device 'cudda'"):
        evaluate(bundle.path, str(photos), device="cudda")


def test_features_are_computed_once(bundle: Bundle, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = evaluate(bundle.path, str(photos))
    monkeypatch.setattr("mvmr.models.student.Student.__call__", pytest.fail)
    assert evaluate(bundle.path, str(photos), protocols=["knn"]) == {"knn": figures["knn"]}


def test_the_newest_bundle_is_meant_when_none_is_named(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert newest_or(None).resolve() == bundle.path.resolve()
    a_bundle(tmp_path / "runs" / "later")
    assert newest_or(None).name == "later"
    assert newest_or("runs/mine") == Path("runs/mine")
    os.chdir(tmp_path / "photos" if (tmp_path / "photos").exists() else "/")
    with pytest.raises(MvmrError, match="no bundle below runs"):
        newest_or(None)
