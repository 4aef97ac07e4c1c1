"""Teachers as a program gives them, and where a bundle's reader finds them again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mvmr
from mvmr.bundles import bundle as bundles
from mvmr.distillation.comparison import compare
from mvmr.distillation.teachers.given import read_given
from mvmr.distillation.teachers.recorded import teacher_of
from mvmr.distillation.teachers.spec import Spec
from mvmr.errors import MvmrError
from tests.distill.test_run import TINY, a_teacher, photos

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


class Colours(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = self.linear(images.mean((2, 3)))
        return rows


def prepare(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1).float() / 255


class Bare:
    """All that a teacher has but what is taken away."""

    name, weights, identity, dim = "bare", "none", "0123456789abcdef", 5

    def __init__(self, **others: Any) -> None:
        self.network = Colours()
        for name, value in others.items():
            setattr(self, name, value)

    def prepare(self, image: Image.Image) -> Tensor:
        return prepare(image)

    def __call__(self, batch: Tensor) -> Tensor:
        return self.network(batch).detach()


@pytest.fixture
def data(tmp_path: Path) -> str:
    return photos(tmp_path / "photos", 16)


def distil(teacher: Any, data: str, out: Path, **options: Any) -> bundles.Bundle:
    return mvmr.distill(teacher, data, out, assign=TINY, device="cpu", **options)


def test_an_object_teaches_as_its_spec_does(tmp_path: Path, data: str) -> None:
    student = distil(mvmr.NetworkTeacher(Colours(), prepare, name="mine"), data, tmp_path / "a")
    record = student.manifest.training["teachers"]["teacher"]
    assert (record["name"], record["weights"], record["kind"]) == ("mine", "its own", "object")
    several = {"colours": mvmr.NetworkTeacher(Colours(), prepare, name="mine"), "clip": a_teacher(tmp_path / "clip")}
    both = distil(several, data, tmp_path / "b")
    assert both.manifest.training["recipe"]["method"]["teachers"] == {"colours": 0.5, "clip": 0.5}
    identities = {name: entry["identity"] for name, entry in both.manifest.training["teachers"].items()}
    assert identities["colours"] == record["identity"] != identities["clip"]
    with pytest.raises(MvmrError, match="mine, was an object of a program; give it again: --teacher python:MODULE"):
        teacher_of(student, None, None, "cpu", text=False).prepare(Image.new("RGB", (9, 9)))


def test_other_weights_are_another_teacher() -> None:
    identities = {mvmr.NetworkTeacher(Colours(seed), prepare, name="mine").identity for seed in (0, 0, 1)}
    assert len(identities) == 2


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (nn.Linear(3, 5), r"needs name, .*identity, dim, prepare, which Linear lacks: mvmr\.NetworkTeacher"),
        (3, "an object needs name, weights, identity, dim, prepare, which int lacks"),
        (None, "which NoneType lacks"),
        (Bare(identity=""), r"Bare\.identity is ''; give a str"),
        (Bare(identity="my teacher"), "identity = 'my teacher' should be a hash in hex of all that its embeddings"),
        (Bare(dim=7), "gives rows of 5 numbers, and its dim says 7"),
        (Bare(dim="5"), r"Bare\.dim is '5'; give a int"),
        (Bare(prepare=lambda image: "no"), "its preprocessing gives str"),
        ({"a b": Bare()}, "'a b' is no name"),
        ({"mine": 3}, "which int lacks"),
        ({}, "no teacher is given"),
        ([], "no teacher is given"),
    ],
)
def test_what_is_no_teacher_is_refused_before_anything_is_made(
    tmp_path: Path, data: str, teacher: Any, message: str
) -> None:
    with pytest.raises(MvmrError, match=message):
        distil(teacher, data, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["photos"]


def test_specs_and_objects_may_stand_together() -> None:
    bare = Bare()
    assert read_given({"clip": "ViT-B-16:openai", "mine": bare}) == {
        "clip": Spec("clip", "open_clip", "ViT-B-16:openai"), "mine": bare,
    }  # fmt: skip
    assert read_given("a=ViT-B-16") == {"a": Spec("a", "open_clip", "ViT-B-16")}


def test_arguments_of_the_command_line_are_arguments(tmp_path: Path, data: str) -> None:
    student = distil(Bare(), data, tmp_path / "out", seed=3, method="cosine")
    recipe = student.manifest.training["recipe"]
    assert (recipe["train"]["seed"], recipe["method"]["name"]) == (3, "cosine")
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'; did you mean 'epochs'"):
        distil(Bare(), data, tmp_path / "b", epoch=1)


# -- where it is found again


def test_bundle_and_teacher_may_move_together_and_be_read_from_anywhere(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    a_teacher(Path("runs/clip"))
    student = distil("runs/clip", data, Path("runs/student"))
    record = student.manifest.training["teachers"]["teacher"]
    assert (record["weights"], record["beside"]) == ("../clip/open_clip_model.safetensors", True)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere" / "runs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = bundles.load(tmp_path / "elsewhere" / "runs" / "student")
    assert teacher_of(moved, None, None, "cpu", text=False).identity == record["identity"]


def test_a_teacher_that_lies_elsewhere_is_recorded_by_its_whole_path(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_teacher(tmp_path / "clip")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    student = distil("../clip", data, tmp_path / "runs" / "student")
    record = student.manifest.training["teachers"]["teacher"]
    assert record["weights"] == str(tmp_path / "clip" / "open_clip_model.safetensors")
    assert "beside" not in record
    monkeypatch.chdir("/")
    assert teacher_of(student, None, None, "cpu", text=False).identity == record["identity"]


@pytest.mark.slow
def test_one_that_is_gone_is_measured_by_its_embeddings_in_the_cache(tmp_path: Path) -> None:
    for name in ("light", "dark"):
        photos(tmp_path / name, 12)
        (tmp_path / "photos").mkdir(exist_ok=True)
        shutil.move(tmp_path / name, tmp_path / "photos" / name)
    data = str(tmp_path / "photos")
    student = distil(a_teacher(tmp_path / "clip"), data, tmp_path / "out")
    before = compare(student.path, data, protocols=["linear"])
    shutil.rmtree(tmp_path / "clip")
    assert compare(student.path, data, protocols=["linear"]) == before
    (tmp_path / "photos" / "light" / "00.jpg").unlink()
    with pytest.raises(MvmrError, match=r"is not at .*clip/open_clip_model.safetensors any more.*cache has no embed"):
        compare(student.path, data, protocols=["linear"])
