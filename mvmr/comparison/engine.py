"""Runs side by side: every row trained and measured alike, a line to a run, and the table and the pictures of them."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only

from mvmr import __version__
from mvmr.bundles import manifest
from mvmr.bundles.preprocess import Preprocess
from mvmr.comparison.grids import Row
from mvmr.comparison.measuring import Curve, cut, measure
from mvmr.comparison.memory import HighWater
from mvmr.comparison.results import (
    ACCURACIES,
    CURVES,
    PLOT,
    RESULTS,
    TABLE,
    Result,
    plot,
    plot_curves,
    read_results,
    run_of,
    table,
)
from mvmr.config import to_mapping
from mvmr.data import ImageSet, open_images
from mvmr.errors import MvmrError
from mvmr.evaluation.evaluate import open_labelled
from mvmr.evaluation.protocols import Labelled, protocols_for
from mvmr.models.table import open_backbone
from mvmr.progress import say
from mvmr.storage.atomic import is_disk_full, sync, write_json, write_text
from mvmr.storage.runs import check_same, differences
from mvmr.training.checks import check_trainable, settle, side
from mvmr.training.pretraining import fit
from mvmr.training.recipe import Recipe, load_recipe

RUNS = "runs"
_FREE = ("workers", "cache_gb", "checkpoint_steps", "log_steps", "seed")  # no figure depends on the first four
_DIVERGED = ("not finite", "NaN or infinity")  # a loss or weights, and features

_say = rank_zero_only(say)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Rows that are to be compared, and what all of them have in common.

    kind: what messages call it, and the name of its file of settings
    settings: that tell it from others of its kind; command: the beginning of its command line, of the rows it has
    recipe, changes: of all rows, before each row's own; own: sections of a recipe that rows don't have in common
    """

    kind: str
    settings: dict[str, Any]
    command: Callable[[Sequence[str]], list[str]]
    rows: tuple[Row, ...]
    own: tuple[str, ...] = ()
    recipe: str | Path
    changes: tuple[str, ...]

    @property
    def order(self) -> tuple[str, ...]:
        """The labels of its rows."""
        return tuple(row.label for row in self.rows)

    def common(self) -> Recipe:
        """A recipe of which all but the rows' own sections is that of all rows; its method is some row's.

        Raises: MvmrError: a recipe that can't be.
        """
        methods = [part for row in self.rows for part in row.assignments if part.startswith("method.name=")]
        return load_recipe(self.recipe, "mvmr", [*self.changes, *methods[:1]])

    def recipes(self, seeds: int) -> dict[tuple[str, int], Recipe]:
        """The recipe of each run, by label and seed: all rows under seed 0 first.

        Raises: MvmrError: no seed, or a recipe that can't be.
        """
        if seeds < 1:
            raise MvmrError(f"seeds = {seeds}: give 1 or more")
        return {(row.label, seed): self._recipe(row, seed) for seed in range(seeds) for row in self.rows}

    def _recipe(self, row: Row, seed: int) -> Recipe:
        try:
            return load_recipe(self.recipe, "mvmr", [*self.changes, *row.assignments, f"train.seed={seed}"])
        except MvmrError as error:
            raise MvmrError(f"row {row.label!r}: {error}") from error


