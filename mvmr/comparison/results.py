"""The results of a study: the lines that were written as its runs ended, their table and their pictures."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvmr.errors import MvmrError
from mvmr.storage.atomic import atomic

Result = dict[str, Any]  # a line of results.jsonl
RESULTS, TABLE, PLOT, CURVES = "results.jsonl", "table.md", "plot.svg", "curves.svg"
ACCURACIES = {"linear": "linear top-1 (%)", "knn": "kNN top-1 (%)"}
_MORE = {
    "rank": "rank",
    "rank_z": "rank of z",
    "spread": "spread",
    "dcor": "dCor",
    "train_seconds": "seconds",
    "peak_mb": "peak MB",
}
_DIGITS = {"spread": 2, "dcor": 2, "train_seconds": 0, "peak_mb": 0}  # behind the point; else 1
_LONGEST = 45  # characters to a line of a label


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
            results[run_of(result)] = result  # a later attempt counts
        except (ValueError, KeyError, TypeError) as error:
            raise MvmrError(f"{path}, line {number}, is no result: delete the line; its run is repeated") from error
    return list(results.values())


def run_of(result: Result) -> tuple[str, int]:
    """Label and seed: which run it is the result of."""
    return result["row"], result["seed"]


def table(results: Sequence[Result], order: Sequence[str] = ()) -> str:
    """Markdown: a line to a row, mean ± sample standard deviation over seeds, the best accuracies bold.

    Other figures have no best. Where all seeds of a row failed, its first cell says why.

    Args:
        order: labels in the order of the table; others come after them, as they are in the results.
    """
    by_row = _by_row(results, order)
    titles = ACCURACIES | {key: title for key, title in _MORE.items() if any(key in result for result in results)}
    spreads = {label: {key: _spread(runs, key) for key in titles} for label, runs in by_row.items()}
    best = {key: max((s[0] for row in spreads.values() if (s := row[key])), default=None) for key in ACCURACIES}
    lines = [f"| {' | '.join(['row', *titles.values(), 'seeds'])} |", f"|---|{'---:|' * (len(titles) + 1)}"]
    for label, runs in by_row.items():
        cells = {key: _format(spread, best.get(key), _DIGITS.get(key, 1)) for key, spread in spreads[label].items()}
        if null := _spread(runs, "dcor_null"):
            cells["dcor"] += f" ({null[0]:.2f})"
        errors = [result["error"] for result in runs if "error" in result]
        if len(errors) == len(runs):
            cells["linear"] = f"failed ({errors[0].partition(' (')[0]})"
        seeds = f"{len(runs) - len(errors)}" + (f", {len(errors)} failed" if errors else "")
        lines.append(f"| {label} | {' | '.join([*cells.values(), seeds])} |")
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Result], path: str | os.PathLike[str], order: Sequence[str] = ()) -> None:
    """Write an SVG: the accuracies of each row as dots, with sample standard deviations over seeds as bars.

    The same results give the same bytes.
    """
    from matplotlib.figure import Figure

    by_row = _by_row(results, order)
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
    axes.set_yticks(range(len(by_row)), [_wrapped(label) for label in by_row])
    axes.set_ylim(len(by_row) - 0.5, -0.5)
    axes.set_xlabel("top-1 on the test split (%)")
    axes.grid(linewidth=0.4)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def plot_curves(results: Sequence[Result], path: str | os.PathLike[str], order: Sequence[str] = ()) -> None:
    """Write an SVG: kNN accuracy of each row, mean over seeds, against images seen and against seconds of training."""
    from matplotlib.figure import Figure

    by_row = _by_row(results, order)
    figure = Figure(figsize=(9, 4.5 + 0.2 * len(by_row)), layout="constrained")
    sides = figure.subplots(1, 2, sharey=True)
    for number, (label, runs) in enumerate(by_row.items()):
        runs = [result for result in runs if result.get("curve") and result.get("images")]
        if not runs:
            continue
        lengths = {len(result["curve"]) for result in runs}
        curves = np.array([result["curve"] for result in runs if len(result["curve"]) == max(lengths)])
        steps, accuracy = curves.mean(0).T
        for axes, key in zip(sides, ("images", "train_seconds"), strict=True):
            total = float(np.mean([result[key] for result in runs]))
            style = ("-", "--", ":")[number // 10 % 3]  # there are ten colours
            axes.plot(steps / steps[-1] * total, accuracy, style, marker="o", markersize=3, label=_wrapped(label))
    for axes, title in zip(sides, ("images seen", "seconds of training"), strict=True):
        axes.set_xlabel(title)
        axes.grid(linewidth=0.4)
    sides[0].set_ylabel("kNN top-1 on the test split (%)")
    handles, labels = sides[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize="small")
    _save(figure, path)


def _wrapped(label: str) -> str:
    """A label in lines that leave room for the figures."""
    return "\n".join(textwrap.wrap(label, _LONGEST, break_long_words=False))


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    """The same figure gives the same bytes."""
    import matplotlib as mpl

    with atomic(path) as temporary, mpl.rc_context({"svg.hashsalt": "mvmr", "svg.fonttype": "none"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def _by_row(results: Sequence[Result], order: Sequence[str]) -> dict[str, list[Result]]:
    """Results by label; labels that `order` names come first, in that order."""
    labels = dict.fromkeys([*order, *(result["row"] for result in results)])
    by_label = {label: [result for result in results if result["row"] == label] for label in labels}
    return {label: runs for label, runs in by_label.items() if runs}


def _spread(results: Sequence[Result], key: str) -> tuple[float, float | None] | None:
    """Mean of a figure over seeds, None where there is none, and its sample standard deviation where there are two."""
    values = [result[key] for result in results if result.get(key) is not None]
    return (float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None) if values else None


def _format(spread: tuple[float, float | None] | None, best: float | None, digits: int) -> str:
    if spread is None:
        return ""
    mean, deviation = spread
    text = f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
    return f"**{text}**" if mean == best else text
