"""The folder a run works in, `OUT.partial`: claimed once, resumed only by the run that made it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvmr import checkpoint, manifest, staging
from mvmr.errors import MvmrError
from mvmr.files import write_json

_DESCRIPTION = "run.json"
# No weight depends on these.
_FREE = frozenset(f"recipe.train.{name}" for name in ("workers", "cache_gb", "checkpoint_steps", "log_steps"))
# What gets a run past a loss that is not finite. A change is noted in the run's description.
_STEERING = frozenset(f"recipe.train.{name}" for name in ("lr", "clip_grad", "precision"))


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a run works, and what it is."""

    path: Path
    description: dict[str, Any]  # JSON values, with the changes made on resuming under "changes"
    fresh: bool  # starts over; what an earlier run left in `path` goes

    @property
    def finished(self) -> bool:
        """Whether only the renaming is left to do: the run was killed between its last step and the end."""
        return not self.fresh and (self.path / manifest.NAME).exists()


def find_run(out: Path, run: Mapping[str, Any], *, resume: bool, overwrite: bool) -> RunFolder:
    """Where the run described by ``run`` (JSON values) makes the bundle ``out``; looks only, changes nothing.

    Raises:
        MvmrError: ``out`` exists or holds an interrupted run and neither ``resume`` nor ``overwrite`` was given;
            ``out`` or its working folder is something else altogether (never overwritten); or the interrupted run is
            another one.
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
    if (out / manifest.NAME).exists() and not overwrite and not (resume and interrupted):
        raise MvmrError(f"{out} holds a finished bundle: give another --out, or --overwrite to replace it")
    if interrupted and not overwrite and not resume:
        raise MvmrError(f"{folder} holds an interrupted run: give --resume to go on or --overwrite to start over")
    wanted: dict[str, Any] = json.loads(json.dumps(run))
    if not (interrupted and resume):
        return RunFolder(path=folder, description=wanted, fresh=True)
    return RunFolder(path=folder, description=_resumed(folder, wanted), fresh=False)


def claim(run: RunFolder) -> None:
    """Make the working folder; on one rank only, after every rank has found it.

    Raises:
        MvmrError: the folder can't be made.
    """
    try:
        if run.fresh and run.path.exists():
            shutil.rmtree(run.path)
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MvmrError(f"cannot make {run.path}: {error.strerror}; give another --out") from error
    staging.sweep(run.path)
    write_json(run.path / _DESCRIPTION, run.description)


def give_up(run: RunFolder) -> None:
    """Remove a working folder in which nothing was learned: a run refused late leaves nothing behind."""
    if not any((run.path / name).exists() for name in (checkpoint.NAME, checkpoint.METRICS, manifest.NAME)):
        shutil.rmtree(run.path, ignore_errors=True)


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a link to nowhere is there, too


def _left_over(entry: Path) -> bool:
    """Whether a process killed in `mvmr.files.atomic` left it: all a run has before its description."""
    return entry.name.startswith(".") and ".partial" in entry.name and entry.is_file()


def _resumed(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The description of the run in ``folder``, gone on with as ``wanted``."""
    try:
        held: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        changes = held.pop("changes", [])
        differences = _differences(held, wanted)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise MvmrError(f"{folder / _DESCRIPTION} can't be read: start over with --overwrite") from error
    if refused := sorted(_told(*d) for d in differences.items() if d[0] not in _FREE | _STEERING):
        raise MvmrError(
            f"{folder} holds another run, it differs in {'; '.join(refused[:4])}: "
            "give the arguments it was started with, or --overwrite to start over"
        )
    steered = {at: values for at, values in differences.items() if at in _STEERING}
    if steered:
        step = checkpoint.saved_step(folder) or 0
        changes.append({"step": step, **{at: f"{was!r} -> {now!r}" for at, (was, now) in steered.items()}})
    return wanted | ({"changes": changes} if changes else {})


def _differences(held: Any, wanted: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
    """(value there, value now) by the path of every key in which two descriptions differ."""
    if not (isinstance(held, dict) and isinstance(wanted, dict)):
        return {} if held == wanted else {at: (held, wanted)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**held, **wanted}:
        found |= _differences(held.get(key), wanted.get(key), f"{at}.{key}" if at else key)
    return found


def _told(at: str, values: tuple[Any, Any]) -> str:
    return f"{at} ({values[0]!r} there, {values[1]!r} now)"
