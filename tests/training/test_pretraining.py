"""From images to a bundle: same seed, same bytes; stopped and gone on with, same bytes; and never a label."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mvmr
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import ImageSet, open_images
from mvmr.errors import MvmrError
from mvmr.methods.method import AUGMENTED, ORIGINAL
from mvmr.methods.mvmr import SECOND
from mvmr.methods.objective import Embeddings, Objective
from mvmr.models.torchvision_resnet import Resnet
from mvmr.training import pretraining, trainer
from mvmr.training.pretraining import fit, pretrain, recalibrate
from mvmr.training.recipe import Recipe, load_recipe
from mvmr.training.targets import Targets, WithRows
from mvmr.training.views import Views

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

IMAGES = 20  # two steps to an epoch
THREE = (ORIGINAL, AUGMENTED, SECOND)
TINY = (
    "student.backbone=resnet18", "method.projector=[16,16]", "views.size=16",
    "method.representations={pixels=1.0,augmented_pixels=1.0}",
    "train.epochs=2", "train.batch_size=8", "train.lr=1e-3", "train.warmup_steps=2", "train.workers=0",
    "train.precision=32-true", "train.log_steps=1", "train.checkpoint_steps=3",
)  # fmt: skip
WEIGHTS = ("encoder.safetensors", "projector.safetensors")


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return open_images("sample:digits", "unlabelled").subset(range(IMAGES))


@pytest.fixture(scope="module")
def undisturbed(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.set_num_threads(1)
    return fit(images, tmp_path_factory.mktemp("runs") / "undisturbed", recipe(), device="cpu")


def recipe(*assign: str) -> Recipe:
    return load_recipe("paper", "mvmr", [*TINY, *assign])


def weights(bundle: Bundle) -> list[bytes]:
    return [(bundle.path / name).read_bytes() for name in WEIGHTS]


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: object, **__: object) -> Any:
        raise error

    return function


class Brightness:
    """A teacher of two numbers per image that counts how many images it was shown."""

    name, weights, identity = "brightness", "none", "b" * 64

    def __init__(self) -> None:
        self.seen = 0

    def prepare(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize((4, 4)), dtype=np.float32)).permute(2, 0, 1)

    def __call__(self, batch: Tensor) -> Tensor:
        self.seen += len(batch)
        return torch.stack([batch.mean((1, 2, 3)), batch.std((1, 2, 3))], dim=1)


# -- what comes out


def test_a_run_leaves_a_whole_bundle_and_nothing_beside_it(undisturbed: Bundle) -> None:
    assert sorted(os.listdir(undisturbed.path.parent)) == ["undisturbed"]
    left = set(os.listdir(undisturbed.path))
    assert left == {"README.md", "bundle.json", "metrics.jsonl", "run.json", "skipped.txt", *WEIGHTS}
    said = undisturbed.manifest
    assert (said.backbone, said.embedding_dim, said.preprocessing.crop) == ("resnet18", 512, 16)
    assert said.training["method"] == "mvmr"
    assert said.training["steps"] == 4
    assert said.training["seed"] == 0
    assert said.training["recipe"]["train"]["precision"] == "32-true"
    assert steps(undisturbed.path) == [1, 2, 3, 4]
    h = undisturbed.student().embed(np.zeros((2, 40, 30, 3), np.uint8))
    assert h.shape == (2, 512)
    assert torch.isfinite(h).all()


def test_two_runs_with_one_seed_are_equal_to_the_byte(undisturbed: Bundle, images: ImageSet, tmp_path: Path) -> None:
    again = fit(images, tmp_path / "a", recipe("train.workers=2"), device="cpu")
    assert weights(again) == weights(undisturbed)
    assert again.space_id == undisturbed.space_id
    other = fit(images, tmp_path / "b", recipe("train.seed=1"), device="cpu")
    assert weights(other) != weights(undisturbed)


def test_the_global_random_state_neither_matters_nor_moves(
    undisturbed: Bundle, images: ImageSet, tmp_path: Path
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        np.random.seed(99)  # noqa: NPY002
        before, numpys = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
        again = fit(images, tmp_path / "a", recipe(), device="cpu")
        assert torch.equal(before, torch.random.get_rng_state())
        assert np.random.get_state()[1].tolist() == numpys  # type: ignore[index]  # noqa: NPY002
    assert weights(again) == weights(undisturbed)


def test_no_label_is_ever_read(undisturbed: Bundle, images: ImageSet, tmp_path: Path) -> None:
    secret = replace(images, read_labels=raising(AssertionError("a label was read")), classes=("a", "b"))
    with pytest.raises(AssertionError):
        _ = secret.labels
    assert weights(fit(secret, tmp_path / "a", recipe(), device="cpu")) == weights(undisturbed)


def test_the_public_function_trains_by_name(tmp_path: Path) -> None:
    made = mvmr.pretrain(
        "sample:digits", tmp_path / "out", recipe="paper", device="cpu",
        assign=[*TINY, "train.epochs=1", "train.batch_size=300", "train.accumulate=4", "views.size=8"],
    )  # fmt: skip
    assert made.manifest.training["steps"] == 1
    assert made.manifest.training["data"]["images"] == 1200
    assert made.manifest.training["recipe"]["name"] == "paper"


def test_training_starts_from_given_weights(undisturbed: Bundle, images: ImageSet, tmp_path: Path) -> None:
    frozen = recipe("train.epochs=1", "train.lr=1e-30")
    kept = fit(images, tmp_path / "a", frozen, init=undisturbed.path, device="cpu")
    ours, theirs = (each.student().encoder.state_dict() for each in (kept, undisturbed))
    torch.testing.assert_close(ours["conv1.weight"], theirs["conv1.weight"])
    fresh = fit(images, tmp_path / "b", frozen, device="cpu").student().encoder.state_dict()
    assert not torch.allclose(fresh["conv1.weight"], theirs["conv1.weight"])


# -- stopped, killed, gone on with


def interrupt(monkeypatch: pytest.MonkeyPatch, place: object, name: str, call: int, error: BaseException) -> None:
    """Make the n-th call of ``place.name`` end in ``error``."""
    real, calls = getattr(place, name), 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, function)


@pytest.mark.parametrize(
    ("place", "name", "call"),
    [
        (trainer, "learning_rate", 1),  # before the first step
        (trainer, "learning_rate", 4),  # after the checkpoint of step 3
        (pretraining, "recalibrate", 1),  # after the last step
        (bundles, "write_json", 1),  # when all files of the bundle but its manifest are there
        (bundles, "publish", 1),  # when the bundle is whole, but not in its place
    ],
)
def test_a_dead_run_ends_with_the_weights_of_an_undisturbed_one(
    undisturbed: Bundle,
    images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    call: int,
) -> None:
    interrupt(monkeypatch, place, name, call, SystemExit(9))
    with pytest.raises(SystemExit):
        fit(images, tmp_path / "out", recipe(), device="cpu")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["out.partial"]
    with pytest.raises(MvmrError, match="holds an interrupted run: give --resume"):
        fit(images, tmp_path / "out", recipe(), device="cpu")
    done = fit(images, tmp_path / "out", recipe("train.workers=1"), resume=True, device="cpu")
    assert weights(done) == weights(undisturbed)
    assert steps(done.path) == [1, 2, 3, 4]
    assert set(os.listdir(done.path)) == set(os.listdir(undisturbed.path))  # no checkpoint left behind
    assert os.listdir(tmp_path) == ["out"]


def test_other_arguments_on_resume_are_named(images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, trainer, "learning_rate", 1, SystemExit(9))
    with pytest.raises(SystemExit):
        fit(images, tmp_path / "out", recipe(), device="cpu")
    for other, data, said in [
        (recipe("train.batch_size=4"), images, r"recipe\.train\.batch_size \(8 there, 4 now\)"),
        (recipe("views.policy=crop"), images, r"recipe\.views\.policy \('paper' there, 'crop' now\)"),
        (recipe(), images.subset(range(16)), r"data\.images \(20 there, 16 now\)"),
    ]:
        with pytest.raises(MvmrError, match=said):
            fit(data, tmp_path / "out", other, resume=True, device="cpu")
    with pytest.raises(MvmrError, match=r"teachers\.teacher\.name \(None there, 'brightness' now\)|method"):
        with_teacher = recipe("method.representations={teacher=1.0}")
        fit(images, tmp_path / "out", with_teacher, teachers={"teacher": Brightness()}, resume=True, device="cpu")


def test_overwrite_replaces_a_bundle_only_when_the_new_one_is_whole(
    undisturbed: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit(images, tmp_path / "out", recipe(), device="cpu")
    with pytest.raises(MvmrError, match="holds a finished bundle: give another --out, or --overwrite"):
        fit(images, tmp_path / "out", recipe("train.seed=1"), device="cpu")
    interrupt(monkeypatch, trainer, "learning_rate", 4, SystemExit(9))
    with pytest.raises(SystemExit):
        fit(images, tmp_path / "out", recipe("train.seed=1"), overwrite=True, device="cpu")
    assert weights(bundles.load(tmp_path / "out")) == weights(first) == weights(undisturbed)
    second = fit(images, tmp_path / "out", recipe("train.seed=1"), resume=True, device="cpu")
    assert weights(second) != weights(undisturbed)
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_is_no_bundle_is_never_touched(images: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"mine")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(MvmrError, match="nothing of it is touched"):
            fit(images, tmp_path / "photos", recipe(), device="cpu", **flags)  # type: ignore[arg-type]
    assert (tmp_path / "photos" / "one.jpg").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["photos"]


# -- what stops a run


@pytest.mark.parametrize(
    ("assign", "said"),
    [
        ("train.batch_size=1", r"batch_size = 1: the method compares the images of a batch; give 4 or more"),
        ("train.batch_size=21", r"a step takes 21 images and the data have 20: give --batch-size 20 or less"),
        ("train.accumulate=3", r"a step takes 24 images and the data have 20: give --batch-size 6 or less"),
        ("train.accumulate=9", r"a step takes 72 images and the data have 20: that is too few"),
        ("views.policy=papr", r"unknown view policy or step 'papr'; did you mean 'paper'\?"),
        ("views.size=-3", r"crop = -3 must lie between 1 and"),
        ("method.representations={pixls=1.0}", r"unknown representation 'pixls'; did you mean 'pixels'\?"),
        ("method.representations={teacher=1.0}", r"this recipe has a teacher: run it with `mvmr distill"),
        ("method.regression={pixels=1.0}", r"regression\.pixels: only a teacher, hog or scattering"),
        ("train.lrr=1", r"unknown key 'train\.lrr', did you mean 'lr'\?"),
        ("train.precision=bf16", r"train\.precision = 'bf16' should be one of 32-true, bf16-mixed, 16-mixed"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    images: ImageSet, tmp_path: Path, assign: str, said: str
) -> None:
    with pytest.raises(MvmrError, match=said) as caught:
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


def test_init_of_another_architecture_leaves_nothing(undisturbed: Bundle, images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match=r"does not fit: keys .*missing"):
        fit(images, tmp_path / "out", recipe("student.backbone=resnet50"), init=undisturbed.path, device="cpu")
    assert os.listdir(tmp_path) == []


def test_a_teacher_that_the_recipe_ignores_is_refused(images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match="recipe paper has no use for a teacher"):
        fit(images, tmp_path / "out", recipe(), teachers={"teacher": Brightness()}, device="cpu")
    assert os.listdir(tmp_path) == []


def test_a_loss_that_is_not_finite_can_be_gone_on_with_at_a_lower_rate(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Objective.forward, 0

    def spoiled(self: Objective, views: Embeddings, targets: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        terms = real(self, views, targets)
        return terms if calls != 4 else terms | {"dcor.pixels": terms["dcor.pixels"] * torch.inf}

    monkeypatch.setattr(Objective, "forward", spoiled)
    said = r"^dcor\.pixels is not finite at step 3 \(.*dcor\.pixels = inf, .*; the checkpoint of step 3 in .* is kept"
    with pytest.raises(MvmrError, match=said):
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
    undisturbed: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    kept = {"checkpoint.pt", "metrics.jsonl", "run.json", "skipped.txt"}
    assert set(os.listdir(tmp_path / "out.partial")) == {".lock", *kept}
    assert weights(fit(images, tmp_path / "out", recipe(), resume=True, device="cpu")) == weights(undisturbed)


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


# -- teachers


@pytest.mark.slow
def test_a_teacher_sees_each_image_once_in_its_life(images: ImageSet, tmp_path: Path) -> None:
    teacher = Brightness()
    with_teacher = recipe("method.representations={teacher=1.0}", "method.regression={teacher=1.0}")
    first = fit(images, tmp_path / "a", with_teacher, teachers={"teacher": teacher}, device="cpu")
    assert teacher.seen == IMAGES  # though there were two epochs
    second = fit(images, tmp_path / "b", with_teacher, teachers={"teacher": teacher}, device="cpu")
    assert teacher.seen == IMAGES
    assert weights(first) == weights(second)
    assert first.manifest.training["method"] == "mvmr"
    described = {"name": "brightness", "weights": "none", "identity": "b" * 64}
    assert first.manifest.training["teachers"] == {"teacher": described}
    line = json.loads((first.path / "metrics.jsonl").read_text().splitlines()[0])
    assert {"dcor.teacher", "regression.teacher", "biased.teacher.null"} <= line.keys()
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
    chosen = [(2, index) for index in (7, 3, 19, 0)]
    found = targets.of(torch.utils.data.default_collate([views[item] for item in chosen]))
    live = without_cache.of(torch.utils.data.default_collate([bare[item] for item in chosen]))
    assert found.keys() == set(names)
    expected = teacher(torch.stack([teacher.prepare(images.load(index)) for _, index in chosen]))
    torch.testing.assert_close(found["teacher"], expected)
    for name in names:
        torch.testing.assert_close(found[name], live[name])
        assert found[name].dtype == torch.float32
        assert found[name].shape[0] == 4
        assert len(found[name].unique(dim=0)) == 4, name


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
    with_teacher = recipe("method.representations={teacher=1.0}", "method.regression={teacher=1.0}")
    with pytest.raises(SystemExit):
        fit(images, tmp_path / "out", with_teacher, teachers={"teacher": Network()}, device="cpu")
    state = torch.load(tmp_path / "out.partial" / "checkpoint.pt", weights_only=True)
    assert {key.split(".")[0] for key in state["learner"]} == {"encoder", "projector", "objective"}
    objective = {key for key in state["learner"] if key.startswith("objective")}
    regression = ("linear.weight", "linear.bias", "mean", "std")
    assert objective == {f"objective.regressions.teacher.{name}" for name in regression}


# -- batch-norm statistics


def test_recalibration_moves_statistics_alone_and_always_to_the_same_place(images: ImageSet) -> None:
    def calibrated(workers: int, history: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = Resnet(name="resnet18").build()
            with torch.no_grad():  # statistics that training has left
                for _ in range(history):
                    encoder.train()(torch.randn(4, 3, 16, 16))
        recalibrate(encoder, images, Preprocess.for_size(16), batch_size=8, workers=workers, device=torch.device("cpu"))
        return encoder

    first, second = calibrated(0, 0), calibrated(1, 3)
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
