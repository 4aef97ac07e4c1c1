"""`mvmr report`: how faithful a student is to its teacher, on images of the user's choice, as JSON and as a page."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from mvmr import __version__
from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.cores import usable_cores
from mvmr.distillation.report.fidelity import Figures, dependence, neighbours, predictions, spectrum
from mvmr.distillation.report.images import SEED
from mvmr.distillation.report.overview import write_overview
from mvmr.distillation.report.page import write_page
from mvmr.distillation.report.stages import build_untrained, split, stages_of
from mvmr.distillation.report.subject import Subject
from mvmr.distillation.teachers.recorded import names_to_open
from mvmr.errors import MvmrError
from mvmr.evaluation.protocols import Measured
from mvmr.models.table import backbone_of
from mvmr.progress import is_wanted
from mvmr.representations import HAND_CRAFTED, hand_crafted
from mvmr.representations.cache import represent
from mvmr.storage.atomic import write_json

SCHEMA = 1
JSON, PAGE = "report.json", "index.html"
_NEVER = {
    "corruptions, and images of another kind": "the figures hold for these images: make a report on the others, too",
    "zero-shot classification and text search": "they take a text tower: mvmr evaluate BUNDLE --data DATA --table",
    "speed and memory": "they depend on how the student is exported: see mvmr export",
}


def report(
    bundle: str | os.PathLike[str],
    data: str,
    *,
    teacher: str | Path | None = None,
    pretrained: str | Path | None = None,
    out: str | os.PathLike[str] = "report",
    k: int = 10,
    permutations: int = 200,
    limit: int = 1000,
    device: str = "cpu",
    max_unreadable: float = 0.01,
    progress: bool | None = None,
) -> Figures:
    """Measure how much of its teacher a student has kept, and write ``out``/report.json and ``out``/index.html.

    Measured on the test split, or on all images where there are no labels. What can't be measured is listed in the
    report, with the reason. The same input gives the same report.json. Of a student of several teachers, of which none
    is named, there is a report on each in a folder of its name below ``out``, and ``out``/index.html shows them all.

    Args:
        teacher, pretrained: left out, those the student was distilled from, as the bundle records them.
        out: a folder that is not there yet, is empty, or holds a former report, which is replaced.
        k: neighbours of an image that are compared.
        permutations: of the images, to learn what distance correlation comes by chance.
        limit: of more images than these, so many are drawn, always the same; the probe takes all.

    Returns:
        The content of report.json; of several, ``teachers``: that of each by its name.

    Raises:
        MvmrError: a teacher that was named and can't be had, too few images for ``k``, or other files in ``out``; all
            of this before any feature is computed.
    """
    progress = is_wanted(progress)
    folder = Path(out)
    if permutations < 1:
        raise MvmrError(f"permutations = {permutations}: give 1 or more")
    opened = bundles.load(bundle)
    names = names_to_open(opened, teacher)
    report_on = partial(
        _report, opened, data, pretrained=pretrained, k=k, permutations=permutations, limit=limit, device=device,
        max_unreadable=max_unreadable, progress=progress,
    )  # fmt: skip
    if len(names) == 1:
        return report_on(teacher=teacher, folder=folder)
    _refuse_other_files(folder, names)
    reports = {name: report_on(teacher=name, folder=folder / name) for name in names}
    write_overview(reports, PAGE, folder / PAGE)
    return {"teachers": reports}


def _report(
    opened: Bundle, data: str, *, teacher: str | Path | None, pretrained: str | Path | None, folder: Path, k: int,
    permutations: int, limit: int, device: str, max_unreadable: float, progress: bool,
) -> Figures:  # fmt: skip
    """The report on one teacher, or where there is none on the student alone."""
    _refuse_other_files(folder)
    subject = Subject.open(
        opened, data, teacher=teacher, pretrained=pretrained,
        limit=limit, k=k, device=device, max_unreadable=max_unreadable, progress=progress,
    )  # fmt: skip
    features = _features(subject, device, progress)
    options = {"teacher": teacher, "pretrained": pretrained, "k": k, "permutations": permutations, "limit": limit}
    content = {
        "schema": SCHEMA,
        "mvmr_version": __version__,
        "command": _command(opened.path, {"data": data, "out": folder}, options),
        **subject.describe(),
        "dependence": _dependence(features, permutations, progress),
        "neighbours": _neighbours(subject, features, k),
        "probe": _probe(subject, device, progress),
        "spectrum": {name: spectrum(rows) for name, rows in _sides(features).items()},
        "training": subject.training,
        "not_measured": [{"what": what, "why": why} for what, why in {**subject.missing, **_NEVER}.items()],
    }
    write_json(folder / JSON, content)
    write_page(content, subject.images.load, folder / PAGE)
    return content


def _features(subject: Subject, device: str, progress: bool) -> dict[str, np.ndarray]:
    """Rows of the dependence table by name, then the hand-crafted representations: [N, D] float32 each."""
    images, preprocess = subject.images, subject.bundle.manifest.preprocessing
    workers = 0 if images.native_size else usable_cores()  # arrays in memory need no help
    rows = partial(represent, images, device=device, workers=workers, progress=progress)
    stages, widths = stages_of(backbone_of(subject.bundle.manifest), subject.student)
    features: dict[str, np.ndarray] = {f"student.{name}": part for name, part in split(rows(stages), widths).items()}
    features["untrained"] = rows(build_untrained(subject.bundle, images, device=device, workers=workers, seed=SEED))
    if subject.teacher is not None:
        features["teacher"] = rows(subject.teacher)
    return features | {name: rows(hand_crafted(name, preprocess)) for name in HAND_CRAFTED}


def _sides(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whose features are compared: the student's last stage, the teacher, if there is one, and an untrained encoder."""
    student = [rows for name, rows in features.items() if name.startswith("student.")][-1]
    return {"student": student} | {name: features[name] for name in ("teacher", "untrained") if name in features}


