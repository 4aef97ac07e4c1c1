"""Tables on the terminal: the quickstart's results, and teacher and student side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mvmr.evaluation.figures import format_figure

_TITLES = {
    "pixels": "raw pixels",
    "scattering": "scattering features",
    "random": "a random encoder",
    "ssl": "self-supervised MV-MR",
    "student": "distilled: the student",
    "teacher": "its teacher",
}


def print_results(results: dict[str, Any], out: str) -> None:
    """Print the comparison that the quickstart returned, and the next commands."""
    console = Console()
    table = Table(
        title=f"{results['data']}, test split, top-1 in %"
        + (f", mean of {results['seeds']} seeds" if results["seeds"] > 1 else "")
    )
    table.add_column("representation")
    for column in ("linear probe", "kNN", "parameters", "ms an image"):
        table.add_column(column, justify="right")
    for name, row in results["rows"].items():
        size = f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else ""
        accuracies = _figure(row, "linear"), _figure(row, "knn")
        table.add_row(_TITLES[name], *accuracies, size, f"{row['ms']:.2f}")
    console.print(table)
    console.print(f"random encoder and students: {results['student']}")
    teacher = results["rows"]["teacher"]
    console.print(f"teacher: {results['teacher']}; zero-shot {_figure(teacher, 'zero_shot')} %")
    if results["stand_in"]:
        console.print(
            "This teacher is a stand-in, trained here on the class names; --teacher ViT-B-16 takes a real CLIP."
        )
    folder = Path(out)
    console.print(f"picture: {folder / 'neighbours.png'}   figures: {folder / 'results.json'}")
    console.print("\nwith your own images:", highlight=False)
    console.print("  mvmr distill --teacher ViT-B-16 --data FOLDER --out runs/mine", highlight=False)
    console.print("  mvmr evaluate runs/mine --data FOLDER_WITH_A_FOLDER_TO_A_CLASS", highlight=False)


def print_comparison(comparison: dict[str, dict[str, dict[str, float]]], *, title: str) -> None:
    """Print what :func:`mvmr.distillation.comparison.compare` returned: a line to a figure, a column to a side."""
    table = Table("figure", title=title)
    for side in comparison:
        table.add_column(side, justify="right")
    for protocol, values in comparison["student"].items():
        for key in values:
            cells = [figures.get(protocol, {}).get(key) for figures in comparison.values()]
            table.add_row(f"{protocol} {key}", *("" if value is None else format_figure(key, value) for value in cells))
    Console().print(table)


def _figure(row: dict[str, float], key: str) -> str:
    spread = row.get(f"{key}_std")
    return f"{row[key]:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")
