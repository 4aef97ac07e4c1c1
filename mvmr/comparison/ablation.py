"""Ablations: every row of a grid trained and measured alike, a line to a run, and the table and the picture of it."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only

from mvmr import __version__
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.comparison.grids import check_free, rows_of
from mvmr.comparison.results import ACCURACIES, RESULTS, Result, plot, read_results, run_of, table
from mvmr.config import to_mapping
from mvmr.data import ImageSet, open_images
from mvmr.errors import MvmrError
from mvmr.evaluation.evaluate import open_labelled
from mvmr.evaluation.protocols import Labelled, Measured, protocols_for
from mvmr.progress import say
from mvmr.storage.atomic import sync, write_json, write_text
from mvmr.storage.runs import check_same, differences
from mvmr.training.checkpoint import METRICS
from mvmr.training.precision import native_precision
from mvmr.training.pretraining import fit
from mvmr.training.recipe import Recipe, load_recipe
from mvmr.training.views import make_policies

SETTINGS, RUNS, TABLE, PLOT = "ablation.json", "runs", "table.md", "plot.svg"
_NEIGHBOURS = 5
_FREE = ("workers", "cache_gb", "checkpoint_steps", "log_steps", "seed")  # no figure depends on the first four
_DIVERGED = ("not finite", "NaN or infinity")  # a loss or weights, and features

_say = rank_zero_only(say)


def ablate(
    grid: str,
    data: str,
    out: str | os.PathLike[str],
    *,
    epochs: int | None = None,
    seeds: int = 1,
    recipe: str | Path = "paper",
    assign: Sequence[str] = (),
    only: str | None = None,
    keep: bool = False,
    device: str = "auto",
    devices: int = 1,
    max_unreadable: float = 0.01,
    progress: bool = False,
) -> list[Result]:
    """Train every row of a grid on the unlabelled images of ``data`` and measure it on the labelled ones.

    All rows run under seed 0 first, then under seed 1 and so on. Each run that ends is one line of
    ``out``/results.jsonl, and table.md and plot.svg beside it are made anew. A run that is there is not done again, and
    one whose training diverges is recorded as failed.

    Args:
        grid: a name of :data:`mvmr.comparison.grids.GRIDS`.
        out: folder of the results; bundles are in ``out``/runs while they are needed.
        epochs: passes over the images; left out, those of the recipe.
        seeds: every row is trained with seeds 0 to ``seeds`` - 1; more may be asked for later.
        recipe, assign: what all rows have in common: a recipe's name or file, and changes to it.
        only: the rows whose label matches this glob, or where none does, contains it.
        keep: keep the bundles of all runs; otherwise each is deleted once it is measured.
        device, devices, max_unreadable, progress: as in :func:`mvmr.pretrain`.

    Returns:
        All lines of results.jsonl: ``linear`` and ``knn`` are accuracies on the test split in percent, ``rank_h``,
        ``rank_z`` and ``loss`` the last of the training, ``seconds`` what this call spent; or ``error``.

    Raises:
        MvmrError: an unknown grid or row, data without one label to an image, a recipe that can't be trained, or a
            folder of another ablation; all of this before the first run.
        KeyboardInterrupt: stopped; the same call goes on where it was.
    """
    folder, rows = Path(out), rows_of(grid, only)
    check_free(grid, assign)
    if seeds < 1:
        raise MvmrError(f"seeds = {seeds}: give 1 or more")
    changes = [*assign, *([] if epochs is None else [f"train.epochs={epochs}"])]
    common = load_recipe(recipe, "mvmr", changes)
    runs = {
        (row.label, seed): load_recipe(recipe, "mvmr", [*changes, *row.assignments, f"train.seed={seed}"])
        for seed in range(seeds)
        for row in rows
    }
    background = common.views.background
    images = open_images(data, "unlabelled", background=background, max_unreadable=max_unreadable, progress=progress)
    labelled = open_labelled(data, background=background, max_unreadable=max_unreadable, progress=progress)
    protocols_for(labelled, list(ACCURACIES))
    _check_trainable(runs.values(), images)
    settings = _settings(grid, (images, labelled.train, labelled.test), common, keep=keep, device=device)
    done = {run_of(result) for result in _start(folder, settings)}
    command = ["mvmr", "ablate", "--grid", grid, "--data", data, "--out", str(folder), "--recipe", str(recipe)]
    command += [part for change in changes for part in ("--set", change)]

    assignments, first = {row.label: list(row.assignments) for row in rows}, True
    try:
        for number, ((label, seed), run_recipe) in enumerate(runs.items(), 1):
            run_folder = folder / RUNS / re.sub(r"[^a-z0-9]+", "-", label.lower()) / f"seed-{seed}"
            if (label, seed) not in done:
                _say(f"{number} of {len(runs)}: {label}, seed {seed}", shown=progress)
                description = {"grid": grid, "row": label, "seed": seed, "assignments": assignments[label]}
                result = _train_and_measure(
                    run_folder, run_recipe, images, labelled, device=device, devices=devices, progress=progress
                )
                _append(folder / RESULTS, description | result)
                _publish(folder, settings, command)
                done.add((label, seed))
                if first and "error" not in result and (left := len(runs.keys() - done)):
                    _say(_estimate(left, result["seconds"]), shown=progress)
                    first = False
            if not keep:
                _discard(run_folder)  # also what a killed call had no time to
    except KeyboardInterrupt as stop:
        left = len(runs.keys() - done)
        raise KeyboardInterrupt(f"{left} of {len(runs)} runs are left; type the same command to go on") from stop
    _publish(folder, settings, command)  # a killed call may have had no time to
    return read_results(folder)


def _check_trainable(recipes: Iterable[Recipe], images: ImageSet) -> None:
    """Refuse what :func:`mvmr.training.pretraining.fit` would, for the last row as for the first."""
    for recipe in recipes:
        size = (images.native_size or 224) if recipe.views.size is None else recipe.views.size
        make_policies(recipe.view_specs, recipe.views.policy, Preprocess.for_size(size))
        recipe.train.steps(len(images), smallest_batch=recipe.smallest_batch)
        recipe.method.settle(len(images)).check(recipe.train.batch_size, len(images))


def _settings(grid: str, splits: Sequence[ImageSet], recipe: Recipe, *, keep: bool, device: str) -> dict[str, Any]:
    """What all results of a folder have in common."""
    precision = native_precision(recipe.train.precision, device, recipe.views.size or splits[0].native_size)
    table_of_recipe = to_mapping(replace(recipe, train=replace(recipe.train, precision=precision)))
    table_of_recipe["train"] = {key: value for key, value in table_of_recipe["train"].items() if key not in _FREE}
    return {
        "grid": grid,
        "data": {"name": splits[0].name, "fingerprint": {images.split: images.fingerprint for images in splits}},
        "epochs": recipe.train.epochs,
        "recipe": table_of_recipe,
        "keep": keep,
        "mvmr_version": __version__,
    }


def _start(folder: Path, settings: dict[str, Any]) -> list[Result]:
    """Make the folder, or find that it holds the same ablation; return the results it has."""
    path = folder / SETTINGS
    strange = not folder.is_dir() or any(not entry.name.startswith(".") for entry in folder.iterdir())
    if folder.exists() and not path.exists() and strange:
        raise MvmrError(f"{folder} exists and is no ablation; nothing of it is touched: give another --out")
    results = read_results(folder)
    if results or any(folder.glob(f"{RUNS}/*/*")):  # before that there is nothing that other settings could mix with
        try:
            previous = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MvmrError(f"{path} can't be read: give another --out") from error
        check_same(folder, differences(previous, settings), cure="another --out", what="ablation")
    _settle(folder, settings)
    return results


@rank_zero_only
def _settle(folder: Path, settings: dict[str, Any]) -> None:
    write_json(folder / SETTINGS, settings)
    if (path := folder / RESULTS).exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # without the line cut by a kill


def _train_and_measure(
    folder: Path, recipe: Recipe, images: ImageSet, labelled: Labelled, *, device: str, devices: int, progress: bool
) -> Result:
    """Train and measure one run; every rank trains, the first one measures."""
    began = time.perf_counter()
    try:
        bundle = fit(images, folder, recipe, resume=True, device=device, devices=devices, progress=progress)
        figures = _figures(bundle, labelled, device, progress=progress) or {}
    except MvmrError as error:
        if not any(words in str(error) for words in _DIVERGED):
            raise
        figures = {"error": str(error).partition(";")[0]}
    return figures | {"seconds": round(time.perf_counter() - began, 1)}


@rank_zero_only
def _figures(bundle: Bundle, labelled: Labelled, device: str, *, progress: bool) -> Result:
    torch_device = "cuda" if device in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
    measurement = Measured(bundle.student(torch_device), labelled, device=torch_device, progress=progress)
    k = min(_NEIGHBOURS, len(labelled.labels))
    accuracies = {
        "linear": measurement.linear()["top1"],
        "knn": measurement.knn(ks=(k,))[f"top1_weighted_k{k}"],
        "knn_k": k,
    }
    last = json.loads((bundle.path / METRICS).read_text(encoding="utf-8").splitlines()[-1])
    ends = {key: last[key] if math.isfinite(last[key]) else None for key in ("rank_h", "rank_z", "loss")}
    for rows in (measurement.features, measurement.test_features):  # of no use once the bundle is gone
        for file in (path := Path(str(rows.filename))).parent.glob(f"{path.name}*"):
            file.unlink(missing_ok=True)
    return accuracies | ends | {"steps": bundle.manifest.training["steps"]}


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
    with suppress(OSError):  # not empty, or gone
        path.parent.rmdir()
        path.parent.parent.rmdir()


def _estimate(left: int, seconds: float) -> str:
    total = left * seconds
    duration = f"{total / 3600:.1f} h" if total >= 3600 else f"{math.ceil(total / 60)} min"
    return f"about {duration} to go: {left} more at {seconds:.0f} s each"


@rank_zero_only
def _publish(folder: Path, settings: dict[str, Any], command: Sequence[str]) -> None:
    """Write the table, with its caption, and the picture of all results there are."""
    results = read_results(folder)
    seeds = max(result["seed"] for result in results) + 1
    ks = sorted({result["knn_k"] for result in results if "knn_k" in result})
    caption = (
        f"`{shlex.join([*command, '--seeds', str(seeds)])}`: data {settings['data']['name']}, "
        f"epochs {settings['epochs']}, seeds {seeds}, mvmr {settings['mvmr_version']}. Accuracies are of the test "
        f"split, by which nothing was chosen; kNN with k = {ks[0] if ks else _NEIGHBOURS}. Mean ± sample standard "
        "deviation over seeds; the best is bold. Ranks are effective ranks in the last training batch."
    )
    write_text(folder / TABLE, f"{table(results)}\n{caption}\n")
    plot(results, folder / PLOT)
