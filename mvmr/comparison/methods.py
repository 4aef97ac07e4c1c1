"""Methods side by side: each trained under one budget on the same images, and an encoder that has learned nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from mvmr.comparison.engine import Study, carry_out
from mvmr.comparison.grids import Row, check_free
from mvmr.comparison.results import Result
from mvmr.errors import MvmrError, unknown
from mvmr.methods.table import METHODS
from mvmr.progress import is_wanted
from mvmr.training.shorthands import Shorthands, assignments

RANDOM = Row("random encoder", ("method.name=simclr", "train.epochs=0"))
_SECTIONS = ("student", "views", "method", "objective", "train")
_COMMON = ("method.name", "train.seed", "views.background")


def compare(
    methods: str,
    data: str,
    out: str | os.PathLike[str],
    *,
    seeds: int = 1,
    recipe: str | Path = "default",
    assign: Sequence[str] = (),
    keep: bool = False,
    device: str = "auto",
    devices: int = 1,
    max_unreadable: float = 0.01,
    progress: bool | None = None,
    **settings: Unpack[Shorthands],
) -> list[Result]:
    """Train each of several methods and measure it; see :func:`mvmr.comparison.engine.carry_out`.

    Args:
        methods: names separated by commas, each with settings of its own if there are any: ``"mvmr,simclr,
            lejepa spread=energy,byol objective.representations.hog=0.5"``; more may be asked for later.
        out: folder of the results; bundles are in ``out``/runs while they are needed.
        seeds: every method is trained with seeds 0 to ``seeds`` - 1; more may be asked for later.
        recipe, assign: what all methods have in common: a recipe's name or file, and changes to it.
        keep: keep the bundles of all runs; otherwise each is deleted once it is measured.
        device, devices, max_unreadable, progress, settings: as in :func:`mvmr.pretrain`.

    Raises:
        MvmrError: an unknown method, one that is named twice, an assignment that rows decide; and as ``carry_out``.
    """
    progress = is_wanted(progress)
    rows, changes = parse_methods(methods), (*assignments(settings), *assign)
    check_free(
        [RANDOM, *(Row(row.label, row.assignments[:1]) for row in rows)], changes, "a comparison", but="train.epochs"
    )
    study = Study(
        kind="comparison", settings={}, command=_command, rows=(RANDOM, *rows), own=("method",), recipe=recipe,
        changes=changes,
    )  # fmt: skip
    return carry_out(
        study, data, out, seeds=seeds, keep=keep, device=device, devices=devices, max_unreadable=max_unreadable,
        progress=progress,
    )  # fmt: skip


def _command(labels: Sequence[str]) -> list[str]:
    return ["compare", "--methods", ",".join(label for label in labels if label != RANDOM.label)]


def parse_methods(text: str) -> tuple[Row, ...]:
    """Rows of a comparison from ``NAME [KEY=VALUE ...], ...``; a key without a section is one of the method's.

    Raises:
        MvmrError: an unknown method, a setting that is none or can't be a row's own, or the same row twice.
    """
    rows = []
    for entry in re.split(r",(?![^\[{]*[\]}])", text):  # not inside [ ] and { }
        name, *settings = entry.split() or [""]
        if name not in METHODS:
            raise unknown("method", name, METHODS)
        if odd := [setting for setting in settings if not re.match(r"[\w.]+=.", setting)]:
            raise MvmrError(f"method {name}: {odd[0]!r} is no KEY=VALUE, such as temperature=0.2 (without a space)")
        keys = [setting if setting.partition(".")[0] in _SECTIONS else f"method.{setting}" for setting in settings]
        if common := [key for key in keys if key.partition("=")[0] in _COMMON]:
            raise MvmrError(f"method {name}: {common[0].partition('=')[0]} is the same for all rows")
        rows.append(Row(" ".join([name, *settings]), (f"method.name={name}", *keys)))
    labels = [row.label for row in rows]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise MvmrError(f"{twice[0]!r} is named twice: name every row once")
    return tuple(rows)
