"""The subcommands that need a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from mvmr.cli.commands import show_result, slug
from mvmr.cli.early import check
from mvmr.cli.options import CONFUSION, LABELLED, MAX_UNREADABLE, TRAINING
from mvmr.cli.threads import THREADS
from mvmr.progress import say_plan


@click.command()
@click.option(
    "--teacher",
    "teachers",
    required=True,
    multiple=True,
    metavar="[NAME=]SPEC",
    help="An open_clip model such as ViT-B-16 or ViT-B-16:openai, a folder in its hub format, timm:NAME[:FILE], "
    "torchvision:NAME[:WEIGHTS|FILE], onnx:FILE, python:MODULE:FACTORY or rows:FILE.parquet (docs/teachers.md). "
    "Given several times, each with a name: clip=ViT-B-16.",
)
@click.option(
    "--pretrained",
    metavar="TAG|FILE",
    help="Weights of open_clip models that don't say theirs: a tag, or a file; the default is named before the start.",
)
@click.option("--data", default="sample:patches", show_default=True, help="A folder, glob, list:FILE, or stl10:ROOT.")
@TRAINING
@click.option(
    "--max-missing", default=0.01, show_default=True, help="Share of images without a row in rows:FILE that stops it."
)
def distill(
    teachers: tuple[str, ...], pretrained: str | None, data: str, out: str | None, assign: tuple[str, ...],
    **options: Any,
) -> None:  # fmt: skip
    """Distil a teacher, or several, into a small student, from unlabelled images."""
    from mvmr.distillation.teachers.spec import check_names, parse_specs, split_weights

    specs = parse_specs(teachers)
    check_names(specs)
    check(data=data, recipe=options["recipe"], of="distill")
    from mvmr.distillation.distill import distill as run
    from mvmr.distillation.teachers.clip_source import default_weights

    target = out or f"runs/{'-'.join(slug(str(spec)) for spec in specs)}-{slug(data)}"
    models = [split_weights(spec.what) for spec in specs if spec.kind == "open_clip"]
    weights = [own or pretrained or default_weights(model) for model, own in models]
    plan = {"teacher": ", ".join(map(str, specs))} | ({"weights": ", ".join(weights)} if weights else {})
    say_plan(**plan, data=data, recipe=options["recipe"], out=target)
    show_result(run(teachers, data, target, pretrained=pretrained, assign=assign, progress=True, **options).path, data)


@click.command()
@click.argument("bundle", required=False)
@LABELLED
@click.option(
    "--protocol",
    help="Of linear, linear-paper, knn, clustering, voc07, voc07-paper and (with --table) zeroshot, separated by "
    "commas; left out, those that suit the labels.",
)
@click.option(
    "--k", "ks", metavar="K,...", help="Numbers of neighbours for knn; left out, those of 1,5,20,200 that fit."
)
@click.option("--table", is_flag=True, help="Measure the teacher, too, and print both side by side.")
@click.option("--teacher", metavar="NAME|FOLDER", help="With --table: another teacher than the student's own.")
@click.option("--pretrained", metavar="TAG|FILE", help="That teacher's weights.")
@CONFUSION
@click.option("--keep-map", is_flag=True, help="With --table: store the map to the teacher's space, for text search.")
@click.option("--device", default="cpu", show_default=True)
@THREADS
@MAX_UNREADABLE
def evaluate(
    bundle: str | None,
    data: str,
    protocol: str | None,
    ks: str | None,
    table: bool,
    teacher: str | None,
    pretrained: str | None,
    keep_map: bool,
    confusion: str | None,
    **options: Any,
) -> None:
    """Measure the frozen features of BUNDLE (the newest below runs/ when left out), and of its teacher."""
    neighbours = _numbers(ks)
    check(bundle=bundle, data=data)
    from mvmr.evaluation.evaluate import evaluate as run
    from mvmr.evaluation.evaluate import newest_or
    from mvmr.evaluation.figures import format_figures

    path, protocols = newest_or(bundle), protocol.split(",") if protocol else None
    if not table:
        if teacher or pretrained or keep_map or "zeroshot" in (protocols or ()):
            raise click.UsageError("--teacher, --pretrained, --keep-map and protocol zeroshot go with --table")
        figures = run(path, data, protocols=protocols, ks=neighbours, confusion=confusion, progress=True, **options)
        for name, values in figures.items():
            click.echo(f"{path} on {data}: {name} {format_figures(values)}")
        return
    if confusion:
        raise click.UsageError("--confusion is of the student alone: without --table")
    from mvmr.distillation.comparison import compare
    from mvmr.distillation.tables import print_comparison

    comparison = compare(
        path, data, teacher=teacher, pretrained=pretrained, protocols=protocols, ks=neighbours, keep_map=keep_map,
        progress=True, **options,
    )  # fmt: skip
    print_comparison(comparison, title=f"{path} on {data}, test split")


@click.command()
@click.argument("bundle", required=False)
@click.option("--data", required=True, help="Images, with labels or without: a folder, or a name such as stl10:ROOT.")
@click.option("--teacher", metavar="NAME|FOLDER", help="Another teacher than the student's own.")
@click.option("--pretrained", metavar="TAG|FILE", help="That teacher's weights.")
@click.option("--out", metavar="FOLDER", help="Folder of the report; BUNDLE's name with -report when left out.")
@click.option("--k", default=10, show_default=True, help="Neighbours that are compared.")
@click.option("--limit", default=1000, show_default=True, help="Images that are compared, at most.")
@click.option("--permutations", default=200, show_default=True, help="Shufflings behind the permutation null.")
@click.option("--device", default="cpu", show_default=True)
@THREADS
@MAX_UNREADABLE
def report(bundle: str | None, data: str, out: str | None, **options: Any) -> None:
    """Show how faithful BUNDLE (the newest below runs/ when left out) is to its teacher or to each of them, in HTML."""
    check(bundle=bundle, data=data)
    from mvmr.distillation.report.report import report as run
    from mvmr.evaluation.evaluate import newest_or

    path = newest_or(bundle)
    target = out or f"{path}-report"
    result = run(path, data, out=target, progress=True, **options)
    for name, content in result.get("teachers", {"": result}).items():
        _say_report(f"{name}: " if name else "", content)
    click.echo(f"{target}/index.html")


def _say_report(prefix: str, report: Mapping[str, Any]) -> None:
    if report["neighbours"]:
        overlap, untrained = (report["neighbours"][name]["mean"] for name in ("overlap", "untrained"))
        click.echo(
            f"{prefix}neighbours of the teacher kept: {overlap:.1f} %, by an untrained encoder {untrained:.1f} %"
        )
    if report["probe"]:
        probes = {name: report["probe"][name] for name in ("teacher", "student")}
        click.echo(
            f"{prefix}linear probe: "
            + ", ".join(f"{name} {probe['top1']:.1f} %" for name, probe in probes.items() if probe)
        )
    for gap in report["not_measured"]:
        click.echo(f"{prefix}not measured: {gap['what']}: {gap['why']}", err=True)


def _numbers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--k {text}: give whole numbers separated by commas, such as 1,5,20") from error


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
    from mvmr.distillation.quickstart.quickstart import quickstart as run
    from mvmr.distillation.tables import print_results

    try:
        results = run(out, teacher=teacher, pretrained=pretrained, seeds=seeds, overwrite=overwrite, progress=True)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("type the same command to go on") from error
    print_results(results, out)
