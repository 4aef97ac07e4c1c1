"""Keys of a recipe that have an argument, and a flag, of their own; all others are reached by assignments. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from mvmr.errors import nearest

# argument -> key of the recipe it changes
KEYS = {
    "student": "student.backbone",
    "method": "method.name",
    "small_kernel": "student.small_kernel",
    "size": "views.size",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "accumulate": "train.accumulate",
    "lr": "train.lr",
    "clip_grad": "train.clip_grad",
    "precision": "train.precision",
    "workers": "train.workers",
    "seed": "train.seed",
}


class Tuning(TypedDict, total=False):
    """Those of any training; docs/settings.md has their meaning, units and ranges."""

    epochs: int
    batch_size: int
    lr: float
    clip_grad: float | None
    precision: str | None
    workers: int | None
    seed: int


class Shorthands(Tuning, total=False):
    """Those of training a student from unlabelled images."""

    student: str
    method: str
    small_kernel: bool
    size: int | None
    accumulate: int


def assignments(settings: Mapping[str, object]) -> tuple[str, ...]:
    """Arguments such as ``epochs=5`` as assignments to the recipe, ``train.epochs=5``; None stands for "none".

    Raises: TypeError for an argument that is none of them, as Python does.
    """
    for name in settings:
        if name not in KEYS:
            hint = f"; did you mean {suggestion!r}?" if (suggestion := nearest(name, KEYS)) else ""
            raise TypeError(f"unexpected keyword argument {name!r}{hint}")
    words = {True: "true", False: "false", None: "none"}
    return tuple(
        f"{KEYS[name]}={words[value] if value is None or isinstance(value, bool) else value}"
        for name, value in settings.items()
    )
