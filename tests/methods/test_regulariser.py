"""MV-MR's third term beside any method: its weights, in training, and where it can't be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvmr.errors import MvmrError
from mvmr.methods.parts.dependence import distance_correlation
from mvmr.methods.regulariser import RegulariserConfig, regularise
from mvmr.training.pretraining import pretrain
from mvmr.training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


def test_terms_are_one_less_the_distance_correlation() -> None:
    random = np.random.default_rng(0)
    h, hog, pixels = (torch.tensor(random.normal(size=(12, width))).float() for width in (5, 7, 3))
    config = RegulariserConfig(representations={"hog": 0.5, "pixels": 2.0, "local_std": 0.0})
    terms = regularise(config, h, {"hog": hog, "pixels": pixels})
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(
        {
            "dcor.hog": 0.5 * (1 - float(distance_correlation(h, hog))),
            "dcor.pixels": 2 * (1 - float(distance_correlation(h, pixels))),
        }
    )


def test_without_representations_there_is_no_term() -> None:
    assert regularise(RegulariserConfig(), torch.ones(3, 2), {}) == {}


def test_any_method_is_trained_with_it(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(16):
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / f"photos/{number}.png")
    bundle = pretrain(
        str(tmp_path / "photos"),
        tmp_path / "out",
        device="cpu",
        assign=[
            "method.name=simclr", "method.projector=[8]", "objective.representations.local_std=0.5",
            "objective.representations.pixels=1", "student.backbone=resnet18_025", "views.size=16", "train.epochs=1",
            "train.batch_size=8", "train.workers=0", "train.log_steps=1",
        ],
    )  # fmt: skip
    last = json.loads((bundle.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"nt_xent", "dcor.local_std", "dcor.pixels"} <= last.keys()
    assert last["loss"] == pytest.approx(last["nt_xent"] + last["dcor.local_std"] + last["dcor.pixels"], rel=1e-4)
    assert 0 < last["dcor.pixels"] < 1


@pytest.mark.parametrize(
    ("assign", "message"),
    [
        (["objective.representations.hog=0.5"], r"\[objective\] is for other methods: .*\[method\.representations\]"),
        (["method.name=byol", "objective.representations.hog=-1"], r"representations\.hog = -1\.0: a weight"),
        (["method.name=byol", "objective.representations.augmented_pixels=1"], "one of method mvmr alone"),
    ],
)
def test_what_cannot_be(assign: list[str], message: str) -> None:
    with pytest.raises(MvmrError, match=message):
        load_recipe("default", "mvmr", assign)


def test_an_unknown_representation_is_named_before_training(tmp_path: Path) -> None:
    assign = ["method.name=byol", "objective.representations.hogg=1"]
    with pytest.raises(MvmrError, match=r"unknown representation 'hogg'; did you mean 'hog'"):
        pretrain("sample:digits", tmp_path / "out", assign=assign, device="cpu")


def test_the_unbiased_estimator_takes_four_images() -> None:
    recipe = load_recipe(
        "default", "mvmr",
        ["method.name=byol", "objective.representations.hog=1", "objective.estimator=unbiased"],
    )  # fmt: skip
    assert recipe.smallest_batch == 4
