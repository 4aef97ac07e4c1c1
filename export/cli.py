"""The subcommands that export, and measure what was exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from mvmr.cli.early import check
from mvmr.cli.options import MAX_UNREADABLE
from mvmr.cli.threads import THREADS
from mvmr.export.artifacts import ARTIFACTS
from mvmr.export.runtimes import PROVIDERS
from mvmr.progress import say_plan


def _add_artifact_options(command: Callable[..., None]) -> Callable[..., None]:
    for row in reversed(ARTIFACTS.values()):  # click lists the last one first
        command = click.option(f"--{row.key}", is_flag=True, help=row.purpose)(command)
    return command


@click.command()
@click.argument("bundle", required=False)
@_add_artifact_options
@click.option("--triton", metavar="DIR", help="A Triton model repository, which the last format is added to.")
@click.option("--heads", multiple=True, metavar="all|NAME", help="Linear heads whose logits the graph gives, too.")
@click.option("--dense", is_flag=True, help="The features of each patch, too: a second output; of --onnx and --fp16.")
@click.option("--data", help="Images to verify with; left out, the test split of what BUNDLE was trained on.")
@click.option("--images", default=256, show_default=True, help="How many of them.")
@click.option("--calibration", metavar="DATA", help="Images for int8, 100 or more; left out, the training data.")
@click.option("--opset", default=20, show_default=True)
@click.option("--gate", "gates", multiple=True, metavar="NAME=VALUE", help="Change a gate: cosine_min=0.999.")
@click.option("--min-batch", default=1, show_default=True, help="Smallest batch of the engine.")
@click.option("--opt-batch", default=8, show_default=True, help="Batch the engine is tuned for.")
@click.option("--max-batch", default=64, show_default=True, help="Largest batch of the engine, and of Triton.")
@click.option("--workspace-gb", default=4.0, show_default=True, help="GPU memory to build the engine in.")
@click.option("--rebuild", is_flag=True, help="Build the engine again.")
@click.option(
    "--provider", default="cpu", show_default=True, help=f"Where fp32 and fp16 are verified: {', '.join(PROVIDERS)}."
)
@MAX_UNREADABLE
@THREADS
def export(bundle: str | None, min_batch: int, opt_batch: int, max_batch: int, **options: Any) -> None:
    """Export BUNDLE (the newest below runs/ when left out), each file verified against torch before it may be used."""
    check(bundle=bundle)
    from mvmr.evaluation.evaluate import newest_or
    from mvmr.export.attempt import builder_of
    from mvmr.export.export import export as run

    flags = {name: options.pop(name) for name in ARTIFACTS}
    formats = [name for name, flag in flags.items() if flag] or ["onnx"]
    path = newest_or(bundle)
    say_plan(bundle=path, formats=", ".join(formats))
    reports = run(path, formats=formats, batches=(min_batch, opt_batch, max_batch), progress=True, **options)
    for key, report in reports.items():
        click.echo(builder_of(ARTIFACTS[key]).summarise(report, path))


@click.group()
def bench() -> None:
    """Measure speed on this machine."""


@bench.command("export")
@click.argument("bundle", required=False)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 16), show_default=True)
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Turns of every engine.")
@click.option("--threads", multiple=True, type=click.IntRange(1), help="Of the processor; all when left out.")
@click.option("--compiled/--no-compiled", default=True, show_default=True, help="Also measure torch.compile.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--out", metavar="FILE", help="File of the JSON; beside BUNDLE when left out.")
def bench_export(bundle: str | None, out: str | None, **options: Any) -> None:
    """Time torch and every artifact of BUNDLE (the newest below runs/ when left out) in turn."""
    from rich.console import Console
    from rich.table import Table

    check(bundle=bundle)
    from mvmr.evaluation.evaluate import newest_or
    from mvmr.evaluation.figures import shorten_number
    from mvmr.export.bench import bench as run

    path = newest_or(bundle)
    target = out or f"{path}-bench-export.json"
    result = run(path, out=target, progress=True, **options)
    table = Table("engine", title=f"{path}, {result['machine']['device']}, {result['machine']['cores']} cores")
    for column in ("threads", "batch", "ms a batch", "images/s", "times faster", "times less processor"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        keys = ("wall_ms", "images_per_s", "times_faster", "times_less_processor")
        table.add_row(
            row["engine"], str(row["threads"]), str(row["batch"]), *(shorten_number(row[key]) for key in keys)
        )
    Console().print(table)
    for name, why in result["not_measured"].items():
        click.echo(f"not measured: {name}: {why}", err=True)
    click.echo(target)