def carry_out(
    study: Study,
    data: str,
    out: str | os.PathLike[str],
    *,
    seeds: int,
    keep: bool,
    device: str,
    devices: int,
    max_unreadable: float,
    progress: bool,
) -> list[Result]:
    """Train every row on the unlabelled images of ``data`` and measure it on the labelled ones.

    All rows run under seed 0 first, then under seed 1 and so on. Each run that ends is one line of
    ``out``/results.jsonl, and the table and the pictures beside it are made anew. A run that is there is not done
    again; one that diverges, runs out of memory or breaks is recorded as failed, and the others go on. The next call
    tries again what failed but did not diverge.

    Returns:
        All lines of results.jsonl: row, seed, assignments, the figures of :func:`mvmr.comparison.measuring.measure`,
        ``curve`` (step and kNN accuracy), ``peak_mb`` (the process's, on a GPU its memory's) and ``seconds`` (that this
        call spent); or ``error``.

    Raises:
        MvmrError: data without one label to an image, a recipe that can't be trained, or a folder of something else;
            all of this before the first run. A disk that is full.
        KeyboardInterrupt: stopped; the same call goes on where it was.
    """
    folder = Path(out)
    runs = study.recipes(seeds)
    common = study.common()
    background = common.views.background
    images = open_images(data, "unlabelled", background=background, max_unreadable=max_unreadable, progress=progress)
    labelled = open_labelled(data, background=background, max_unreadable=max_unreadable, progress=progress)
    protocols_for(labelled, list(ACCURACIES))
    runs = {key: settle(recipe, images, device) for key, recipe in runs.items()}
    for recipe in runs.values():
        check_trainable(recipe, len(images), devices=devices)
    settings = _settings(study, (images, labelled.train, labelled.test), settle(common, images, device), keep=keep)
    done = {run_of(result) for result in _start(folder, study.kind, settings) if not _may_succeed(result)}
    command = ["--data", data, "--out", str(folder), "--recipe", str(study.recipe)]
    command += [part for change in study.changes for part in ("--set", change)]

    failed: set[tuple[str, int]] = set()
    assignments, first = {row.label: list(row.assignments) for row in study.rows}, True
    try:
        for number, ((label, seed), recipe) in enumerate(runs.items(), 1):
            run_folder = folder / RUNS / re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") / f"seed-{seed}"
            if (label, seed) not in done:
                _say(f"{number} of {len(runs)}: {label}, seed {seed}", shown=progress)
                description = {"row": label, "seed": seed, "assignments": assignments[label]}
                result = _train_and_measure(
                    run_folder, recipe, images, labelled, device=device, devices=devices, progress=progress
                )
                _append(folder / RESULTS, study.settings | description | result)
                _publish(folder, study, settings, command)
                done.add((label, seed))
                if _may_succeed(result):
                    failed.add((label, seed))  # what it has learned stays for the next attempt
                if "error" in result:
                    _say(f"{label}, seed {seed} failed: {result['error']}", shown=progress)
                elif first and result.get("steps") and (left := len(runs.keys() - done)):  # one that was trained
                    _say(_estimate(left, result["seconds"]), shown=progress)
                    first = False
            if not (keep or (label, seed) in failed):
                _discard(run_folder)  # also what a killed call had no time to
    except KeyboardInterrupt as stop:
        left = len(runs.keys() - done)
        raise KeyboardInterrupt(f"{left} of {len(runs)} runs are left; type the same command to go on") from stop
    _publish(folder, study, settings, command)  # a killed call may have had no time to
    return read_results(folder)


def _settings(study: Study, splits: Sequence[ImageSet], recipe: Recipe, *, keep: bool) -> dict[str, Any]:
    """What all results of a folder have in common."""
    table_of_recipe = {key: value for key, value in to_mapping(recipe).items() if key not in study.own}
    table_of_recipe["train"] = {key: value for key, value in table_of_recipe["train"].items() if key not in _FREE}
    return study.settings | {
        "data": {"name": splits[0].name, "fingerprint": {images.split: images.fingerprint for images in splits}},
        "epochs": recipe.train.epochs,
        "recipe": table_of_recipe,
        "keep": keep,
        "mvmr_version": __version__,
    }


def _start(folder: Path, kind: str, settings: dict[str, Any]) -> list[Result]:
    """Make the folder, or find that it holds the same study; return the results it has."""
    path = folder / f"{kind}.json"
    strange = not folder.is_dir() or any(not entry.name.startswith(".") for entry in folder.iterdir())
    if folder.exists() and not path.exists() and strange:
        raise MvmrError(f"{folder} exists and is no {kind}; nothing of it is touched: give another --out")
    results = read_results(folder)
    if results or any(folder.glob(f"{RUNS}/*/*")):  # before that there is nothing that other settings could mix with
        try:
            previous = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MvmrError(f"{path} can't be read: give another --out") from error
        check_same(folder, differences(previous, settings), cure="another --out", what=kind)
    _settle(path, settings)
    return results


@rank_zero_only
def _settle(path: Path, settings: dict[str, Any]) -> None:
    write_json(path, settings)
    cut(path.with_name(RESULTS))


