"""What a command can't do is one line, and nothing is left of it."""

import os
import shutil
from pathlib import Path

import pytest

from tests.cli.commands import arguments, mvmr, refusal

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "papr"], "unknown recipe 'papr'; did you mean 'paper'?"),
        (["--recipe", "gone.toml"], "recipe file gone.toml does not exist"),
        (["--set", "train.lrr=1"], "unknown key 'train.lrr', did you mean 'lr'?"),
        (["--set", "train.lrr=1", "--epochs", "many"], "train.epochs = 'many' should be a whole number"),
        (["--set", "nonsense"], "cannot read assignment 'nonsense'; write KEY=VALUE"),
        (["--data", "gone"], "gone does not exist"),
        (["--data", "sample:patch"], "did you mean 'sample:patches'?"),
        (["--data", "stl10:gone"], "is missing"),
        (["--data", "nothing"], "holds nothing; give a folder with images"),
        (["--data", "texts"], "holds 1 other files, but no images"),
        (["--data", "recipe.toml"], "is a file, not a folder"),
        (["--max-unreadable", "0.01"], "3 of 38 image files"),
        (["--max-unreadable", "7"], "max_unreadable = 7.0 must lie between 0 and 1"),
        (["--batch-size", "1"], "batch_size = 1: the method compares the images of a batch"),
        (["--batch-size", "36"], "a step takes 36 images and the data have 35: give --batch-size 35 or less"),
        (["--student", "resnet19"], "unknown student 'resnet19'; did you mean 'resnet18'?"),
        (["--size", "0"], "crop = 0 must lie between 1 and"),
        (["--workers=-1"], "workers = -1: must be 0 or more"),
        (["--seed=-1"], "seed = -1: must lie between 0 and"),
        (["--precision", "fp8"], "should be one of 32-true, bf16-mixed, 16-mixed"),
        (["--device", "cpuu"], "cannot use 1 of device 'cpuu'"),
        (["--init", "gone.pt"], "weights file gone.pt not found"),
        (["--init", "texts"], "texts is not a bundle"),
        (["--out", "texts"], "texts exists and is no bundle; nothing of it is touched"),
        (["--out", "recipe.toml"], "recipe.toml exists and is no bundle; nothing of it is touched"),
        (["--out", "recipe.toml/x"], "cannot make"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--set", "method.representations={hgo=1}"], "unknown representation 'hgo'; did you mean 'hog'?"),
        (["--set", "views.policy=crop+fip"], "unknown view policy or step 'fip'; did you mean 'flip'?"),
        (["--lr", "1e30", "--epochs", "1"], "is not finite"),
    ],
)  # fmt: skip
def test_pretrain_says_what_is_wrong_in_one_line(
    photos: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("nothing", "texts"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("mine")
    shutil.copy(recipe, "recipe.toml")
    assert message in refusal(mvmr("pretrain", *arguments(photos, recipe, tmp_path / "out", *more)))
    left = set(os.listdir(tmp_path)) - {"out.partial"} if "--lr" in more else set(os.listdir(tmp_path))
    assert left == {"nothing", "texts", "recipe.toml"}
    assert os.listdir(tmp_path / "texts") == ["a.txt"]


@pytest.mark.parametrize("command", ["info", "evaluate", "probe"])
@pytest.mark.parametrize(
    ("bundle", "message"),
    [
        ("gone", "no bundle at gone: there is no such folder"),
        ("empty", "empty is not a bundle"),
        ("half.partial", "its run has not finished"),
        (None, "no bundle below runs; give one, or make one with"),
    ],
)
def test_a_bundle_that_is_not_there_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, bundle: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "half.partial").mkdir()
    data = [] if command == "info" else ["--data", str(photos)]
    assert message in refusal(mvmr(command, *([bundle] if bundle else []), *data))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--teacher", "ViT-B-61"], "unknown teacher 'ViT-B-61'; did you mean 'ViT-B-16'?"),
        (["--teacher", "ViT-B-16", "--pretrained", "opnai"], "'opnai'; did you mean 'openai'?"),
        (["--teacher", "nothing"], "has no open_clip_config.json"),
        (["--teacher", "ViT-B-16", "--pretrained", "gone.safetensors"], "gone.safetensors"),
    ],
)
def test_distill_says_what_is_wrong_in_one_line(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    result = mvmr("distill", *argv, "--recipe", "paper", "--data", "sample:digits", "--out", "out", "--device", "cpu")
    assert message in refusal(result)
    assert os.listdir(tmp_path) == ["nothing"]
