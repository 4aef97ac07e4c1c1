"""The working folder is claimed once, gone on with by its own run alone, and nothing of the user's is ever touched."""

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mvmr.errors import MvmrError
from mvmr.training.runs import RunFolder, claim, find_run, give_up

RUN: dict[str, Any] = {
    "data": {"name": "photos", "images": 40},
    "recipe": {"train": {"lr": 1e-3, "workers": 2, "seed": 0, "batch_size": 8}, "projector": (16, 16)},
}


def description(**train: Any) -> dict[str, Any]:
    return RUN | {"recipe": {**RUN["recipe"], "train": {**RUN["recipe"]["train"], **train}}}


def start(out: Path, *, resume: bool = False, overwrite: bool = False, **train: Any) -> RunFolder:
    run = find_run(out, description(**train), resume=resume, overwrite=overwrite)
    with claim(run):
        return run


def a_bundle(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "bundle.json").write_text("{}")
    (out / "encoder.safetensors").write_text("old")


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_run_works_beside_its_bundle(tmp_path: Path) -> None:
    run = start(tmp_path / "deep" / "out")
    assert run.path == tmp_path / "deep" / "out.partial"
    assert run.fresh
    assert not run.finished
    assert json.loads((run.path / "run.json").read_text()) == json.loads(json.dumps(RUN))
    assert not (tmp_path / "deep" / "out").exists()


def test_an_empty_out_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert start(tmp_path / "out").fresh


def test_looking_changes_nothing(tmp_path: Path) -> None:
    find_run(tmp_path / "out", RUN, resume=False, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_is_kept_from_a_second_one(tmp_path: Path) -> None:
    (start(tmp_path / "out").path / "checkpoint.pt").write_text("precious")
    with pytest.raises(MvmrError, match=r"out\.partial holds an interrupted run: give --resume .* or --overwrite"):
        start(tmp_path / "out")
    assert start(tmp_path / "out", resume=True).fresh is False
    assert (tmp_path / "out.partial" / "checkpoint.pt").read_text() == "precious"


def test_overwrite_starts_over(tmp_path: Path) -> None:
    (start(tmp_path / "out").path / "checkpoint.pt").write_text("old")
    assert start(tmp_path / "out", overwrite=True, seed=1).fresh
    assert sorted(path.name for path in (tmp_path / "out.partial").iterdir()) == [".lock", "run.json"]


def test_resume_without_an_interrupted_run_starts_one(tmp_path: Path) -> None:
    assert start(tmp_path / "out", resume=True).fresh


def test_resume_and_overwrite_contradict_each_other(tmp_path: Path) -> None:
    (start(tmp_path / "out").path / "checkpoint.pt").write_text("precious")
    with pytest.raises(MvmrError, match="give one of them"):
        start(tmp_path / "out", resume=True, overwrite=True)
    assert (tmp_path / "out.partial" / "checkpoint.pt").read_text() == "precious"


def test_another_run_is_not_gone_on_with_and_the_difference_is_named(tmp_path: Path) -> None:
    start(tmp_path / "out")
    with pytest.raises(MvmrError) as caught:
        start(tmp_path / "out", resume=True, seed=3, batch_size=16)
    message = str(caught.value)
    assert "recipe.train.batch_size (8 there, 16 now); recipe.train.seed (0 there, 3 now)" in message
    assert "give the arguments it was started with, or --overwrite to start over" in message
    with pytest.raises(MvmrError, match=r"data\.images \(40 there, 41 now\)"):
        find_run(tmp_path / "out", RUN | {"data": {"name": "photos", "images": 41}}, resume=True, overwrite=False)


def test_what_decides_no_weight_may_change(tmp_path: Path) -> None:
    start(tmp_path / "out")
    assert "changes" not in start(tmp_path / "out", resume=True, workers=0).description


def test_what_gets_past_a_bad_loss_may_change_and_is_noted(tmp_path: Path) -> None:
    folder = start(tmp_path / "out").path
    torch.save({"step": 7}, folder / "checkpoint.pt")
    changed = start(tmp_path / "out", resume=True, lr=1e-4)
    assert changed.description["changes"] == [{"step": 7, "recipe.train.lr": "0.001 -> 0.0001"}]
    assert changed.description["recipe"]["train"]["lr"] == 1e-4
    again = start(tmp_path / "out", resume=True, lr=1e-4)
    assert again.description == changed.description
    assert len(start(tmp_path / "out", resume=True, lr=1e-5).description["changes"]) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"changes": 3'])
def test_a_broken_description_is_one_line(tmp_path: Path, text: str) -> None:
    (start(tmp_path / "out").path / "run.json").write_text(text)
    with pytest.raises(MvmrError, match=r"run\.json can't be read: start over with --overwrite"):
        start(tmp_path / "out", resume=True)


def test_a_finished_bundle_is_replaced_only_when_told(tmp_path: Path) -> None:
    a_bundle(tmp_path / "out")
    with pytest.raises(MvmrError, match="out holds a finished bundle: give another --out, or --overwrite"):
        start(tmp_path / "out")
    with pytest.raises(MvmrError, match=r"run\.json can't be read: start over with --overwrite"):
        start(tmp_path / "out", resume=True)
    assert not (tmp_path / "out.partial").exists()
    start(tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == {"bundle.json": "{}", "encoder.safetensors": "old"}  # until there is a new one


def test_resuming_a_finished_run_has_nothing_to_do_but_only_if_it_is_the_same(tmp_path: Path) -> None:
    a_bundle(tmp_path / "out")
    (tmp_path / "out" / "run.json").write_text(json.dumps(RUN))
    run = find_run(tmp_path / "out", description(workers=0), resume=True, overwrite=False)
    assert run.published
    assert run.path == tmp_path / "out"
    for name in ("lr", "seed"):  # a new learning rate can steer a run, not a bundle
        with pytest.raises(MvmrError, match=rf"out holds another run, it differs in recipe\.train\.{name}"):
            find_run(tmp_path / "out", description(**{name: 1}), resume=True, overwrite=False)
    assert not (tmp_path / "out.partial").exists()


def test_a_run_that_replaces_a_bundle_can_be_gone_on_with(tmp_path: Path) -> None:
    a_bundle(tmp_path / "out")
    start(tmp_path / "out", overwrite=True)
    assert start(tmp_path / "out", resume=True).fresh is False


def test_a_run_killed_before_its_renaming_is_finished(tmp_path: Path) -> None:
    folder = start(tmp_path / "out").path
    (folder / "bundle.json").write_text("{}")
    assert start(tmp_path / "out", resume=True).finished
    assert not start(tmp_path / "out", overwrite=True).finished


@pytest.mark.parametrize("name", ["out", "out.partial"])
@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("kind", ["folder", "hidden file", "file", "link to nowhere"])
def test_what_is_not_ours_is_never_touched(tmp_path: Path, name: str, flags: dict[str, bool], kind: str) -> None:
    theirs = tmp_path / name
    if kind == "file":
        theirs.write_text("mine")
    elif kind == "link to nowhere":
        theirs.symlink_to(tmp_path / "gone")
    else:
        theirs.mkdir()
        (theirs / (".git" if kind == "hidden file" else "thesis.txt")).write_text("mine")
    before = tree(tmp_path), sorted(os.listdir(tmp_path))
    with pytest.raises(MvmrError, match="nothing of it is touched: give another --out"):
        start(tmp_path / "out", **flags)
    assert (tree(tmp_path), sorted(os.listdir(tmp_path))) == before


def test_what_a_run_killed_at_once_left_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / ".run.0123abcd.partial.json").write_text("{")
    start(tmp_path / "out")
    (folder / ".checkpoint.0123abcd.partial.pt").write_text("half")
    start(tmp_path / "out", resume=True)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "run.json"]


