"""Distillation end to end: a CLIP in a folder or a file, images without labels, and a student that learned from it."""

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

import mvmr
from mvmr.distillation.distill import distill
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.errors import MvmrError
from mvmr.storage.atomic import cache_dir
from mvmr.training import pretraining

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
CONFIG: dict[str, Any] = {"embed_dim": 12, "vision_cfg": VIT, "text_cfg": TEXT}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
TINY = (
    "student.backbone=resnet18_025", "views.size=16", "train.epochs=2", "train.batch_size=8", "train.lr=1e-3",
    "train.warmup_steps=2", "train.workers=0", "train.precision=32-true", "train.log_steps=1",
    "train.checkpoint_steps=1",
)  # fmt: skip
PAPER = (*TINY, "method.projector=[16,16]")


def a_teacher(folder: Path, seed: int = 0) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**deepcopy(CONFIG))
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


def photos(folder: Path, count: int, size: tuple[int, int] = (40, 30)) -> str:
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:02}.jpg")
    return str(folder)


def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches a teacher is shown from now on."""
    real, sizes = ClipTeacher.__call__, []

    def note_size(self: ClipTeacher, batch: torch.Tensor, /) -> torch.Tensor:
        sizes.append(len(batch))
        return real(self, batch)

    monkeypatch.setattr(ClipTeacher, "__call__", note_size)
    return sizes


def test_a_student_is_distilled_from_a_folder_of_images(tmp_path: Path) -> None:
    teacher, data = a_teacher(tmp_path / "clip"), photos(tmp_path / "photos", 16)
    student = mvmr.distill(teacher, data, tmp_path / "out", recipe="paper", assign=PAPER, device="cpu")
    training = student.manifest.training
    assert training["method"] == "mvmr"
    loaded = ClipTeacher.load(teacher)
    weights = "../clip/open_clip_model.safetensors"
    wanted = {"name": "clip", "weights": weights, "beside": True, "identity": loaded.identity}
    assert training["teachers"] == {"teacher": wanted}
    assert training["data"]["images"] == 16
    assert training["steps"] == 4
    lines = [json.loads(line) for line in (student.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"dcor.teacher", "biased.teacher", "unbiased.teacher.null"} <= lines[0].keys()
    assert "clip" in (student.path / "README.md").read_text()
    assert student.student().embed([Image.new("RGB", (50, 20))]).shape == (1, 128)


@pytest.mark.slow
def test_the_teacher_sees_each_image_once_over_epochs_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, data, sizes = a_teacher(tmp_path / "clip"), photos(tmp_path / "photos", 16), batch_sizes(monkeypatch)
    first = distill(teacher, data, tmp_path / "a", recipe="paper", assign=PAPER, device="cpu")
    assert sum(sizes) == 16
    second = distill(teacher, data, tmp_path / "b", recipe="paper", assign=PAPER, device="cpu")
    assert sum(sizes) == 16
    assert (first.path / "encoder.safetensors").read_bytes() == (second.path / "encoder.safetensors").read_bytes()
    stranger = a_teacher(tmp_path / "clip2", seed=1)
    third = distill(stranger, data, tmp_path / "c", recipe="paper", assign=PAPER, device="cpu")
    assert sum(sizes) == 32
    assert (first.path / "encoder.safetensors").read_bytes() != (third.path / "encoder.safetensors").read_bytes()


def test_what_the_student_learns_from_is_the_teacher_on_its_own_preprocessing(tmp_path: Path) -> None:
    teacher, data = a_teacher(tmp_path / "clip"), photos(tmp_path / "photos", 8)
    distill(teacher, data, tmp_path / "out", recipe="paper", assign=[*PAPER, "train.epochs=1"], device="cpu")
    (rows,) = (cache_dir() / "representations").glob("clip-*.npy")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{teacher}")
    model.eval()
    files = sorted(Path(data).iterdir())
    with torch.no_grad():
        theirs = model.encode_image(torch.stack([transform(Image.open(file)) for file in files]))
    np.testing.assert_allclose(np.load(rows), theirs.numpy(), rtol=1e-4, atol=1e-5)


def test_the_teacher_is_not_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "recalibrate", stop)
    with pytest.raises(KeyboardInterrupt):
        distill(
            a_teacher(tmp_path / "clip"), photos(tmp_path / "photos", 8), tmp_path / "out", recipe="paper",
            assign=[*PAPER, "train.epochs=1"], device="cpu",
        )  # fmt: skip
    state = torch.load(tmp_path / "out.partial" / "checkpoint.pt", weights_only=True)
    assert not [key for key in state["learner"] if "visual" in key or "clip" in key or "attn" in key]
    assert {key.split(".")[0] for key in state["learner"]} == {"encoder", "projector"}


def test_a_run_is_gone_on_with_under_the_same_teacher_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, data = a_teacher(tmp_path / "clip"), photos(tmp_path / "photos", 8)
    stranger = a_teacher(tmp_path / "other", seed=1)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pretraining, "recalibrate", stop)
        with pytest.raises(KeyboardInterrupt):
            distill(teacher, data, tmp_path / "out", recipe="paper", assign=PAPER, device="cpu")
    with pytest.raises(
        MvmrError, match=r"differs in teachers\.teacher\.identity .*teachers\.teacher\.name \('clip' there"
    ):
        distill(stranger, data, tmp_path / "out", recipe="paper", assign=PAPER, resume=True, device="cpu")
    done = distill(teacher, data, tmp_path / "out", recipe="paper", assign=PAPER, resume=True, device="cpu")
    assert done.manifest.training["steps"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": "ViT-B-61"}, r"unknown teacher 'ViT-B-61'; did you mean 'ViT-B-16'\?"),
        ({"teacher": "ViT-B-16", "pretrained": "opnai"}, r"weights of ViT-B-16: 'opnai'; did you mean 'openai'\?"),
        ({"teacher": "ViT-B-16", "pretrained": "gone.bin"}, r"weights file gone\.bin of teacher .* does not exist"),
        ({"recipe": "papr"}, r"unknown recipe 'papr'; did you mean 'paper'\?"),
        ({"assign": ["train.epoch=3"]}, r"unknown key 'train\.epoch', did you mean 'epochs'\?"),
        ({"assign": ["method.representations={teacer=1.0}"]}, r"'teacer'; did you mean 'teacher'"),
        ({"data": "sample:patch"}, r"did you mean 'sample:patches'\?"),
        ({"assign": [*PAPER, "train.batch_size=64"]}, r"a step takes 64 images and the data have 8"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_leaves_nothing(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    defaults = {"teacher": a_teacher(tmp_path / "clip"), "data": photos(tmp_path / "photos", 8), "recipe": "paper"}
    with pytest.raises(MvmrError, match=message) as excinfo:
        distill(out=tmp_path / "out", device="cpu", **({"assign": PAPER} | defaults | arguments))
    assert "\n" not in str(excinfo.value)
    assert sorted(os.listdir(tmp_path)) == ["clip", "photos"]


def test_weights_of_another_architecture_are_named(tmp_path: Path) -> None:
    small = Path(a_teacher(tmp_path / "clip")) / "open_clip_model.safetensors"
    with pytest.raises(MvmrError, match=r"as the image tower of ViT-B-16, does not fit: keys \d+ missing \("):
        distill("ViT-B-16", photos(tmp_path / "photos", 8), tmp_path / "out", pretrained=small, recipe="paper")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_full_size_teacher_and_student_do_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = open_clip.create_model("ViT-B-16").visual.state_dict()
    save_file({f"visual.{key}": value.contiguous() for key, value in weights.items()}, tmp_path / "vit.safetensors")
    del weights
    starts = []
    real = pretraining.build_learner

    def remember(*args: Any, **kwargs: Any) -> Any:
        learner = real(*args, **kwargs)
        starts.append({key: value.clone() for key, value in learner.state_dict().items() if value.numel() < 1e6})
        return learner

    monkeypatch.setattr(pretraining, "build_learner", remember)
    student = distill(
        "ViT-B-16", photos(tmp_path / "photos", 8, (260, 240)), tmp_path / "out", recipe="paper", device="cpu",
        pretrained=tmp_path / "vit.safetensors", assign=["train.epochs=1", "train.batch_size=8", "train.workers=0",
                                                          "method.projector=[2048,2048,2048]"],
    )  # fmt: skip
    manifest = student.manifest
    assert (manifest.backbone, manifest.embedding_dim, manifest.preprocessing.crop) == ("resnet50", 2048, 224)
    assert manifest.training["recipe"]["method"]["projector"] == [2048, 2048, 2048]
    assert manifest.training["teachers"]["teacher"]["name"] == "ViT-B-16"
    (line,) = (json.loads(line) for line in (student.path / "metrics.jsonl").read_text().splitlines())
    assert line["step"] == 1
    assert all(np.isfinite(value) for value in line.values())
    assert 0 < line["loss"] < 10
    trained = student.student().encoder.state_dict()
    moved = [key for key in trained if f"encoder.{key}" in starts[0] and "conv" in key]
    assert moved
    # zero-initialised batch norms keep the first step from most of a block's convolutions
    changed = [key for key in moved if not torch.equal(trained[key], starts[0][f"encoder.{key}"])]
    assert "conv1.weight" in changed
