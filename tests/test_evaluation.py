"""Frozen features are measured on labelled data, every test image counted, and the figures kept in the bundle."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mvmr
from mvmr import bundle as bundles
from mvmr.bundle import Bundle
from mvmr.classifiers import knn_predict, linear_probe
from mvmr.data import open_images
from mvmr.encoder import EncoderConfig, build_encoder
from mvmr.errors import MvmrError
from mvmr.evaluation import Measured, classes_of, evaluate, newest_or, probe
from mvmr.preprocess import Preprocess
from mvmr.representations import hand_crafted

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 210)}


def a_bundle(out: Path) -> Bundle:
    """An untrained encoder: on colours that is enough."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_encoder(EncoderConfig(architecture="resnet18"))
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True)
    bundles.write(
        partial, architecture="resnet18", small_kernel=False, embedding_dim=512, preprocessing=Preprocess.for_size(16),
        training={}, encoder_state=encoder.state_dict(),
    )  # fmt: skip
    bundles.publish(partial, out)
    return bundles.load(out)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return a_bundle(tmp_path / "runs" / "mine")


def coloured(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
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
    return coloured(tmp_path / "photos", dict.fromkeys(COLOURS, 10))


def test_evaluate_measures_and_keeps_the_figures(bundle: Bundle, photos: Path) -> None:
    assert evaluate(bundle.path, str(photos)) == {"linear": 100.0, "knn": 100.0}
    now = bundles.load(bundle.path)
    assert [record["protocol"] for record in now.manifest.metrics] == ["linear", "knn"]
    for record in now.manifest.metrics:
        assert record["values"] == {"top1": 100.0}
        assert record["data"] == str(photos)
        assert record["command"] == f"mvmr evaluate {bundle.path} --data {photos} --protocol {record['protocol']}"
    assert now.space_id == bundle.space_id
    assert mvmr.evaluate(bundle.path, str(photos), protocols=["knn"]) == {"knn": 100.0}
    assert len(bundles.load(bundle.path).manifest.metrics) == 2  # the same measurement again replaces the first


def test_evaluate_takes_the_students_features_of_every_test_image(bundle: Bundle) -> None:
    data = "sample:digits"
    found = evaluate(bundle.path, data)
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
    assert found["knn"] == 100 * (knn_predict(x, labels, y, 10) == answers).mean()
    assert found["linear"] == pytest.approx(100 * (linear_probe(x, labels, 10).predict(y) == answers).mean(), abs=0.2)


def test_probe_stores_a_head_that_predicts_as_it_was_measured(bundle: Bundle, photos: Path) -> None:
    now, accuracy = probe(bundle.path, str(photos), head="colours")
    assert now.heads == ("colours",)
    assert accuracy == 100.0
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
    data = str(coloured(tmp_path / "two", {"red": 6, "blue": 6}))
    assert evaluate(bundle.path, data) == {"linear": 100.0, "knn": 100.0}
    head = probe(bundle.path, data, head="two")[0].head("two")
    assert head.weight.shape == (2, 512)


@pytest.mark.parametrize("counts", [{"red": 1, "green": 1, "blue": 2}, {"red": 2, "green": 30, "blue": 3}])
def test_classes_of_few_images(bundle: Bundle, tmp_path: Path, counts: dict[str, int]) -> None:
    results = evaluate(bundle.path, str(coloured(tmp_path / "few", counts)))
    assert all(0 <= value <= 100 for value in results.values())


def test_a_class_missing_from_the_training_split(bundle: Bundle, tmp_path: Path) -> None:
    coloured(tmp_path / "split" / "train", {"red": 6, "blue": 6})
    coloured(tmp_path / "split" / "test", {"red": 4, "green": 4, "blue": 4}, seed=1)
    results = evaluate(bundle.path, str(tmp_path / "split"))
    assert results == {"linear": pytest.approx(200 / 3), "knn": pytest.approx(200 / 3)}  # green counts as missed
    assert probe(bundle.path, str(tmp_path / "split"))[0].head(bundles.load(bundle.path).heads[0]).classes == (
        "blue", "green", "red",
    )  # fmt: skip


def test_a_training_split_of_one_class_is_one_line(bundle: Bundle, tmp_path: Path) -> None:
    coloured(tmp_path / "split" / "train", {"red": 6})
    coloured(tmp_path / "split" / "test", {"red": 4, "blue": 4}, seed=1)
    with pytest.raises(MvmrError, match="all training images are of one class"):
        evaluate(bundle.path, str(tmp_path / "split"))


@pytest.mark.parametrize("action", [evaluate, probe])
def test_images_without_labels_are_one_line(bundle: Bundle, tmp_path: Path, action: object) -> None:
    coloured(tmp_path / "flat", {"red": 12})
    for file in (tmp_path / "flat" / "red").iterdir():
        file.rename(tmp_path / "flat" / file.name)
    (tmp_path / "flat" / "red").rmdir()
    with pytest.raises(MvmrError, match=r"flat has no labels to measure with: put the images of each class into"):
        action(bundle.path, str(tmp_path / "flat"))  # type: ignore[operator]
    assert bundles.load(bundle.path).manifest == bundle.manifest


def test_several_labels_to_an_image_are_refused() -> None:
    train = open_images("sample:digits", "train")
    several = replace(train, read_labels=lambda: np.zeros((len(train), 20), np.int64))
    with pytest.raises(MvmrError, match="several labels to an image"):
        classes_of(several)


def test_splits_of_other_classes_are_refused() -> None:
    train = open_images("sample:digits", "train").subset(range(8))
    test = replace(train, classes=(*"012345678", "ten"))
    with pytest.raises(MvmrError, match=r"training and test split have other classes \('9' is in one only\)"):
        Measured(hand_crafted("pixels", Preprocess.for_size(8)), train, test)


def test_unknown_protocols_data_and_devices_are_one_line(bundle: Bundle, photos: Path) -> None:
    with pytest.raises(MvmrError, match=r"unknown protocol 'kn'; did you mean 'knn'\?"):
        evaluate(bundle.path, str(photos), protocols=["kn"])
    with pytest.raises(MvmrError, match=r"did you mean 'sample:digits'\?"):
        evaluate(bundle.path, "sample:digit")
    with pytest.raises(MvmrError, match="cannot use device 'cudda'"):
        evaluate(bundle.path, str(photos), device="cudda")


def test_features_are_computed_once(bundle: Bundle, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(bundle.path, str(photos))
    monkeypatch.setattr("mvmr.student.Student.__call__", pytest.fail)
    assert evaluate(bundle.path, str(photos), protocols=["knn"]) == {"knn": 100.0}


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
