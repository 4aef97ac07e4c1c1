"""Time and memory of the dependence loss by batch and width, against plain ways to write it and against MSE.

    python benchmarks/objective.py            # sizes for this machine's device
    python benchmarks/objective.py --quick    # seconds on a processor

The loss is what a distillation step has of it: (1 - dCor(z~, z)) + (1 - dCor(z~, teacher)) for z and z~ of the given
width and 512-wide teacher rows; forward, and backward to z and z~, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import measure
import torch
import torch.nn.functional as F
from measure import ratio
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mvmr.comparison.memory import HighWater, Memory
from mvmr.methods.objective import Embeddings, Objective, ObjectiveConfig
from mvmr.methods.parts.dependence import Estimator

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

_PRELOAD = ("mvmr.methods.objective",)
_TEACHER_WIDTH = 512
_NOISE_MIB = 1.0  # of a resident set
_ENOUGH_SECONDS = 0.02  # a sample is the mean of as many calls as take so long


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The grid and the rounds for a kind of device."""

    batches: tuple[int, ...]
    widths: tuple[int, ...]
    rounds: int


SIZES = {
    "cuda": Sizes(batches=(64, 128, 256, 512, 1024), widths=(512, 1024, 2048, 4096, 8192), rounds=15),
    "cpu": Sizes(batches=(64, 256, 1024), widths=(512, 2048, 8192), rounds=5),
    "quick": Sizes(batches=(64, 256), widths=(512, 2048), rounds=3),
}


def ours(estimator: Estimator) -> Loss:
    """The dependence terms of :class:`mvmr.methods.objective.Objective`, and no other."""
    config = ObjectiveConfig(invariance=0, variance=0, representations={"teacher": 1.0}, estimator=estimator)
    objective = Objective(config)

    def loss(z: Tensor, za: Tensor, teacher: Tensor) -> Tensor:
        terms = objective(Embeddings(z, za, z, za), {"teacher": teacher})
        return torch.stack(list(terms.values())).sum()

    return loss


def plain(distances: Callable[[Tensor], Tensor]) -> Loss:
    """The biased loss as the definition reads: a B x B matrix of distances for each of the three, centred by means."""

    def loss(z: Tensor, za: Tensor, teacher: Tensor) -> Tensor:
        a, b, c = (_centre(distances(x)) for x in (za, z, teacher))
        return (1 - _correlation(a, b)) + (1 - _correlation(a, c))

    return loss


def _centre(d: Tensor) -> Tensor:
    return d - d.mean(0, keepdim=True) - d.mean(1, keepdim=True) + d.mean()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    return ((a * b).mean() / ((a * a).mean() * (b * b).mean()).sqrt()).sqrt()


def _cdist(x: Tensor) -> Tensor:
    return torch.cdist(x, x)


def _gram(x: Tensor) -> Tensor:
    squares = x.square().sum(1)
    return (squares[:, None] + squares[None, :] - 2 * x @ x.T).clamp(min=1e-4).sqrt()  # or its gradient is infinite


def _mse(z: Tensor, za: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(za, z)


LOSSES: dict[str, Loss] = {
    "mse": _mse,
    "biased": ours("biased"),
    "unbiased": ours("unbiased"),
    "cdist": plain(_cdist),
    "gram": plain(_gram),
}
# Ours against the ways to write the same number; the cost beside the cheapest loss there is.
COMPARISONS = (("biased", "cdist"), ("biased", "gram"), ("unbiased", "biased"), ("biased", "mse"))
# The plain ways must compute what ours does, or their time says nothing; cdist's own rounding is the larger part.
_TOLERANCE = 5e-3


class Work:
    """One loss on one batch: a call is a forward and a backward pass."""

    def __init__(self, loss: Loss, batch: int, width: int, device: str):
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator)
        z = draw(batch, width)
        teacher = z[:, :_TEACHER_WIDTH] if width >= _TEACHER_WIDTH else draw(batch, _TEACHER_WIDTH)
        self.loss, self.teacher = loss, (teacher + draw(teacher.shape)).to(device)
        self.z = z.to(device).requires_grad_()
        self.za = (z + 0.5 * draw(batch, width)).to(device).requires_grad_()

    def __call__(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(self.z, self.za, self.teacher), (self.z, self.za))

    def value(self) -> float:
        """The loss."""
        with torch.no_grad():
            return float(self.loss(self.z, self.za, self.teacher))


