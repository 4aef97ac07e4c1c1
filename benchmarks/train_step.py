"""The distillation step: float32 against bf16, memory formats, the teacher in the loop against cached embeddings.

    python benchmarks/train_step.py            # sizes for this machine's device
    python benchmarks/train_step.py --quick    # a minute on a processor

Of the trainer's own case it also says what it makes of the device: operations a second, beside those of a product of
two large matrices, and the share of the step that the objective takes when it is run alone.

The step is the body of :func:`mvmr.training.trainer.train` on the real learner: forward on both views, objective,
backward, optimiser. Images, and what the teacher would see of them, lie ready on the device: no loading is in it.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
import measure
import open_clip
import torch
from lightning_fabric import Fabric
from measure import ratio
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mvmr.bundles import weights
from mvmr.bundles.preprocess import Preprocess
from mvmr.comparison.memory import HighWater, Memory
from mvmr.config import to_mapping
from mvmr.distillation.teachers.clip import ClipTeacher
from mvmr.errors import MvmrError, unknown
from mvmr.methods.method import Method, Setting
from mvmr.methods.table import build_method
from mvmr.models.table import open_backbone
from mvmr.models.torchvision_resnet import NAMES
from mvmr.representations import AUGMENTED_PIXELS, HAND_CRAFTED, hand_crafted
from mvmr.training.recipe import Recipe, load_recipe

_ENOUGH_SECONDS = 0.02  # of the objective alone, to a sample
_PRELOAD = ("mvmr.distillation.teachers.clip", "mvmr.training.pretraining", "mvmr.representations.scattering")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything the cases have in common."""

    device: str
    threads: int
    size: int  # of the student's images, pixels
    batch: int
    recipe: Recipe
    teacher: str
    teacher_weights: str  # a file
    teacher_dim: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes that mean something on a kind of device and end in reasonable time."""

    student: str
    size: int
    batch: int
    teacher: str
    rounds: int
    steps: int
    warmup: int


SIZES = {
    "cuda": Sizes(student="resnet50", size=224, batch=256, teacher="ViT-B-16", rounds=10, steps=10, warmup=5),
    "cpu": Sizes(student="resnet50", size=64, batch=16, teacher="ViT-B-32", rounds=5, steps=1, warmup=1),
    "quick": Sizes(student="resnet18", size=64, batch=8, teacher="ViT-S-32", rounds=3, steps=1, warmup=1),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to do the same step."""

    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    channels_last: bool = False
    teacher: Literal["in the loop", "cached"] = "cached"


PLAIN = "plain"
CASES = {
    PLAIN: Case(teacher="in the loop"),
    "cached": Case(),
    "cached, channels_last": Case(channels_last=True),
    "cached, bf16": Case(precision="bf16-mixed"),
    "cached, bf16, channels_last": Case(precision="bf16-mixed", channels_last=True),
    "bf16, channels_last": Case(precision="bf16-mixed", channels_last=True, teacher="in the loop"),
}
TRAINER = "cached, bf16, channels_last"
# One change each: the case with it, the case without it.
CHANGES = {
    "caching, float32": ("cached", PLAIN),
    "caching, bf16": ("cached, bf16, channels_last", "bf16, channels_last"),
    "bf16, contiguous": ("cached, bf16", "cached"),
    "bf16, channels_last": ("cached, bf16, channels_last", "cached, channels_last"),
    "channels_last, float32": ("cached, channels_last", "cached"),
    "channels_last, bf16": ("cached, bf16, channels_last", "cached, bf16"),
}


