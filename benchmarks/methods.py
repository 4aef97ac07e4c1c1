"""A step of each method beside plain supervised training of the same student: seconds and memory.

    python benchmarks/methods.py               # sizes for this machine's device
    python benchmarks/methods.py --quick       # a student in small

Each method has its default settings, for as many images as `--images` says, and its own number of views; images lie
ready on the device, so that no loading is in the step. What is done between epochs (clusters, labels) is not, either.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import measure
import torch
from lightning_fabric import Fabric
from rich.table import Table
from torch import Tensor, nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.comparison.memory import HighWater, Memory
from mvmr.errors import MvmrError
from mvmr.methods.method import Method, MethodConfig, Setting
from mvmr.methods.supervised import Supervised, SupervisedConfig
from mvmr.methods.table import METHODS, build_method
from mvmr.models.table import open_backbone
from mvmr.representations import AUGMENTED_PIXELS, hand_crafted
from mvmr.training.recipe import load_recipe
from mvmr.training.views import view_side

SUPERVISED = "supervised"
_CLASSES = 1000
_PRELOAD = ("mvmr.training.pretraining", "mvmr.representations.scattering")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all cases have in common; size: of images in pixels; images: in the data that a method is set for."""

    device: str
    threads: int
    student: str
    size: int
    batch: int
    images: int
    precision: str


SIZES = {
    "cuda": {"student": "resnet50", "size": 224, "batch": 128, "rounds": 10},
    "cpu": {"student": "resnet18_025", "size": 32, "batch": 64, "rounds": 5},
    "quick": {"student": "resnet18_025", "size": 32, "batch": 8, "rounds": 2},
}


class Case:
    """A method and its optimiser on the device, with a batch of noise for it."""

    def __init__(self, setup: Setup, name: str) -> None:
        torch.manual_seed(0)
        self.setup, preprocess = setup, Preprocess.for_size(setup.size)
        recipe = load_recipe("default", "mvmr", [f"student.backbone={setup.student}"])
        backbone = open_backbone(recipe.student, setup.size)
        encoder = backbone.build()
        config: MethodConfig
        if name == SUPERVISED:
            config = SupervisedConfig()
            self.method: Method = Supervised(encoder, nn.Linear(backbone.width, _CLASSES), preprocess)
        else:
            config = load_recipe("default", "mvmr", [f"method.name={name}"]).method.settle(setup.images)
            self.method = build_method(config, encoder, Setting(backbone.width, preprocess, setup.images, {}))
        fabric = Fabric(accelerator=setup.device, devices=1, precision=setup.precision)  # type: ignore[arg-type]
        self.fabric, method = fabric, self.method.to(memory_format=torch.channels_last)
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self.module, self.optimizer = fabric.setup(method, torch.optim.AdamW(trained, lr=1e-3, fused=True))
        self.views = {
            spec.name: torch.randint(
                0, 256, (setup.batch, 3, view_side(spec, setup.size), view_side(spec, setup.size)),
                dtype=torch.uint8, device=setup.device,
            )
            for spec in config.views
        } | {"index": torch.arange(setup.batch, device=setup.device) % setup.images}  # fmt: skip
        self.targets = {target: self._target(target, preprocess) for target in config.targets}
        self.count = len(config.views)
        self.done = 0

    def _target(self, name: str, preprocess: Preprocess) -> Tensor:
        if name == "label":
            return torch.arange(self.setup.batch, device=self.setup.device) % _CLASSES
        if name == AUGMENTED_PIXELS:
            return self.views["second"].flatten(1).float() / 255
        return hand_crafted(name, preprocess)(self.views["original"].cpu()).to(self.setup.device)

    def step(self) -> None:
        """What `mvmr.training.trainer.train` does to a batch."""
        terms, _, _ = self.module(self.views, self.targets)
        self.fabric.backward(torch.stack(list(terms.values())).sum())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        self.method.after_step(min(self.done, 10**6 - 1), 10**6)


def memory_of(setup: Setup, name: str) -> Memory:
    """Peak of two steps (the optimiser's state is born in the first), over what the process held before."""
    measure.begin(setup.device, setup.threads)
    water = HighWater(setup.device)
    case = Case(setup, name)
    water.forget()
    case.step()
    case.step()
    return water.read()


def turn(setup: Setup, name: str) -> float:
    """Seconds of a step, after one that doesn't count."""
    gc.collect()
    case = Case(setup, name)
    case.step()
    return measure.seconds_of(case.step, setup.device, measure.enough_calls(case.step, setup.device, 0.3))


@click.command()
@measure.options
@click.option("--student", help="The encoder that is trained.")
@click.option("--size", type=click.IntRange(8), help="Side of images, pixels.")
@click.option("--batch", type=click.IntRange(4), help="Images to a step.")
@click.option("--images", type=click.IntRange(64), default=10_000, show_default=True, help="In the data.")
@click.option("--method", "methods", multiple=True, help="Only this one, and supervised training; may be repeated.")
def main(
    device: str, quick: bool, rounds: int | None, threads: int | None, out: Path, student: str | None,
    size: int | None, batch: int | None, images: int, methods: tuple[str, ...],
) -> None:  # fmt: skip
    """Time and memory of a step of every method; ratios are against supervised training, within this run."""
    threads = measure.begin(device, threads)
    sizes: dict[str, Any] = dict(SIZES["quick" if quick else device if device == "cuda" else "cpu"])
    given = {"student": student, "size": size, "batch": batch, "rounds": rounds}
    sizes |= {key: value for key, value in given.items() if value is not None}
    rounds = sizes.pop("rounds")
    precision = "bf16-mixed" if device == "cuda" else "32-true"
    setup = Setup(device=device, threads=threads, images=images, precision=precision, **sizes)
    names = [SUPERVISED, *(methods or METHODS)]
    try:
        memory = {
            name: measure.alone(device, _PRELOAD, memory_of, setup, name) for name in measure.shown(names, "memory")
        }
        wait = measure.CoreWait()
        seconds = measure.interleave({name: partial(turn, setup, name) for name in names}, rounds, "time")
    except MvmrError as error:
        raise click.ClickException(str(error)) from error
    rows = [
        {
            "method": name,
            "views": Case(setup, name).count,
            "seconds_per_step": seconds[name],
            "images_per_s": seconds[name].map(lambda s: setup.batch / s),
            "seconds_against_supervised": measure.ratio(seconds[name], seconds[SUPERVISED]),
            "memory_mib": memory[name],
            "memory_against_supervised": round(memory[name].added / memory[SUPERVISED].added, 2),
        }
        for name in names
    ]
    console = measure.output()
    table = Table("method", "views", "images/s", "seconds / supervised", "MiB", "MiB / supervised")
    for row in rows:
        figures = f"{row['memory_mib'].added:,.0f}", f"{row['memory_against_supervised']:.1f}"
        table.add_row(
            row["method"], str(row["views"]), str(row["images_per_s"]), str(row["seconds_against_supervised"]), *figures
        )
    console.print(table)
    settings = {**sizes, "images": images, "precision": precision, "rounds": rounds, "quick": quick}
    result = {"machine": measure.machine(device), "settings": settings, "core_wait": wait.share(), "rows": rows}
    measure.save("methods", result, out, console)


if __name__ == "__main__":
    main()
