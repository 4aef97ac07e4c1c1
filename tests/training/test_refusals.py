"""What can't be is refused before an image is decoded or a teacher is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mvmr
from mvmr.errors import MvmrError
from tests.distill.test_run import a_teacher, photos
from tests.making import write_bundle

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")

CASES: list[tuple[dict[str, Any], str]] = [
    ({"recipe": "papr"}, r"unknown recipe 'papr'; did you mean 'paper'"),
    ({"assign": ["train.epoch=3"]}, r"unknown key 'train\.epoch', did you mean 'epochs'"),
    ({"assign": ["method.name=simcrl"]}, r"method\.name = 'simcrl' should be one of .*did you mean 'simclr'"),
    (
        {"recipe": "paper", "assign": ["method.representations={pixls=1.0}"]},
        r"unknown representation 'pixls'; did you mean 'pixels'",
    ),
    ({"assign": ["views.policy=crp"]}, r"unknown view policy or step 'crp'"),
    ({"assign": ["student.backbone=resnet19"]}, r"unknown student 'resnet19'; did you mean 'resnet18'"),
    ({"assign": ["student.backbone=timm:vit_tny"]}, r"unknown timm model 'vit_tny'"),
    ({"init": "gone.pth"}, r"weights file gone\.pth not found"),
]


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvmr.data.folder.check_files", pytest.fail)
    monkeypatch.setattr("mvmr.training.targets.represent", pytest.fail)


SMALLER_VIEWS = (
    {
        "assign": [
            "method.name=lejepa",
            "method.local=2",
            "method.local_scale=0.432",
            "student.backbone=timm:vit_tiny_patch16_224",
        ]
    },
    r"images of 224 px does not take views of 97 px .*give \[method\] local_scale = 1, or one that makes them fit",
)


@pytest.mark.parametrize(("arguments", "message"), [*CASES, SMALLER_VIEWS])
def test_pretrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str) -> None:
    forbid_decoding(monkeypatch)
    with pytest.raises(MvmrError, match=message) as caught:
        mvmr.pretrain(photos(tmp_path / "photos", 8), tmp_path / "out", device="cpu", **arguments)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("arguments", "message"), [*CASES, ({"assign": ["method.name=byol"]}, "has no use for a teacher")]
)
def test_distill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str) -> None:
    forbid_decoding(monkeypatch)
    teacher = a_teacher(tmp_path / "clip")
    with pytest.raises(MvmrError, match=message):
        mvmr.distill(teacher, photos(tmp_path / "photos", 8), tmp_path / "out", device="cpu", **arguments)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["clip", "photos"]


def test_weights_to_start_from_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = write_bundle(tmp_path / "b")
    forbid_decoding(monkeypatch)
    with pytest.raises(MvmrError, match=r"does not fit: keys .* missing"):
        mvmr.pretrain(photos(tmp_path / "photos", 8), tmp_path / "out", init=sample.path, device="cpu")  # a ResNet50
