"""What stops a run is one line, and leaves either nothing or what can be gone on with."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mvmr.bundles.bundle import Bundle
from mvmr.data import ImageSet, open_images
from mvmr.errors import MvmrError
from mvmr.methods.objective import Embeddings, Objective
from mvmr.training import pretraining
from mvmr.training.pretraining import fit, pretrain
from tests.training.tiny import Brightness, recipe, steps, weights

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


@pytest.mark.parametrize(
    ("assign", "message"),
    [
        ("train.batch_size=1", r"batch_size = 1: the method compares the images of a batch; give 4 or more"),
        ("train.batch_size=21", r"a step takes 21 images and the data have 20: give --batch-size 20 or less"),
        ("train.accumulate=3", r"a step takes 24 images and the data have 20: give --batch-size 6 or less"),
        ("train.accumulate=9", r"a step takes 72 images and the data have 20: that is too few"),
        ("views.policy=papr", r"unknown view policy or step 'papr'; did you mean 'paper'\?"),
        ("views.size=-3", r"crop = -3 must lie between 1 and"),
        ("method.representations={pixls=1.0}", r"unknown representation 'pixls'; did you mean 'pixels'\?"),
        ("method.representations={teacher=1.0}", r"this recipe has a teacher: run it with `mvmr distill"),
        ("method={name='cosine',teachers={pixels=1.0}}", r"pixels: only a teacher, scattering or hog"),
        ("train.lrr=1", r"unknown key 'train\.lrr', did you mean 'lr'\?"),
        ("train.precision=bf16", r"train\.precision = 'bf16' should be one of 32-true, bf16-mixed, 16-mixed"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    images: ImageSet, tmp_path: Path, assign: str, message: str
) -> None:
    with pytest.raises(MvmrError, match=message) as caught:
        fit(images, tmp_path / "out", recipe(assign), device="cpu")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_unknown_recipes_and_missing_recipe_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match=r"unknown recipe 'papr'; did you mean 'paper'\?"):
        pretrain("sample:digits", tmp_path / "out", recipe="papr")
    with pytest.raises(MvmrError, match=r"recipe file .*mine\.toml does not exist"):
        pretrain("sample:digits", tmp_path / "out", recipe=tmp_path / "mine.toml")


@pytest.mark.parametrize(("device", "devices"), [("cpuu", 1), ("cpu", 0), ("tpu", 1)])
def test_a_device_that_is_not_there_is_one_line(images: ImageSet, tmp_path: Path, device: str, devices: int) -> None:
    with pytest.raises(MvmrError, match=rf"cannot use {devices} of device '{device}' \(.*\); see `mvmr doctor`"):
        fit(images, tmp_path / "out", recipe(), device=device, devices=devices)
    assert os.listdir(tmp_path) == []


def test_init_of_another_architecture_leaves_nothing(reference: Bundle, images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match=r"does not fit: keys .*missing"):
        fit(images, tmp_path / "out", recipe("student.backbone=resnet50"), init=reference.path, device="cpu")
    assert os.listdir(tmp_path) == []


def test_a_teacher_that_the_recipe_ignores_is_refused(images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match="recipe paper has no use for a teacher"):
        fit(images, tmp_path / "out", recipe(), teachers={"teacher": Brightness()}, device="cpu")
    assert os.listdir(tmp_path) == []


def test_a_loss_that_is_not_finite_can_be_gone_on_with_at_a_lower_rate(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Objective.__call__, 0

    def spoil(self: Objective, views: Embeddings, targets: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        terms = real(self, views, targets)
        return terms if calls != 4 else terms | {"dcor.pixels": terms["dcor.pixels"] * torch.inf}

    monkeypatch.setattr(Objective, "__call__", spoil)
    text = r"^dcor\.pixels is not finite at step 3 \(.*dcor\.pixels = inf, .*; the checkpoint of step 3 in .* is kept"
    with pytest.raises(MvmrError, match=text):
        fit(images, tmp_path / "out", recipe(), device="cpu")
    assert os.listdir(tmp_path) == ["out.partial"]
    done = fit(images, tmp_path / "out", recipe("train.lr=1e-4", "train.clip_grad=1"), resume=True, device="cpu")
    changes = done.manifest.training["changes"]
    assert changes == [{"step": 3, "recipe.train.lr": "0.001 -> 0.0001", "recipe.train.clip_grad": "None -> 1.0"}]
    assert done.manifest.training["recipe"]["train"]["lr"] == 1e-4
    assert steps(done.path) == [1, 2, 3, 4]


def test_a_learning_rate_out_of_this_world_is_stopped(images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match=r"is not finite (at|after) step \d"):
        fit(images, tmp_path / "out", recipe("train.lr=1e30"), device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_at_the_end_keeps_the_run(
    reference: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def full(source: str | Path, target: str | Path) -> None:
        if Path(target).name == "encoder.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        MvmrError, match=r"^disk full while writing .*encoder\.safetensors; free some space and run again$"
    ):
        fit(images, tmp_path / "out", recipe(), device="cpu")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["out.partial"]
    names = {"checkpoint.pt", "metrics.jsonl", "run.json", "skipped.txt"}
    assert set(os.listdir(tmp_path / "out.partial")) == {".lock", *names}
    assert weights(fit(images, tmp_path / "out", recipe(), resume=True, device="cpu")) == weights(reference)


def a_folder(path: Path, count: int) -> None:
    random = np.random.default_rng(0)
    path.mkdir()
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path / f"{number:02}.png")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_that_vanishes_is_one_line(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a_folder(tmp_path / "photos", 8)
    data = open_images(tmp_path / "photos", "unlabelled")
    (tmp_path / "photos" / "03.png").unlink()
    quick = recipe("train.epochs=1", f"train.workers={workers}")
    with pytest.raises(MvmrError, match=r"^cannot read image \S*03\.png: missing .*; it was readable when"):
        fit(data, tmp_path / "out", quick, device="cpu")
    a_folder(tmp_path / "again", 8)
    data = open_images(tmp_path / "again", "unlabelled")
    real = pretraining.recalibrate

    def after_the_last_step(*args: Any, **kwargs: Any) -> None:
        (tmp_path / "again" / "03.png").unlink()
        real(*args, **kwargs)

    monkeypatch.setattr(pretraining, "recalibrate", after_the_last_step)
    with pytest.raises(MvmrError, match=r"^cannot read image \S*03\.png: missing .*; it was readable when"):
        fit(data, tmp_path / "out2", quick, device="cpu")
