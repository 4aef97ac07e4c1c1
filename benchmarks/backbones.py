"""Which student? Accuracy, size and milliseconds of bundles side by side: `python benchmarks/backbones.py BUNDLE...`.

Accuracies are those that `mvmr evaluate` has noted in each bundle. Every artifact of every bundle has its turn in every
round. To make the bundles of docs/method.md: `mvmr distill --student ...`, `mvmr evaluate`, `mvmr export`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import measure
import numpy as np
from rich.table import Table

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.export.artifacts import ARTIFACTS, Artifact
from mvmr.export.runtimes import open_artifact

_ENOUGH_SECONDS = 0.3
_SHOWN = {"linear": "top1", "knn": "top1_weighted_k5"}  # protocol -> its figure here


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--batch", default=16, show_default=True, help="Images at once.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=measure.RESULTS, help="Folder of the JSON.")
def main(paths: tuple[Path, ...], batch: int, threads: int, rounds: int, out: Path) -> None:
    """Time all artifacts of the bundles at PATHS for the processor, beside their accuracies and sizes."""
    wait, console = measure.CoreWait(), measure.output()
    opened = [bundles.load(path) for path in paths]
    cases, rows = {}, {}
    for number, bundle in enumerate(opened):
        for artifact in ARTIFACTS.values():
            if artifact.runtime == "onnxruntime" and artifact.files(bundle.manifest.files):
                case = f"{number} {artifact.key}"
                rows[case] = describe(bundle, artifact)
                cases[case] = time_case(bundle, artifact, batch, threads)
    for case, seconds in measure.interleave(cases, rounds, "measuring").items():
        rows[case]["ms_per_image"] = seconds.map(lambda value: 1000 * value / batch)
    table = Table("student", "linear", "kNN", "M parameters", "artifact", "MB", "ms an image")
    for row in rows.values():
        accuracies = [f"{row['accuracy'][name]:.1f}" if name in row["accuracy"] else "" for name in _SHOWN]
        size = f"{row['parameters'] / 1e6:.1f}", row["artifact"], f"{row['megabytes']:.1f}"
        table.add_row(row["backbone"], *accuracies, *size, str(row["ms_per_image"]))
    console.print(table)
    settings = {"batch": batch, "threads": threads, "rounds": rounds}
    result = {"settings": settings, "machine": measure.machine("cpu"), "core_wait": wait.share()}
    measure.save("backbones", {**result, "rows": list(rows.values())}, out, console)


def describe(bundle: Bundle, artifact: Artifact) -> dict[str, Any]:
    """What is known of an artifact without running it."""
    metrics = {record["protocol"]: record["values"] for record in bundle.manifest.metrics}
    (file,) = artifact.files(bundle.manifest.files)
    return {
        "backbone": bundle.manifest.backbone,
        "image_size": bundle.manifest.preprocessing.crop,
        "parameters": bundle.student().parameters,
        "accuracy": {name: metrics[name][figure] for name, figure in _SHOWN.items() if name in metrics},
        "artifact": artifact.key,
        "megabytes": (bundle.path / file).stat().st_size / 1e6,
    }


def time_case(bundle: Bundle, artifact: Artifact, batch: int, threads: int) -> partial[float]:
    """A call that returns the seconds of one batch; images are random bytes, for the time does not depend on them."""
    size, provider = bundle.manifest.preprocessing.crop, "cpu"
    runner = open_artifact(artifact, bundle, provider=provider, threads=threads)
    work = partial(runner, np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8))
    return partial(measure.seconds_of, work, "cpu", measure.enough_calls(work, "cpu", _ENOUGH_SECONDS))


if __name__ == "__main__":
    main()
