"""The checkpoint of a run in progress: whole or not there, and enough to end with the weights of an undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from mvmr.errors import MvmrError
from mvmr.storage.atomic import atomic, write_text

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # seconds, of which reading a recipe needs none

NAME = "checkpoint.pt"
METRICS = "metrics.jsonl"


def save(folder: Path, step: int, learner: nn.Module, optimizer: Optimizer, fabric: Fabric) -> None:
    """Write the checkpoint of ``step`` over the last one; on rank 0 only.

    Raises:
        MvmrError: a weight is not finite (the last good checkpoint stays), or the disk is full.
    """
    if not fabric.is_global_zero:
        return
    weights = learner.state_dict()
    if bad := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
        raise MvmrError(f"{bad[0]} is not finite after step {step}; {cure(folder)}")
    state = {
        "step": step,
        "learner": weights,
        "optimizer": optimizer.state_dict(),
        "precision": fabric.strategy.precision.state_dict(),  # the loss scale of 16-mixed
    }
    with atomic(folder / NAME) as temporary:
        torch.save(state, temporary)


def restore(folder: Path, learner: nn.Module, optimizer: Optimizer, fabric: Fabric) -> int:
    """Load the checkpoint of ``folder`` if it has one, and return its step (0 without)."""
    if not (folder / NAME).exists():
        return 0
    state = _read(folder)
    learner.load_state_dict(state["learner"])
    optimizer.load_state_dict(state["optimizer"])
    if state["precision"]:  # empty when it was saved in another precision than 16-mixed
        fabric.strategy.precision.load_state_dict(state["precision"])
    return int(state["step"])


def saved_step(folder: Path) -> int | None:
    """The step of the checkpoint in ``folder``, or None."""
    return int(_read(folder)["step"]) if (folder / NAME).exists() else None


def cure(folder: Path) -> str:
    """What to do where training has gone astray."""
    step = saved_step(folder)
    state = f"the checkpoint of step {step} in {folder} is kept: --resume" if step else "nothing was saved: --overwrite"
    return f"{state} with a lower learning rate (--lr), --clip-grad 1 or --precision 32-true"


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines a killed run wrote after its last checkpoint: they are about to be written again."""
    if path.exists():
        lines = path.read_text().splitlines()
        remaining = [line for line in lines if _is_whole(line) and json.loads(line)["step"] <= step]
        write_text(path, "".join(f"{line}\n" for line in remaining))


def _is_whole(line: str) -> bool:
    return line.endswith("}")


def _read(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(folder / NAME, map_location="cpu", weights_only=True)
    except Exception as error:
        raise MvmrError(
            f"{folder / NAME} can't be read ({type(error).__name__}): start over with --overwrite"
        ) from error
    return state
