"""Targets belong to the images of their step; a teacher sees each image once, and is in no checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mvmr.bundles.bundle import ENCODER
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import ImageSet
from mvmr.methods.method import AUGMENTED, ORIGINAL
from mvmr.methods.mvmr import SECOND
from mvmr.training import pretraining
from mvmr.training.pretraining import fit
from mvmr.training.recipe import load_recipe
from mvmr.training.targets import Targets, WithRows
from mvmr.training.views import Views
from tests.training.tiny import IMAGES, TINY, Brightness, interrupt

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


THREE = (ORIGINAL, AUGMENTED, SECOND)
BY_REGRESSION = (
    *(assignment for assignment in TINY if not assignment.startswith("method.")),
    "method.name=regression", "objective.representations={teacher=1.0}",
)  # fmt: skip


@pytest.mark.slow
def test_a_teacher_sees_each_image_once_in_its_life(images: ImageSet, tmp_path: Path) -> None:
    teacher = Brightness()
    with_teacher = load_recipe("paper", "mvmr", BY_REGRESSION)
    first = fit(images, tmp_path / "a", with_teacher, teachers={"teacher": teacher}, device="cpu")
    assert teacher.seen == IMAGES  # though there were two epochs
    second = fit(images, tmp_path / "b", with_teacher, teachers={"teacher": teacher}, device="cpu")
    assert teacher.seen == IMAGES
    assert (first.path / ENCODER).read_bytes() == (second.path / ENCODER).read_bytes()
    assert first.manifest.training["method"] == "regression"
    described = {"name": "brightness", "weights": "none", "identity": "b" * 64}
    assert first.manifest.training["teachers"] == {"teacher": described}
    line = json.loads((first.path / "metrics.jsonl").read_text().splitlines()[0])
    assert {"dcor.teacher", "regression.teacher", "unbiased.teacher.null"} <= line.keys()
    fit(images.subset(range(16)), tmp_path / "c", with_teacher, teachers={"teacher": teacher}, device="cpu")
    assert teacher.seen == IMAGES + 16


def test_the_targets_of_a_step_belong_to_its_images(images: ImageSet) -> None:
    teacher, preprocess = Brightness(), Preprocess.for_size(16)
    names = ("teacher", "hog", "scattering", "pixels", "local_std", "augmented_pixels")
    targets = Targets(
        names, images, preprocess, teachers={"teacher": teacher}, cache_gb=1.0, device=torch.device("cpu"), workers=0,
        progress=False,
    )  # fmt: skip
    assert targets.rows.keys() == {"teacher", "hog", "scattering"}
    without_cache = Targets(
        names, images, preprocess, teachers={"teacher": teacher}, cache_gb=0.0, device=torch.device("cpu"), workers=0,
        progress=False,
    )  # fmt: skip
    assert without_cache.rows.keys() == {"teacher"}
    views = WithRows(Views(images, preprocess, THREE, "paper", seed=0), targets.rows)
    bare = WithRows(Views(images, preprocess, THREE, "paper", seed=0), without_cache.rows)
    items = [(2, index) for index in (7, 3, 19, 0)]
    results = targets.of(torch.utils.data.default_collate([views[item] for item in items]))
    live = without_cache.of(torch.utils.data.default_collate([bare[item] for item in items]))
    assert results.keys() == set(names)
    expected = teacher(torch.stack([teacher.prepare(images.load(index)) for _, index in items]))
    torch.testing.assert_close(results["teacher"], expected)
    for name in names:
        torch.testing.assert_close(results[name], live[name])
        assert results[name].dtype == torch.float32
        assert results[name].shape[0] == 4
        assert len(results[name].unique(dim=0)) == 4, name


def test_augmented_pixels_are_another_augmentation_for_each_image(images: ImageSet) -> None:
    same = images.subset([5] * 8)
    targets = Targets(
        ("augmented_pixels",), same, Preprocess.for_size(16), teachers={}, cache_gb=0.0, device=torch.device("cpu"),
        workers=0, progress=False,
    )  # fmt: skip
    views = Views(same, Preprocess.for_size(16), THREE, "paper", seed=0)
    batch = torch.utils.data.default_collate([views[0, index] for index in range(8)])
    assert len(batch["original"].flatten(1).unique(dim=0)) == 1
    rows = targets.of(batch)["augmented_pixels"]
    assert len(rows.unique(dim=0)) == 8
    assert not torch.equal(rows, batch["augmented"].flatten(1) / 255)


def test_neither_teacher_nor_its_weights_are_in_the_checkpoint(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Network(Brightness):
        """A teacher with weights, as CLIP has them."""

        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Linear(3 * 16, 2)

        @torch.no_grad()
        def __call__(self, batch: Tensor) -> Tensor:
            return self.tower(batch.flatten(1))

    interrupt(monkeypatch, pretraining, "recalibrate", 1, SystemExit(9))
    with_teacher = load_recipe("paper", "mvmr", BY_REGRESSION)
    with pytest.raises(SystemExit):
        fit(images, tmp_path / "out", with_teacher, teachers={"teacher": Network()}, device="cpu")
    state = torch.load(tmp_path / "out.partial" / "checkpoint.pt", weights_only=True)
    assert {key.split(".")[0] for key in state["learner"]} == {"encoder", "losses", "steps", "salt"}
    beside = {key for key in state["learner"] if key.startswith("losses")}
    regression = ("loss.linear.weight", "loss.linear.bias", "standard.mean", "standard.factor")
    assert beside == {f"losses.regression-teacher.{name}" for name in regression}