class _Given(nn.Module):
    """Features in the place of an encoder's."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, images: Tensor) -> Tensor:
        return self.rows


class Bench:
    """Learners, a batch, its targets and the teacher, on the device; used by every case in ``cases``."""

    def __init__(self, setup: Setup, cases: Sequence[Case]):
        torch.manual_seed(0)
        self.setup = setup
        shape = (2, setup.batch, 3, setup.size, setup.size)
        self.original, self.augmented = torch.randint(256, shape, dtype=torch.uint8).to(setup.device)
        self.rows = self._rows()
        # A learner for each memory format: turning one back and forth would leave strides of the other behind.
        self.learners = {
            last: self._learner().to(memory_format=torch.channels_last if last else torch.contiguous_format)
            for last in sorted({case.channels_last for case in cases})
        }
        self.teachers = {
            case.precision: ClipTeacher.load(
                setup.teacher,
                setup.teacher_weights,
                device=setup.device,
                weights_dtype=torch.bfloat16 if case.precision == "bf16-mixed" else torch.float32,
            )
            for case in cases
            if case.teacher == "in the loop"
        }

    def _rows(self) -> dict[str, Tensor]:
        """The targets of the batch, computed before: the teacher's random, the others what they are."""
        rows = {"teacher": torch.randn(self.setup.batch, self.setup.teacher_dim).to(self.setup.device)}
        for name in self.setup.recipe.method.targets:
            if name == AUGMENTED_PIXELS:
                rows[name] = self.augmented.flatten(1).float() / 255
            elif name in HAND_CRAFTED:
                rows[name] = hand_crafted(name, Preprocess.for_size(self.setup.size))(self.original)
        return rows

    def _learner(self, encoder: nn.Module | None = None) -> Method:
        """What `pretraining.build_learner` builds of images that are those of the batch."""
        recipe, backbone = self.setup.recipe, open_backbone(self.setup.recipe.student, self.setup.size)
        rows = {name: row.cpu().numpy() for name, row in self.rows.items()}
        setting = Setting(backbone.width, Preprocess.for_size(self.setup.size), self.setup.batch, rows)
        return build_method(recipe.method, encoder or backbone.build(), setting).to(self.setup.device)

    def step(self, case: Case) -> Callable[[], None]:
        """A function that does one step, with an optimiser of its own."""
        train, learner = self.setup.recipe.train, self.learners[case.channels_last]
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
        optimizer = kind(learner.parameters(), lr=train.lr, weight_decay=train.weight_decay)
        fabric = Fabric(accelerator=self.setup.device, devices=1, precision=case.precision)
        module, optimizer = fabric.setup(learner, optimizer)
        module.train()
        targets = self._targets(case)

        def step() -> None:
            terms, _, _ = module({"original": self.original, "augmented": self.augmented}, targets())
            loss = torch.stack(list(terms.values())).sum()
            if not torch.isfinite(loss):
                raise RuntimeError(f"the loss is not finite: {terms}")
            fabric.backward(loss)
            if train.clip_grad is not None:
                fabric.clip_gradients(module, optimizer, max_norm=train.clip_grad, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def objective(self) -> Callable[[], object]:
        """Forward and backward of all that is not the encoder, on features of the step's own shape."""
        width = open_backbone(self.setup.recipe.student, self.setup.size).width
        learner = self._learner(_Given(torch.randn(self.setup.batch, width)))
        trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]

        def once() -> object:
            terms, _, _ = learner({"original": self.original, "augmented": self.augmented}, self.rows)
            return torch.autograd.grad(torch.stack(list(terms.values())).sum(), trained, allow_unused=True)

        return once

    def _targets(self, case: Case) -> Callable[[], dict[str, Tensor]]:
        if case.teacher == "cached":
            return lambda: self.rows
        teacher = self.teachers[case.precision]
        size = teacher.preprocess_cfg.size
        height, width = (size, size) if isinstance(size, int) else size
        seen = torch.randn(self.setup.batch, 3, height, width).to(self.setup.device)
        return lambda: self.rows | {"teacher": teacher(seen)}


def memory_of(setup: Setup, case: Case) -> Memory:
    """Peak of two steps (the optimiser's state is born in the first), over what the process held before the case."""
    measure.begin(setup.device, setup.threads)
    water = HighWater(setup.device)
    step = Bench(setup, [case]).step(case)
    water.forget()  # what reading the teacher's weights took for a moment
    step()
    step()
    return water.read()


def turn(bench: Bench, case: Case, warmup: int, steps: int) -> float:
    """Seconds of a step of this case, after some that don't count."""
    gc.collect()
    step = bench.step(case)
    for _ in range(warmup):
        step()
    return measure.seconds_of(step, bench.setup.device, steps)


def trainer(bench: Bench, seconds: measure.Spread, rounds: int) -> dict[str, Any]:
    """What the trainer's case makes of the device, and what of its step the objective takes."""
    device, matrix = bench.setup.device, measure.matrix_tflops(bench.setup.device, torch.bfloat16)
    step = bench.step(CASES[TRAINER])
    step()
    with FlopCounterMode(display=False) as counted:
        step()
    objective = bench.objective()
    calls = measure.enough_calls(objective, device, _ENOUGH_SECONDS)
    alone = measure.Spread.of([measure.seconds_of(objective, device, calls) for _ in range(rounds)])
    tflops = seconds.map(lambda s: counted.get_total_flops() / s / 1e12)
    return {
        "case": TRAINER,
        "operations_per_step": counted.get_total_flops(),
        "tflops": tflops,
        "matrix_tflops_bf16": matrix,
        "share_of_matrix_rate": tflops.map(lambda rate: rate / matrix),
        "objective_ms": alone.map(lambda s: s * 1e3),
        "objective_share": round(alone.median / seconds.median, 4),
    }


def run(setup: Setup, rounds: int, warmup: int, steps: int) -> dict[str, Any]:
    """Measure every case: memory first, while this process holds nothing."""
    memory = {
        name: measure.alone(setup.device, _PRELOAD, memory_of, setup, case)
        for name, case in measure.shown(CASES.items(), "memory")
    }
    bench = Bench(setup, list(CASES.values()))
    turns = {name: partial(turn, bench, case, warmup, steps) for name, case in CASES.items()}
    wait = measure.CoreWait()
    seconds = measure.interleave(turns, rounds, "time")
    core_wait = wait.share()
    whole = trainer(bench, seconds[TRAINER], rounds)
    rows = [
        {
            "name": name,
            **asdict(case),
            "seconds_per_step": seconds[name],
            "images_per_s": seconds[name].map(lambda s: setup.batch / s),
            "speed_against_plain": ratio(seconds[PLAIN], seconds[name]),
            "memory_mib": memory[name],
            "memory_against_plain": round(memory[name].added / memory[PLAIN].added, 4),
        }
        for name, case in CASES.items()
    ]
    changes = [
        {
            "change": change,
            "with": new,
            "without": old,
            "speed": ratio(seconds[old], seconds[new]),
            "memory": round(memory[new].added / memory[old].added, 4),
        }
        for change, (new, old) in CHANGES.items()
    ]
    return {"core_wait": core_wait, "plain": PLAIN, "cases": rows, "changes": changes, "trainer": whole}


