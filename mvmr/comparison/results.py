"""The results of an ablation: the lines that were written as its runs ended, their table and their picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvmr.comparison.grids import GRIDS
from mvmr.errors import MvmrError
from mvmr.storage.atomic import atomic

Result = dict[str, Any]  # a line of results.jsonl
RESULTS = "results.jsonl"
ACCURACIES = {"linear": "linear top-1 (%)", "knn": "kNN top-1 (%)"}
_RANKS = {"rank_h": "rank of h", "rank_z": "rank of z"}


def read_results(out: str | os.PathLike[str]) -> list[Result]:
    """The lines of ``out``/results.jsonl in the order in which the runs ended; a last line cut by a kill is left out.

    Raises:
        MvmrError: a line is no result.
    """
    path = Path(out) / RESULTS
    results: dict[tuple[str, int], Result] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], 1):
        try:
            result = json.loads(line)
            results.setdefault(run_of(result), result)
        except (ValueError, KeyError, TypeError) as error:
            raise MvmrError(f"{path}, line {number}, is no result: delete the line; its run is repeated") from error
    return list(results.values())


def run_of(result: Result) -> tuple[str, int]:
    """Label and seed: which run it is the result of."""
    return result["row"], result["seed"]


def table(results: Sequence[Result]) -> str:
    """Markdown: a line to a row of the grid, mean ± sample standard deviation over seeds, the best accuracies bold.

    Effective ranks have no best. Where all seeds of a row failed, its first cell says why.
    """
    by_row = _by_row(results)
    spreads = {label: {key: _spread(runs, key) for key in ACCURACIES | _RANKS} for label, runs in by_row.items()}
    best = {key: max((s[0] for row in spreads.values() if (s := row[key])), default=None) for key in ACCURACIES}
    titles = ["row", *ACCURACIES.values(), *_RANKS.values(), "seeds"]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for label, runs in by_row.items():
        cells = [_format(spread, best.get(key)) for key, spread in spreads[label].items()]
        errors = [result["error"] for result in runs if "error" in result]
        if len(errors) == len(runs):
            cells[0] = f"failed ({errors[0].partition(' (')[0]})"
        cells.append(f"{len(runs) - len(errors)}" + (f", {len(errors)} failed" if errors else ""))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Write an SVG: the accuracies of each row as dots, with sample standard deviations over seeds as bars.

    The same results give the same bytes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    by_row = _by_row(results)
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(by_row)), layout="constrained")
    axes = figure.subplots()
    for (key, title), marker, offset in zip(ACCURACIES.items(), "os", (-0.12, 0.12), strict=True):
        points = [(y + offset, *s) for y, runs in enumerate(by_row.values()) if (s := _spread(runs, key))]
        heights, means, deviations = zip(*points, strict=True) if points else ((), (), ())
        bars = [deviation or 0.0 for deviation in deviations]
        axes.errorbar(means, heights, xerr=bars, fmt=marker, markersize=4, capsize=2, label=title.partition(" top")[0])
    for y, runs in enumerate(by_row.values()):
        if all("error" in result for result in runs):
            axes.text(0.01, y, "failed", transform=axes.get_yaxis_transform(), va="center", color="firebrick")
    axes.set_yticks(range(len(by_row)), list(by_row))
    axes.set_ylim(len(by_row) - 0.5, -0.5)
    axes.set_xlabel("top-1 on the test split (%)")
    axes.grid(linewidth=0.4)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    with atomic(path) as temporary, mpl.rc_context({"svg.hashsalt": "mvmr", "svg.fonttype": "none"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def _by_row(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by label, in the order of the grid."""
    rows = GRIDS[results[0]["grid"]] if results else ()
    by_label = {row.label: [result for result in results if result["row"] == row.label] for row in rows}
    return {label: runs for label, runs in by_label.items() if runs}


def _spread(results: Sequence[Result], key: str) -> tuple[float, float | None] | None:
    """Mean of a figure over seeds, None where there is none, and its sample standard deviation where there are two."""
    values = [result[key] for result in results if result.get(key) is not None]
    return (float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None) if values else None


def _format(spread: tuple[float, float | None] | None, best: float | None) -> str:
    if spread is None:
        return ""
    mean, deviation = spread
    text = f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
    return f"**{text}**" if mean == best else text
