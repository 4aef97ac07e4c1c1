"""The core's subcommands: options in, one call of the library, its result out."""

from __future__ import annotations

from typing import Any

import click

from mvmr.cli.early import check
from mvmr.cli.options import (
    BALANCED,
    CONFUSION,
    DEVICE,
    DEVICES,
    LABELLED,
    MAX_UNREADABLE,
    OF_PRETRAINING,
    OVERWRITE,
    RECIPE,
    RESUME,
    TRAINING,
    options,
    recipe_options,
)
from mvmr.cli.threads import THREADS
from mvmr.progress import say_plan


@click.command()
@click.option("--data", default="sample:patches", show_default=True, help="A folder, glob, list:FILE, or stl10:ROOT.")
@TRAINING
def pretrain(data: str, out: str | None, assign: tuple[str, ...], **options: Any) -> None:
    """Train a student from unlabelled images without a teacher (self-supervised), by MV-MR or by another --method."""
    check(data=data, recipe=options["recipe"], of="pretrain")
    from mvmr.training.pretraining import pretrain as run

    target = out or f"runs/pretrain-{slug(data)}"
    say_plan(data=data, recipe=options["recipe"], out=target)
    show_result(run(data, target, assign=assign, progress=True, **options).path, data)


@click.command()
@click.argument("bundle", required=False)
@LABELLED
@click.option("--head", help="Name of the head; made from the data's name when left out.")
@BALANCED
@CONFUSION
@click.option("--device", default="cpu", show_default=True)
@THREADS
@MAX_UNREADABLE
def probe(bundle: str | None, data: str, **options: Any) -> None:
    """Fit a linear head on frozen features and store it in BUNDLE (the newest below runs/ when left out)."""
    check(bundle=bundle, data=data)
    from mvmr.evaluation.evaluate import newest_or
    from mvmr.evaluation.evaluate import probe as run
    from mvmr.evaluation.figures import format_figures

    current, values = run(newest_or(bundle), data, progress=True, **options)
    click.echo(f"{current.path}: heads {', '.join(current.heads)}; on the test split {format_figures(values)}")


@click.command()
@click.argument("bundle", required=False)
@LABELLED
@click.option(
    "--labels",
    default="10%",
    show_default=True,
    metavar="N%|FILE",
    help="Share of the training labels, drawn class by class, or a file that lists the images' names.",
)
@click.option("--out", metavar="FOLDER", help="Folder of the fine-tuned bundle; made from BUNDLE's when left out.")
@click.option("--head", help="Name of the classifier; made from the data's name when left out.")
@BALANCED
@options(
    RECIPE, recipe_options(without=(*OF_PRETRAINING, "accumulate")), RESUME, OVERWRITE, DEVICE, THREADS, MAX_UNREADABLE
)
def finetune(
    bundle: str | None, data: str, labels: str, out: str | None, assign: tuple[str, ...], balanced: bool, **options: Any
) -> None:
    """Fine-tune the whole of BUNDLE (the newest below runs/ when left out) on few labels, into a bundle of its own."""
    check(bundle=bundle, data=data, recipe=options["recipe"], of="finetune")
    from mvmr.evaluation.evaluate import newest_or
    from mvmr.evaluation.figures import format_figures
    from mvmr.training.finetuning import finetune as run

    path = newest_or(bundle)
    assign = ("balanced=true", *assign) if balanced else assign
    target = out or f"{path}-{slug(labels)}"
    say_plan(bundle=path, data=data, labels=labels, recipe=options["recipe"], out=target)
    result, values = run(path, data, target, labels=labels, assign=assign, progress=True, **options)
    click.echo(f"{result.path}: heads {', '.join(result.heads)}; on the test split {format_figures(values)}")


_OF_A_STUDY = options(
    click.option("--data", default="sample:patches", show_default=True, help="Labelled data; training reads no label."),
    click.option("--out", metavar="FOLDER", help="Folder of the results; made from the names when left out."),
    click.option("--seeds", default=1, show_default=True, help="Repeat with so many seeds."),
    click.option("--keep", is_flag=True, help="Keep the bundle of every run."),
)


@click.command()
@click.option(
    "--methods",
    required=True,
    metavar="A,B,...",
    help="Methods to compare, each with settings of its own if you like: 'simclr,lejepa spread=energy'.",
)
@_OF_A_STUDY
@options(RECIPE, recipe_options(without=("method", "seed")), DEVICE, DEVICES, THREADS, MAX_UNREADABLE)
def compare(methods: str, data: str, out: str | None, assign: tuple[str, ...], **options: Any) -> None:
    """Train several methods on the same images, measure each and a random encoder, and write a table."""
    check(data=data, recipe=options["recipe"], of="pretrain")
    from mvmr.comparison.methods import compare as run

    target = out or f"runs/compare-{slug(data)}"
    say_plan(methods=methods, data=data, recipe=options["recipe"], out=target)
    _show_study(run(methods, data, target, assign=assign, progress=True, **options), target)


@click.command()
@click.option("--grid", required=True, type=click.Choice(["losses", "representations", "augmentations", "projector"]))
@click.option("--only", metavar="TEXT", help="Rows whose label matches, such as 'L1*'.")
@_OF_A_STUDY
@click.option(
    "--recipe", default="paper", show_default=True, help="Name of a recipe of `mvmr pretrain`, or a TOML file."
)
@options(recipe_options(without=("seed",)), DEVICE, DEVICES, THREADS, MAX_UNREADABLE)
def ablate(grid: str, data: str, out: str | None, assign: tuple[str, ...], **options: Any) -> None:
    """Train and measure a grid of the paper's ablations (Tables 5 to 8), a row at a time."""
    check(data=data, recipe=options["recipe"], of="pretrain")
    from mvmr.comparison.ablation import ablate as run

    target = out or f"runs/ablate-{grid}-{slug(data)}"
    say_plan(grid=grid, data=data, recipe=options["recipe"], out=target)
    _show_study(run(grid, data, target, assign=assign, progress=True, **options), target)


def _show_study(results: list[dict[str, Any]], target: str) -> None:
    from mvmr.comparison.results import CURVES, PLOT, RESULTS, TABLE, table

    click.echo(table(results))
    click.echo("   ".join(f"{target}/{name}" for name in (TABLE, PLOT, CURVES, RESULTS)))


@click.command()
@click.argument("bundle", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print bundle.json.")
def info(bundle: str | None, as_json: bool) -> None:
    """Show what BUNDLE is (the newest below runs/ when left out); its files are checked on the way."""
    import json

    from mvmr.bundles import bundle as bundles
    from mvmr.bundles.description import describe, measurements

    current = bundles.load(bundle or bundles.newest())
    if as_json:
        click.echo(json.dumps(current.manifest.to_json(), indent=2))
        return
    for name, value in (
        describe(current) | {"files": f"{len(current.manifest.files)}, all as they were written"}
    ).items():
        click.echo(f"{name:<9} {value}")
    for line in measurements(current):
        click.echo(f"measured  {line}")


def show_result(path: object, data: str) -> None:
    """Where the bundle is, and what to type next."""
    click.echo(f"{path}")
    click.echo(
        f"next: mvmr info {path}   mvmr evaluate {path} --data {data}   mvmr probe {path} --data LABELLED", err=True
    )


def slug(data: str) -> str:
    """A folder name made from the name of data or of a teacher."""
    import re

    return re.sub(r"[^A-Za-z0-9]+", "-", data).strip("-").lower() or "data"