def show(result: dict[str, Any], console: Console) -> None:
    """Two tables: the cases against the plain one, and what each change does by itself."""
    settings = result["settings"]
    title = "{student}, {size} px, batch {batch}, teacher {teacher}".format(**settings)
    table = Table(
        "case", "images/s", "speed / plain", "MiB", "MiB / plain",
        title=f"Distillation step on {result['machine']['slug']}: {title}", title_justify="left",
        caption=f"Medians (quartiles) of {settings['rounds']} interleaved rounds. plain: float32, contiguous, the "
        "teacher in the loop. MiB: what the case adds to the process at its peak.", caption_justify="left",
    )  # fmt: skip
    for row in result["cases"]:
        memory = (f"{row['memory_mib'].added:,.0f}", f"{row['memory_against_plain']:.2f}")
        table.add_row(row["name"], str(row["images_per_s"]), str(row["speed_against_plain"]), *memory)
    console.print(table)
    table = Table("one change", "with it", "without it", "speed, with / without", "MiB")
    for row in result["changes"]:
        table.add_row(row["change"], row["with"], row["without"], str(row["speed"]), f"{row['memory']:.2f}")
    console.print(table)
    whole = result["trainer"]
    console.print(
        f"{whole['case']}: {whole['tflops']} TFLOP/s, {whole['share_of_matrix_rate'].median:.0%} of the "
        f"{whole['matrix_tflops_bf16']:.3g} of a bf16 matrix product; the objective alone takes "
        f"{whole['objective_ms'].median:.3g} ms, {whole['objective_share']:.1%} of the step"
    )


@click.command()
@measure.options
@click.option("--student", type=click.Choice(NAMES), help="The encoder that is trained.")
@click.option("--size", type=click.IntRange(32), help="Side of the student's images, pixels.")
@click.option("--batch", type=click.IntRange(4), help="Images to a step.")
@click.option("--steps", type=click.IntRange(1), help="Timed steps to a case and round.")
@click.option("--teacher", help="An open_clip model; its weights are random here.")
@click.option("--recipe", default="default", show_default=True, help="A recipe of `mvmr distill`, or a TOML file.")
@click.option("--set", "assign", multiple=True, metavar="KEY=VALUE", help="Change the recipe: train.optimizer=adam.")
def main(
    device: str, quick: bool, rounds: int | None, threads: int | None, out: Path, recipe: str, assign: tuple[str, ...],
    student: str | None, size: int | None, batch: int | None, steps: int | None, teacher: str | None,
) -> None:  # fmt: skip
    """Time and memory of one distillation step, six ways; ratios are against the plain way, within this run."""
    threads = measure.begin(device, threads)
    sizes = SIZES["quick" if quick else device if device == "cuda" else "cpu"]
    name = teacher or sizes.teacher
    if name not in open_clip.list_models():
        raise click.ClickException(str(unknown("teacher", name, open_clip.list_models())))
    assign = (f"student.backbone={student or sizes.student}", *assign)
    try:
        resolved = load_recipe(recipe, "mvmr.distillation", assign)
    except MvmrError as error:
        raise click.ClickException(str(error)) from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "teacher.safetensors"
        tower = open_clip.create_model(name).visual
        weights.save(file, tower.state_dict())
        del tower
        setup = Setup(
            device=device, threads=threads, size=size or sizes.size, batch=batch or sizes.batch,
            recipe=resolved,
            teacher=name, teacher_weights=str(file), teacher_dim=open_clip.get_model_config(name)["embed_dim"],
        )  # fmt: skip
        machine = measure.machine(device)
        rounds, steps = rounds or sizes.rounds, steps or sizes.steps
        try:
            figures = run(setup, rounds, sizes.warmup, steps)
        except torch.OutOfMemoryError as error:
            raise click.ClickException(f"batch {setup.batch} doesn't fit into the memory; give a --batch") from error
    settings = {
        "student": setup.recipe.student.backbone, "size": setup.size, "batch": setup.batch, "teacher": name,
        "recipe": to_mapping(setup.recipe), "rounds": rounds, "steps": steps, "warmup": sizes.warmup, "quick": quick,
    }  # fmt: skip
    result = {"machine": machine, "settings": settings, **figures}
    console = measure.output()
    show(result, console)
    measure.save("train_step", result, out, console)


if __name__ == "__main__":
    main()