def memory_of(name: str, batch: int, width: int, device: str, threads: int) -> Memory:
    """Peak of one call, over what the process held before: the inputs, and what a first small call leaves."""
    measure.begin(device, threads)
    Work(LOSSES[name], 32, 32, device)()
    work = Work(LOSSES[name], batch, width, device)
    water = HighWater(device)
    work()
    return water.read()


def cell(batch: int, width: int, device: str, threads: int, rounds: int) -> dict[str, Any]:
    """All losses at one batch and width."""
    names = list(LOSSES)
    memory = {name: measure.alone(device, _PRELOAD, memory_of, name, batch, width, device, threads) for name in names}
    works = {name: Work(loss, batch, width, device) for name, loss in LOSSES.items()}
    values = {name: work.value() for name, work in works.items()}
    for name in ("cdist", "gram"):
        if not abs(values[name] - values["biased"]) < _TOLERANCE:
            raise RuntimeError(f"{name} computes {values[name]}, not {values['biased']}: nothing to compare")
    calls = {name: measure.enough_calls(work, device, _ENOUGH_SECONDS) for name, work in works.items()}
    turns = {name: partial(measure.seconds_of, work, device, calls[name]) for name, work in works.items()}
    wait = measure.CoreWait()
    seconds = measure.interleave(turns, rounds, f"batch {batch}, width {width}")
    core_wait = wait.share()
    return {
        "batch": batch,
        "width": width,
        "core_wait": core_wait,
        "losses": {
            name: {
                "value": round(values[name], 6),
                "calls": calls[name],
                "milliseconds": seconds[name].map(lambda s: s * 1e3),
                "memory_mib": memory[name],
            }
            for name in names
        },
        "time_ratios": {f"{of} / {to}": ratio(seconds[of], seconds[to]) for of, to in COMPARISONS},
        "memory_ratios": {f"{of} / {to}": _quotient(memory[of].added, memory[to].added) for of, to in COMPARISONS},
    }


def _quotient(of: float, to: float) -> float | None:
    return round(of / to, 4) if min(of, to) >= _NOISE_MIB else None


def show(result: dict[str, Any], console: Console) -> None:
    """Two tables: time and memory."""
    slug, rounds = result["machine"]["slug"], result["settings"]["rounds"]
    ratios = [f"{of} / {to}" for of, to in COMPARISONS]
    title = f"Dependence loss on {slug}, forward and backward, milliseconds"
    caption = f"Medians of {rounds} interleaved rounds (quartiles of ratios). cdist, gram: plain ways to write biased."
    table = Table("batch", "width", *LOSSES, *ratios, title=title, caption=caption, title_justify="left")
    for row in result["cells"]:
        times = [f"{loss['milliseconds'].median:.3g}" for loss in row["losses"].values()]
        table.add_row(str(row["batch"]), str(row["width"]), *times, *(str(r) for r in row["time_ratios"].values()))
    console.print(table)
    title = "The same, MiB at the peak over what the process held with the inputs made"
    table = Table("batch", "width", *LOSSES, *ratios, title=title, title_justify="left")
    for row in result["cells"]:
        peaks = [f"{loss['memory_mib'].added:.1f}" for loss in row["losses"].values()]
        quotients = ["-" if r is None else f"{r:.2f}" for r in row["memory_ratios"].values()]
        table.add_row(str(row["batch"]), str(row["width"]), *peaks, *quotients)
    console.print(table)


@click.command()
@measure.options
@click.option("--batch", "batches", type=click.IntRange(4), multiple=True, help="Images to a batch; repeat for more.")
@click.option("--width", "widths", type=click.IntRange(1), multiple=True, help="Width of z; repeat for more.")
def main(
    device: str, quick: bool, rounds: int | None, threads: int | None, out: Path,
    batches: tuple[int, ...], widths: tuple[int, ...],
) -> None:  # fmt: skip
    """Time and memory of the dependence loss, forward and backward, against plain ways to write it and MSE."""
    used = measure.begin(device, threads)
    sizes = SIZES["quick" if quick else device if device == "cuda" else "cpu"]
    rounds = rounds or sizes.rounds
    machine = measure.machine(device)
    grid = [(batch, width) for batch in batches or sizes.batches for width in widths or sizes.widths]
    cells = [cell(batch, width, device, used, rounds) for batch, width in grid]
    settings = {"teacher_width": _TEACHER_WIDTH, "dtype": "float32", "rounds": rounds, "quick": quick}
    core_wait = max((cell["core_wait"] or 0) for cell in cells)
    result = {"machine": machine, "settings": settings, "core_wait": core_wait, "cells": cells}
    console = measure.output()
    show(result, console)
    measure.save("objective", result, out, console)


if __name__ == "__main__":
    main()
