"""The folder a run works in, `OUT.partial`: claimed once, resumed only by the run that made it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvmr.errors import MvmrError
from mvmr.files import write_json

_DESCRIPTION = "run.json"


def open_run(out: Path, run: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Path:
    """Make or resume the working folder of the bundle ``out``, described by ``run`` (JSON values).

    Raises:
        MvmrError: ``out`` exists or holds an interrupted run and neither ``resume`` nor ``overwrite`` was given;
            ``out`` is no bundle at all (never overwritten); or the interrupted run is another one.
    """
    folder = out.with_name(f"{out.name}.partial")
    if out.exists() and not (out / "bundle.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise MvmrError(f"{out} exists and is no bundle; nothing of it is touched: give another --out")
    if (out / "bundle.json").exists() and not overwrite:
        raise MvmrError(f"{out} holds a finished bundle: give another --out, or --overwrite to replace it")
    wanted = json.loads(json.dumps(run))
    if (folder / _DESCRIPTION).exists() and not overwrite:
        if not resume:
            raise MvmrError(f"{folder} holds an interrupted run: give --resume to go on or --overwrite to start over")
        held = json.loads((folder / _DESCRIPTION).read_text())
        if different := sorted(_differences(held, wanted)):
            raise MvmrError(
                f"{folder} holds another run, it differs in {'; '.join(different[:4])}: "
                "give the arguments it was started with, or --overwrite to start over"
            )
        return folder
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(folder / _DESCRIPTION, wanted)
    return folder


def _differences(held: Any, wanted: Any, at: str = "") -> list[str]:
    if isinstance(held, dict) and isinstance(wanted, dict):
        keys = {**held, **wanted}
        inside = [_differences(held.get(k), wanted.get(k), f"{at}.{k}" if at else k) for k in keys]
        return [line for lines in inside for line in lines]
    return [] if held == wanted else [f"{at} ({held!r} there, {wanted!r} now)"]