def _train_and_measure(
    folder: Path, recipe: Recipe, images: ImageSet, labelled: Labelled, *, device: str, devices: int, progress: bool
) -> Result:
    """Train and measure one run; every rank trains, the first one measures."""
    began = time.perf_counter()
    torch_device = "cuda" if device in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
    size = side(recipe, images)
    width = open_backbone(recipe.student, size).width
    trained = (folder / manifest.NAME).exists()  # by a call that was killed before it had measured it
    try:
        water = HighWater(torch_device)
        curve = Curve(_curve_of(folder), images, labelled, Preprocess.for_size(size, images.background), width, water)
        bundle = fit(
            images, folder, recipe, resume=True, device=device, devices=devices, watch=curve, progress=progress
        )
        peak = None if trained else round(water.read().peak)
        figures = rank_zero_only(measure)(bundle, labelled, torch_device, progress=progress) or {}
        figures |= {"peak_mb": peak, "curve": [*curve.read(), (figures["steps"], figures["knn"])] if figures else []}
    except MvmrError as error:
        if not any(words in str(error) for words in _DIVERGED):
            raise
        figures = {"error": str(error).partition(";")[0], "diverged": True}
    except Exception as error:  # of a method, out of memory among them: the other rows are not to blame
        if isinstance(error, OSError | ImportError) or is_disk_full(error) or _is_of_the_process(error):
            raise
        figures = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    return figures | {"seconds": round(time.perf_counter() - began, 1)}


def _is_of_the_process(error: Exception) -> bool:
    """Whether nothing that comes after it in this process can go well."""
    broken = any(words in str(error) for words in ("CUDA error", "cuDNN error", "DataLoader worker"))
    return broken and not isinstance(error, torch.OutOfMemoryError)


def _may_succeed(result: Result) -> bool:
    """Whether a failed run is worth another attempt: one that diverged would only diverge again."""
    return "error" in result and not result.get("diverged")


def _curve_of(folder: Path) -> Path:
    """Where a run's curve is kept while it trains: beside its folder, which is the bundle's."""
    return folder.with_name(f"{folder.name}.curve.jsonl")


@rank_zero_only
def _append(path: Path, result: Result) -> None:
    with path.open("a", encoding="ascii") as file:
        file.write(json.dumps(result, allow_nan=False) + "\n")
    sync(path)
    sync(path.parent)


@rank_zero_only
def _discard(path: Path) -> None:
    for folder in (path, path.with_name(f"{path.name}.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    _curve_of(path).unlink(missing_ok=True)
    with suppress(OSError):  # not empty, or gone
        path.parent.rmdir()
        path.parent.parent.rmdir()


def _estimate(left: int, seconds: float) -> str:
    total = left * seconds
    duration = f"{total / 3600:.1f} h" if total >= 3600 else f"{math.ceil(total / 60)} min"
    return f"about {duration} to go: {left} more at {seconds:.0f} s each"


@rank_zero_only
def _publish(folder: Path, study: Study, settings: dict[str, Any], command: Sequence[str]) -> None:
    """Write the table, with its caption, and the pictures of all results there are."""
    results = read_results(folder)
    command = ["mvmr", *study.command(list(dict.fromkeys(result["row"] for result in results))), *command]
    seeds = max(result["seed"] for result in results) + 1
    k = next((result["knn_k"] for result in results if "knn_k" in result), None)
    caption = (
        f"`{shlex.join([*command, '--seeds', str(seeds)])}`: data {settings['data']['name']}, "
        f"epochs {settings['epochs']}, seeds {seeds}, mvmr {settings['mvmr_version']}. Accuracies are of the test "
        f"split, by which nothing was chosen; kNN with k = {k}. Mean ± sample standard deviation over seeds; the "
        "best is bold. Rank (effective rank), spread (1: features fill the sphere evenly) and dCor (unbiased "
        "dependence of two views' features, and in brackets that of shuffled pairs) are of test features. Rank 1 or "
        "spread 0 is a collapse; where dCor is no more than the brackets, two views of an image have nothing in "
        "common, by a collapse or because so little of the image is in them. Seconds are of the training alone."
    )
    write_text(folder / TABLE, f"{table(results, study.order)}\n{caption}\n")
    plot(results, folder / PLOT, study.order)
    plot_curves(results, folder / CURVES, study.order)
