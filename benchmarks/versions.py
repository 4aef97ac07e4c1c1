"""Two versions of mvmr at the same work, in turn: the one installed here, and one that another interpreter has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import measure
import psutil

against = click.option(
    "--against", type=click.Path(path_type=Path), metavar="PYTHON",
    help="Compare with the mvmr that this interpreter has installed, and with nothing else.",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What images have cost: how many came a second, and how long one kept a core busy, in all processes."""

    images_per_s: float
    processor_ms: float


def command(python: Path | None, *arguments: str) -> list[str]:
    """Run Python, this one or another, with what is installed there: the folder we are in holds this version."""
    return [str(python or sys.executable), "-P", *arguments]


def processor_seconds(process: psutil.Process) -> dict[int, float]:
    """What a process and all its descendants have taken of the cores so far, by number."""
    found = {}
    for each in [process, *process.children(recursive=True)]:
        try:
            found[each.pid] = float(sum(each.cpu_times()[:2]))
        except psutil.NoSuchProcess:
            continue
    return found


def compare(
    here: Callable[[], Cost], there: Callable[[], Cost], rounds: int, label: str
) -> dict[str, dict[str, measure.Spread]]:
    """Both once a round, each in turn first; ratios are this version's to the other's, round by round."""
    works, costs = {"here": here, "there": there}, dict[str, list[Cost]](here=[], there=[])
    for number in measure.shown(range(rounds), label):
        for name in sorted(works, reverse=bool(number % 2)):
            costs[name].append(works[name]())
    found = {}
    for value in ("images_per_s", "processor_ms"):
        mine, other = (measure.Spread.of([getattr(cost, value) for cost in costs[name]]) for name in works)
        found[value] = {"here": mine, "there": other, "ratio": measure.ratio(mine, other)}
    return found


def save(
    name: str,
    compared: dict[str, dict[str, dict[str, measure.Spread]]],
    settings: dict[str, Any],
    wait: measure.CoreWait,
    out: Path,
) -> None:
    """Print medians of every case, with the least and the most of all rounds, and write the JSON."""
    console = measure.output()
    for case, values in compared.items():
        for value, sides in values.items():
            for side, spread in sides.items():
                extremes = f"{min(spread.rounds):.4g}-{max(spread.rounds):.4g}"
                console.print(f"{case:<5} {value:<13} {side:<6} {spread.median:.4g} ({extremes})")
    result = {"settings": settings, "cases": compared, "machine": measure.machine("cpu"), "core_wait": wait.share()}
    measure.save(f"{name}_versions", result, out, console)