@pytest.mark.parametrize("out", [".", "..", "/", "runs/.."])
def test_a_folder_without_a_name_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "photo.jpg").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    before = tree(tmp_path)
    with pytest.raises(MvmrError):
        start(Path(out))
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MvmrError, match=r"cannot make .*file/out\.partial: .*; give another --out"):
        start(tmp_path / "file" / "out")


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_second_process_is_kept_out_while_the_first_works(tmp_path: Path, flag: str) -> None:
    context = multiprocessing.get_context("fork")  # spawned, it would spend seconds on importing torch

    def said_by_another_process() -> str:
        def begin() -> None:
            try:
                start(tmp_path / "out", **{flag: True})
                answers.put("claimed")
            except MvmrError as error:
                answers.put(str(error))

        answers = context.Queue()
        context.Process(target=begin).start()
        return answers.get(timeout=60)

    run = start(tmp_path / "out")
    with claim(run):
        (run.path / "checkpoint.pt").write_text("precious")
        assert said_by_another_process().startswith(f"another process is training in {run.path}: wait for it")
        assert (run.path / "checkpoint.pt").read_text() == "precious"
    (run.path / "checkpoint.pt").unlink()
    assert said_by_another_process() == "claimed"


def test_giving_up_leaves_nothing_unless_something_was_learned(tmp_path: Path) -> None:
    run = start(tmp_path / "out")
    (run.path / "skipped.txt").write_text("")
    give_up(run)
    assert list(tmp_path.iterdir()) == []
    for name in ("checkpoint.pt", "metrics.jsonl", "bundle.json"):
        run = start(tmp_path / "out", overwrite=True)
        (run.path / name).write_text("")
        give_up(run)
        assert (run.path / name).exists()


BEFORE: dict[str, Any] = {
    "method": "self-supervised MV-MR",
    "data": {"name": "photos", "images": 40},
    "recipe": {
        "name": "paper",
        "model": {"architecture": "resnet18", "small_kernel": True},
        "projector": [16, 16],
        "objective": {"invariance": 1.0, "representations": {"hog": 1.0}},
        "train": {"lr": 1e-3},
    },
}


def test_a_run_of_before_there_were_methods_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "run.json").write_text(json.dumps(BEFORE))
    now = {
        "method": "mvmr",
        "data": {"name": "photos", "images": 40},
        "recipe": {
            "name": "paper",
            "student": {"backbone": "resnet18", "small_kernel": True},
            "method": {"name": "mvmr", "projector": (16, 16), "invariance": 1.0, "representations": {"hog": 1.0}},
            "objective": {"representations": {}, "estimator": "biased"},
            "train": {"lr": 1e-3},
        },
    }
    assert not find_run(tmp_path / "out", now, resume=True, overwrite=False).fresh
    now["recipe"]["method"]["invariance"] = 2.0
    with pytest.raises(MvmrError, match=r"it differs in recipe\.method\.invariance \(1\.0 there, 2\.0 now\)"):
        find_run(tmp_path / "out", now, resume=True, overwrite=False)
