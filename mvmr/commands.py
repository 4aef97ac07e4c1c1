"""The core's subcommands: options in, one call of the library, its result out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

# flag -> key of the recipe it changes; everything else is reached by --set
SHORTHANDS = {
    "student": ("model.architecture", "resnet18 or resnet50."),
    "small-kernel": ("model.small_kernel", "A stem for small images: 3 x 3, stride 1, no pooling."),
    "size": ("views.size", "Side of the images the student sees, in pixels."),
    "epochs": ("train.epochs", "Passes over the images."),
    "batch-size": ("train.batch_size", "Images the objective compares, over all devices."),
    "accumulate": ("train.accumulate", "Batches to an optimiser step."),
    "lr": ("train.lr", "Peak learning rate."),
    "clip-grad": ("train.clip_grad", "Largest norm of the gradient."),
    "precision": ("train.precision", "32-true, bf16-mixed or 16-mixed."),
    "workers": ("train.workers", "Processes that load images."),
    "seed": ("train.seed", "Same seed, same machine: same weights."),
}


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `mvmr pretrain` and `mvmr distill` share; those of the recipe arrive as ``assign``."""

    def run(assign: tuple[str, ...], **options: Any) -> None:
        given = []
        for flag, (key, _) in SHORTHANDS.items():
            if value := options.pop(flag.replace("-", "_")):
                given.append(f"{key}={'true' if value is True else value}")
        command(assign=(*given, *assign), **options)

    decorated: Callable[..., None] = run
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    for option in reversed([*_RUN_OPTIONS, *_shorthand_options()]):
        decorated = option(decorated)
    return decorated


Decorator = Callable[[Callable[..., None]], Callable[..., None]]

MAX_UNREADABLE: Decorator = click.option(
    "--max-unreadable", default=0.01, show_default=True, help="Share of unreadable images that stops it."
)
_RUN_OPTIONS: tuple[Decorator, ...] = (
    click.option("--out", metavar="FOLDER", help="Folder of the bundle; made from the data's name when left out."),
    click.option("--recipe", default="default", show_default=True, help="Name of a recipe, or a TOML file."),
    click.option(
        "--set", "assign", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe: train.lr=3e-4."
    ),
    click.option("--init", metavar="B|FILE", help="Bundle or state-dict file the encoder starts from."),
    click.option("--resume", is_flag=True, help="Go on with the run of --out, if it is not finished."),
    click.option("--overwrite", is_flag=True, help="Replace what --out holds."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto."),
    click.option("--devices", default=1, show_default=True, help="Number of devices."),
    MAX_UNREADABLE,
)


def _shorthand_options() -> list[Decorator]:
    # None, not False: with False click takes a missing value as no option at all, and no value may be negative
    switch = {"small-kernel": True}
    return [click.option(f"--{flag}", is_flag=switch.get(flag), help=text) for flag, (_, text) in SHORTHANDS.items()]


@click.command()
@click.option("--data", default="sample:patches", show_default=True, help="A folder, or a name such as stl10:ROOT.")
@training_options
def pretrain(data: str, out: str | None, assign: tuple[str, ...], **options: Any) -> None:
    """Train a student from unlabelled images without a teacher (self-supervised MV-MR)."""
    from mvmr.pretraining import pretrain as run

    target = out or f"runs/pretrain-{slug(data)}"
    say_plan(data=data, recipe=options["recipe"], out=target)
    finished(run(data, target, assign=assign, progress=True, **options).path, data)


@click.command()
@click.argument("bundle", required=False)
@click.option(
    "--data", required=True, help="Labelled data: a folder with a folder to a class, or a name such as stl10:ROOT."
)
@click.option("--head", help="Name of the head; made from the data's name when left out.")
@click.option("--device", default="cpu", show_default=True)
@MAX_UNREADABLE
def probe(bundle: str | None, data: str, head: str | None, device: str, max_unreadable: float) -> None:
    """Fit a linear head on frozen features and store it in BUNDLE (the newest below runs/ when left out)."""
    from mvmr.evaluation import newest_or
    from mvmr.evaluation import probe as run

    stored, values = run(
        newest_or(bundle), data, head=head, device=device, max_unreadable=max_unreadable, progress=True
    )
    click.echo(f"{stored.path}: heads {', '.join(stored.heads)}; on the test split {told_all(values)}")


@click.command()
@click.argument("bundle", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print bundle.json.")
def info(bundle: str | None, as_json: bool) -> None:
    """Show what BUNDLE is (the newest below runs/ when left out); its files are checked on the way."""
    import json

    from mvmr import bundle as bundles

    opened = bundles.load(bundle or bundles.newest())
    says = opened.manifest
    if as_json:
        click.echo(json.dumps(says.to_json(), indent=2))
        return
    training, image = says.training, says.preprocessing
    teachers = training.get("teachers")
    named = teachers.values() if isinstance(teachers, Mapping) else ()
    lines = {
        "bundle": opened.path,
        "encoder": says.architecture + (", small kernel" if says.small_kernel else ""),
        "features": says.embedding_dim,
        "images": f"{image.crop} px, resized to {image.resize} px first ({image.interpolation})",
        "trained": f"{_said(training, 'method')}, recipe {_said(training, 'recipe', 'name')}, "
        f"{_said(training, 'steps')} steps",
        "teacher": ", ".join(f"{_said(each, 'name')}, weights {_said(each, 'weights')}" for each in named) or "none",
        "data": f"{_said(training, 'data', 'name')}, {_said(training, 'data', 'images')} images",
        "space": opened.space_id,
        "heads": ", ".join(opened.heads) or "none; make one with `mvmr probe`",
        "files": f"{len(says.files)}, all as they were written",
    }
    for name, value in lines.items():
        click.echo(f"{name:<9} {value}")
    for record in says.metrics:
        values = ", ".join(f"{name} {value:.4g}" for name, value in record["values"].items())
        click.echo(f"measured  {record['protocol']} on {record['data']}: {values}")


def _said(record: object, *keys: str) -> str:
    """A value out of nested tables that a stranger may have written."""
    for key in keys:
        if not isinstance(record, Mapping) or key not in record:
            return "not recorded"
        record = record[key]
    return str(record)


def told(name: str, value: float) -> str:
    """A figure of a protocol: accuracies and precisions in percent, anything else as a number."""
    return f"{value:.1f} %" if name.startswith(("top", "map_11point", "map_area")) else f"{value:.3g}"


def told_all(values: Mapping[str, float]) -> str:
    """The figures of a protocol on one line."""
    return ", ".join(f"{name} {told(name, value)}" for name, value in values.items())


def say_plan(**named: object) -> None:
    """What is about to be done, before it starts."""
    for name, value in named.items():
        click.echo(f"{name:<8} {value}", err=True)


def finished(path: object, data: str) -> None:
    """Where the bundle is, and what to type next."""
    click.echo(f"{path}")
    click.echo(
        f"next: mvmr info {path}   mvmr evaluate {path} --data {data}   mvmr probe {path} --data LABELLED", err=True
    )


def slug(data: str) -> str:
    """A folder name made from the name of data or of a teacher."""
    import re

    return re.sub(r"[^A-Za-z0-9]+", "-", data).strip("-").lower() or "data"
