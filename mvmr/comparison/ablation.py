"""The paper's ablations: every row of a grid trained and measured alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from mvmr.comparison.engine import Study, carry_out
from mvmr.comparison.grids import check_free, rows_of
from mvmr.comparison.results import Result
from mvmr.progress import is_wanted
from mvmr.training.shorthands import Shorthands, assignments


def ablate(
    grid: str,
    data: str,
    out: str | os.PathLike[str],
    *,
    seeds: int = 1,
    recipe: str | Path = "paper",
    assign: Sequence[str] = (),
    only: str | None = None,
    keep: bool = False,
    device: str = "auto",
    devices: int = 1,
    max_unreadable: float = 0.01,
    progress: bool | None = None,
    **settings: Unpack[Shorthands],
) -> list[Result]:
    """Train every row of a grid and measure it; see :func:`mvmr.comparison.engine.carry_out`.

    Args:
        grid: a name of :data:`mvmr.comparison.grids.GRIDS`.
        out: folder of the results; bundles are in ``out``/runs while they are needed.
        seeds: every row is trained with seeds 0 to ``seeds`` - 1; more may be asked for later.
        recipe, assign: what all rows have in common: a recipe's name or file, and changes to it.
        only: the rows whose label matches this glob, or where none does, contains it.
        keep: keep the bundles of all runs; otherwise each is deleted once it is measured.
        device, devices, max_unreadable, progress, settings: as in :func:`mvmr.pretrain`.

    Raises:
        MvmrError: an unknown grid or row, an assignment that rows decide; and as ``carry_out``.
    """
    progress = is_wanted(progress)
    rows, changes = rows_of(grid, only), (*assignments(settings), *assign)
    check_free([*rows_of(grid)], changes, f"grid {grid}")
    study = Study(
        kind="ablation", settings={"grid": grid}, command=lambda _: ["ablate", "--grid", grid],
        rows=rows, recipe=recipe, changes=changes,
    )  # fmt: skip
    return carry_out(
        study, data, out, seeds=seeds, keep=keep, device=device, devices=devices, max_unreadable=max_unreadable,
        progress=progress,
    )  # fmt: skip
