"""The subcommands that need a teacher."""

from __future__ import annotations

from typing import Any

import click

from mvmr.commands import finished, say_plan, slug, training_options


@click.command()
@click.option(
    "--teacher",
    required=True,
    metavar="NAME|FOLDER",
    help="An open_clip model such as ViT-B-16, or a folder in its hub format.",
)
@click.option(
    "--pretrained",
    metavar="TAG|FILE",
    help="Its weights: a tag of open_clip's, or a file; the default is named before the start.",
)
@click.option("--data", default="sample:patches", show_default=True, help="A folder, or a name such as stl10:ROOT.")
@training_options
def distill(
    teacher: str, pretrained: str | None, data: str, out: str | None, assign: tuple[str, ...], **options: Any
) -> None:
    """Distil a teacher into a small student, from unlabelled images."""
    from mvmr.distillation.run import distill as run
    from mvmr.distillation.source import default_weights

    target = out or f"runs/{slug(teacher)}-{slug(data)}"
    weights = pretrained or default_weights(teacher)
    say_plan(teacher=teacher, weights=weights, data=data, recipe=options["recipe"], out=target)
    finished(run(teacher, data, target, pretrained=pretrained, assign=assign, progress=True, **options).path, data)


@click.command()
@click.option("--out", default="runs/quickstart", show_default=True, help="Folder for everything it makes.")
@click.option(
    "--teacher", metavar="NAME|FOLDER", help="A real teacher such as ViT-B-16; left out, a tiny CLIP is trained here."
)
@click.option("--pretrained", metavar="TAG|FILE", help="The teacher's weights.")
@click.option("--seeds", default=1, show_default=True, help="Repeat with so many seeds and report the mean.")
@click.option("--overwrite", is_flag=True, help="Train again what --out holds.")
def quickstart(out: str, teacher: str | None, pretrained: str | None, seeds: int, overwrite: bool) -> None:
    """Run the whole path on sample images, in minutes."""
    from mvmr.distillation.quickstart import quickstart as run
    from mvmr.distillation.report import print_results

    try:
        results = run(out, teacher=teacher, pretrained=pretrained, seeds=seeds, overwrite=overwrite, progress=True)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("type the same command to go on") from error
    print_results(results, out)
