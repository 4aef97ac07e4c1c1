"""The folder a run works in, `OUT.partial`: claimed once, resumed only by the run that made it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvmr.bundles import manifest
from mvmr.errors import MvmrError
from mvmr.storage import lock, staging
from mvmr.storage.atomic import write_json
from mvmr.storage.lock import LOCK
from mvmr.storage.runs import check_same, differences
from mvmr.training import checkpoint

_DESCRIPTION = "run.json"
# No weight depends on these.
_FREE = frozenset(f"recipe.train.{name}" for name in ("workers", "cache_gb", "checkpoint_steps", "log_steps"))
_FREE_OF_A_TEACHER = ("weights", "what", "beside")  # where they lie; what they are is in the teacher's identity
# What gets a run past a loss that is not finite. A change is noted in the run's description.
_STEERING = frozenset(f"recipe.train.{name}" for name in ("lr", "clip_grad", "precision"))


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a run works, and what it is."""

    path: Path
    description: dict[str, Any]  # JSON values, with the changes made on resuming under "changes"
    fresh: bool  # starts over; what an earlier run left in `path` goes
    published: bool = False  # `path` is the bundle that this very run has made: nothing is left to do

    @property
    def finished(self) -> bool:
        """Whether only the renaming is left to do: the run was killed between its last step and the end."""
        return not self.fresh and (self.path / manifest.NAME).exists()


def find_run(out: Path, run: Mapping[str, Any], *, resume: bool, overwrite: bool) -> RunFolder:
    """Where the run described by ``run`` (JSON values) makes the bundle ``out``; looks only, changes nothing.

    Raises:
        MvmrError: ``out`` exists or holds an interrupted run and neither ``resume`` nor ``overwrite`` was given;
            ``out`` or its working folder is something else altogether (never overwritten); or the run to resume,
            interrupted or finished, is another one.
    """
    if resume and overwrite:
        raise MvmrError("--resume goes on with a run and --overwrite starts over: give one of them")
    out = out.absolute()
    if not out.name or out.name == "..":
        raise MvmrError(f"{out} can't be the folder of a bundle: give the name of a new folder, such as runs/mine")
    folder = out.with_name(f"{out.name}.partial")
    interrupted = (folder / _DESCRIPTION).exists()
    if _exists(out) and not (out / manifest.NAME).exists() and (not out.is_dir() or any(out.iterdir())):
        raise MvmrError(f"{out} exists and is no bundle; nothing of it is touched: give another --out")
    if _exists(folder) and not interrupted and (not folder.is_dir() or not all(map(_left_over, folder.iterdir()))):
        raise MvmrError(f"{folder} exists and holds no run; nothing of it is touched: give another --out")
    if (out / manifest.NAME).exists() and not overwrite and not resume:
        raise MvmrError(f"{out} holds a finished bundle: give another --out, or --overwrite to replace it")
    if interrupted and not overwrite and not resume:
        raise MvmrError(f"{folder} holds an interrupted run: give --resume to go on or --overwrite to start over")
    description: dict[str, Any] = json.loads(json.dumps(run))
    if resume and interrupted:
        return RunFolder(path=folder, description=_resume(folder, description, _STEERING), fresh=False)
    if resume and (out / manifest.NAME).exists():
        return RunFolder(path=out, description=_resume(out, description, frozenset()), fresh=False, published=True)
    return RunFolder(path=folder, description=description, fresh=True)


@contextmanager
def claim(run: RunFolder) -> Iterator[None]:
    """Make the working folder and keep other processes out of it; on one rank only, after every rank has found it.

    Raises:
        MvmrError: the folder can't be made, or another process works in it.
    """
    with lock.claim(run.path, "training"):
        if run.fresh:
            _empty(run.path)
        staging.sweep(run.path)
        write_json(run.path / _DESCRIPTION, run.description)
        yield


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def give_up(run: RunFolder) -> None:
    """Remove a working folder in which nothing was learned: a run refused late leaves nothing behind."""
    if not any((run.path / name).exists() for name in (checkpoint.NAME, checkpoint.METRICS, manifest.NAME)):
        shutil.rmtree(run.path, ignore_errors=True)


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a link to nowhere is there, too


def _left_over(entry: Path) -> bool:
    """Whether a killed process left it (the lock, `atomic`'s file): all a run has before its description."""
    is_ours = entry.name == LOCK or (entry.name.startswith(".") and ".partial" in entry.name)
    return is_ours and entry.is_file()


def _resume(folder: Path, description: dict[str, Any], steering: frozenset[str]) -> dict[str, Any]:
    """The description of the run in ``folder``, gone on with as ``description``; ``steering`` may differ."""
    try:
        old: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        old = _in_todays_words(old)
        changes = old.pop("changes", [])
        differing = differences(old, description)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise MvmrError(f"{folder / _DESCRIPTION} can't be read: start over with --overwrite") from error
    decisive = {at: values for at, values in differing.items() if not _is_free(at) and at not in steering}
    check_same(folder, decisive, cure="--overwrite to start over")
    steering_changes = {at: values for at, values in differing.items() if at in steering}
    if steering_changes:
        texts = {at: f"{before!r} -> {after!r}" for at, (before, after) in steering_changes.items()}
        changes.append({"step": checkpoint.saved_step(folder) or 0, **texts})
    return description | ({"changes": changes} if changes else {})


def _in_todays_words(old: dict[str, Any]) -> dict[str, Any]:
    """A description of before there were several methods, more than ResNets, or terms beside a method's, as of now."""
    recipe = dict(old["recipe"])
    if not {"model", "method"} & recipe.keys():  # of a fine-tuning
        return old
    if "model" in recipe:
        model, objective = recipe.pop("model"), recipe.pop("objective")
        recipe["student"] = {"backbone": model["architecture"], "small_kernel": model["small_kernel"]}
        recipe["method"] = {"name": "mvmr", "projector": recipe.pop("projector"), **objective}
    recipe.setdefault("objective", {"representations": {}, "estimator": "biased"})
    if recipe["method"].get("regression") == {}:  # of before that was a method of its own
        recipe["method"] = {key: value for key, value in recipe["method"].items() if key != "regression"}
    return {**old, "method": recipe["method"]["name"], "recipe": recipe}


def _is_free(at: str) -> bool:
    kind, _, key = at.partition(".")
    return at in _FREE or (kind == "teachers" and key.rpartition(".")[2] in _FREE_OF_A_TEACHER)