def _dependence(features: Mapping[str, np.ndarray], permutations: int, progress: bool) -> Figures:
    rows = {name: values for name, values in features.items() if name not in HAND_CRAFTED}
    columns = {name: features[name] for name in ("teacher", *HAND_CRAFTED) if name in features}
    cells = dependence(rows, columns, permutations=permutations, seed=SEED, progress=progress)
    return {"permutations": permutations, "rows": list(rows), "columns": list(columns), "cells": cells}


def _neighbours(subject: Subject, features: Mapping[str, np.ndarray], k: int) -> Figures | None:
    if subject.teacher is None:
        return None
    teacher, student, reference = (_sides(features)[name] for name in ("teacher", "student", "untrained"))
    return neighbours(teacher, student, reference, k, labels=subject.labels, classes=subject.classes or (), seed=SEED)


def _probe(subject: Subject, device: str, progress: bool) -> Figures | None:
    """Linear probes of both sides, fitted on the training split, on every image of the test split."""
    data = subject.labelled
    if data is None:
        return None
    figures: Figures = {"student": None, "teacher": None}
    predicted: dict[str, np.ndarray] = {}
    for name, representation in {"student": subject.student, "teacher": subject.teacher}.items():
        if representation is not None:
            side = Measured(representation, data, device=device, progress=progress)
            figures[name], predicted[name] = side.linear(), side.head.predict(side.test_features)
    return figures | predictions(
        data.test_labels, data.classes, predicted["student"], predicted.get("teacher"), seed=SEED
    )


def _command(path: Path, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """What to type for the same report; an option at its default is left out."""
    defaults = signature(report).parameters
    changed = {name: value for name, value in options.items() if value != defaults[name].default}
    flags = [word for name, value in {**arguments, **changed}.items() for word in (f"--{name}", str(value))]
    return shlex.join(["mvmr", "report", str(path), *flags])


def _refuse_other_files(folder: Path, folders: Iterable[str] = ()) -> None:
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    except OSError as error:
        raise MvmrError(f"cannot write a report to {folder}: {error.strerror}; give another folder") from error
    if strangers := [name for name in names if name not in (JSON, PAGE, *folders)]:
        raise MvmrError(f"{folder} holds {strangers[0]!r}, which is no part of a report; give a folder of its own")
