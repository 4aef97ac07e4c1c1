"""From images to a bundle: same seed, same bytes; stopped and gone on with, same bytes; and never a label."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mvmr
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import ImageSet
from mvmr.errors import MvmrError
from mvmr.models.torchvision_resnet import Resnet
from mvmr.training import pretraining, trainer
from mvmr.training.pretraining import fit, recalibrate
from tests.training.tiny import TINY, WEIGHTS, Brightness, interrupt, recipe, steps, weights

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: object, **__: object) -> Any:
        raise error

    return function


# -- what comes out


def test_a_run_leaves_a_whole_bundle_and_nothing_beside_it(reference: Bundle) -> None:
    assert sorted(os.listdir(reference.path.parent)) == ["undisturbed"]
    left = set(os.listdir(reference.path))
    assert left == {"README.md", "bundle.json", "metrics.jsonl", "run.json", "skipped.txt", *WEIGHTS}
    manifest = reference.manifest
    assert (manifest.backbone, manifest.embedding_dim, manifest.preprocessing.crop) == ("resnet18_025", 128, 16)
    assert manifest.training["method"] == "mvmr"
    assert manifest.training["steps"] == 4
    assert manifest.training["seed"] == 0
    assert manifest.training["recipe"]["train"]["precision"] == "32-true"
    assert steps(reference.path) == [1, 2, 3, 4]
    h = reference.student().embed(np.zeros((2, 40, 30, 3), np.uint8))
    assert h.shape == (2, 128)
    assert torch.isfinite(h).all()


def test_two_runs_with_one_seed_are_equal_to_the_byte(reference: Bundle, images: ImageSet, tmp_path: Path) -> None:
    again = fit(images, tmp_path / "a", recipe("train.workers=2"), device="cpu")
    assert weights(again) == weights(reference)
    assert again.space_id == reference.space_id
    another = fit(images, tmp_path / "b", recipe("train.seed=1"), device="cpu")
    assert weights(another) != weights(reference)


def test_the_global_random_state_neither_matters_nor_moves(reference: Bundle, images: ImageSet, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        np.random.seed(99)  # noqa: NPY002
        before, numpys = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
        again = fit(images, tmp_path / "a", recipe(), device="cpu")
        assert torch.equal(before, torch.random.get_rng_state())
        assert np.random.get_state()[1].tolist() == numpys  # type: ignore[index]  # noqa: NPY002
    assert weights(again) == weights(reference)


def test_no_label_is_ever_read(reference: Bundle, images: ImageSet, tmp_path: Path) -> None:
    secret = replace(images, read_labels=raising(AssertionError("a label was read")), classes=("a", "b"))
    with pytest.raises(AssertionError):
        _ = secret.labels
    assert weights(fit(secret, tmp_path / "a", recipe(), device="cpu")) == weights(reference)


@pytest.mark.slow
def test_the_public_function_trains_by_name(tmp_path: Path) -> None:
    sample = mvmr.pretrain(
        "sample:digits", tmp_path / "out", recipe="paper", device="cpu",
        assign=[*TINY, "train.epochs=1", "train.batch_size=300", "train.accumulate=4", "views.size=8"],
    )  # fmt: skip
    assert sample.manifest.training["steps"] == 1
    assert sample.manifest.training["data"]["images"] == 1200
    assert sample.manifest.training["recipe"]["name"] == "paper"


def test_training_starts_from_given_weights(reference: Bundle, images: ImageSet, tmp_path: Path) -> None:
    frozen = recipe("train.epochs=1", "train.lr=1e-30")
    unmoved = fit(images, tmp_path / "a", frozen, init=reference.path, device="cpu")
    ours, theirs = (bundle.student().encoder.state_dict() for bundle in (unmoved, reference))
    torch.testing.assert_close(ours["conv1.weight"], theirs["conv1.weight"])
    fresh = fit(images, tmp_path / "b", frozen, device="cpu").student().encoder.state_dict()
    assert not torch.allclose(fresh["conv1.weight"], theirs["conv1.weight"])


# -- stopped, killed, gone on with


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name", "call"),
    [
        (trainer, "learning_rate", 1),  # before the first step
        (trainer, "learning_rate", 4),  # after the checkpoint of step 3
        (pretraining, "recalibrate", 1),  # after the last step
        (bundles, "write_json", 1),  # when all files of the bundle but its manifest are there
        (bundles, "publish", 1),  # when the bundle is whole, but not in its place
    ],
)
def test_a_dead_run_ends_with_the_weights_of_an_undisturbed_one(
    reference: Bundle,
    images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: Any,
    name: str,
    call: int,
) -> None:
    interrupt(monkeypatch, target, name, call, SystemExit(9))
    with pytest.raises(SystemExit):
        fit(images, tmp_path / "out", recipe(), device="cpu")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["out.partial"]
    with pytest.raises(MvmrError, match="holds an interrupted run: give --resume"):
        fit(images, tmp_path / "out", recipe(), device="cpu")
    done = fit(images, tmp_path / "out", recipe("train.workers=1"), resume=True, device="cpu")
    assert weights(done) == weights(reference)
    assert steps(done.path) == [1, 2, 3, 4]
    assert set(os.listdir(done.path)) == set(os.listdir(reference.path))  # no checkpoint left behind
    assert os.listdir(tmp_path) == ["out"]


def test_other_arguments_on_resume_are_named(images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, trainer, "learning_rate", 1, SystemExit(9))
    with pytest.raises(SystemExit):
        fit(images, tmp_path / "out", recipe(), device="cpu")
    for changed_recipe, data, message in [
        (recipe("train.batch_size=4"), images, r"recipe\.train\.batch_size \(8 there, 4 now\)"),
        (recipe("views.policy=crop"), images, r"recipe\.views\.policy \('paper' there, 'crop' now\)"),
        (recipe(), images.subset(range(16)), r"data\.images \(20 there, 16 now\)"),
    ]:
        with pytest.raises(MvmrError, match=message):
            fit(data, tmp_path / "out", changed_recipe, resume=True, device="cpu")
    with pytest.raises(MvmrError, match=r"teachers\.teacher\.name \(None there, 'brightness' now\)|method"):
        with_teacher = recipe("method.representations={teacher=1.0}")
        fit(images, tmp_path / "out", with_teacher, teachers={"teacher": Brightness()}, resume=True, device="cpu")


def test_overwrite_replaces_a_bundle_only_when_the_new_one_is_whole(
    reference: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit(images, tmp_path / "out", recipe(), device="cpu")
    with pytest.raises(MvmrError, match="holds a finished bundle: give another --out, or --overwrite"):
        fit(images, tmp_path / "out", recipe("train.seed=1"), device="cpu")
    interrupt(monkeypatch, trainer, "learning_rate", 4, SystemExit(9))
    with pytest.raises(SystemExit):
        fit(images, tmp_path / "out", recipe("train.seed=1"), overwrite=True, device="cpu")
    assert weights(bundles.load(tmp_path / "out")) == weights(first) == weights(reference)
    second = fit(images, tmp_path / "out", recipe("train.seed=1"), resume=True, device="cpu")
    assert weights(second) != weights(reference)
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_is_no_bundle_is_never_touched(images: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"mine")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(MvmrError, match="nothing of it is touched"):
            fit(images, tmp_path / "photos", recipe(), device="cpu", **flags)  # type: ignore[arg-type]
    assert (tmp_path / "photos" / "one.jpg").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["photos"]


# -- batch-norm statistics


def test_recalibration_moves_statistics_alone_and_always_to_the_same_place(images: ImageSet) -> None:
    def calibrate(workers: int, history: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = Resnet(name="resnet18").build()
            with torch.no_grad():  # statistics that training has left
                for _ in range(history):
                    encoder.train()(torch.randn(4, 3, 16, 16))
        recalibrate(encoder, images, Preprocess.for_size(16), batch_size=8, workers=workers, device=torch.device("cpu"))
        return encoder

    first, second = calibrate(0, 0), calibrate(1, 3)
    assert not first.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = Resnet(name="resnet18").build()
    for ours, theirs in zip(first.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for (name, a), (_, b) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(a, b), name
    moved = dict(first.named_buffers())["bn1.running_mean"]
    assert not torch.equal(moved, dict(fresh.named_buffers())["bn1.running_mean"])


def test_equal_originals_have_equal_features(images: ImageSet, tmp_path: Path) -> None:
    twice = images.subset([*range(10), *range(10)])
    student = fit(twice, tmp_path / "out", recipe("train.epochs=1"), device="cpu").student()
    h = student.embed([twice.load(index) for index in range(20)], batch_size=7)
    assert torch.equal(h[:10], h[10:]) or torch.allclose(h[:10], h[10:], atol=1e-6)
    assert len(h[:10].unique(dim=0)) > 1
