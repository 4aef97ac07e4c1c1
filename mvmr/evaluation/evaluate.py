"""Measuring a bundle's frozen features on labelled data, and keeping figures and heads in the bundle."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import Background
from mvmr.data import open_images
from mvmr.errors import MvmrError
from mvmr.evaluation.confusion import Confusion
from mvmr.evaluation.figures import Evaluation
from mvmr.evaluation.own_classes import own_classes
from mvmr.evaluation.protocols import Labelled, Measured, Values, check_protocols, protocols_for
from mvmr.progress import is_wanted, say


def evaluate(
    bundle: str | os.PathLike[str],
    data: str,
    *,
    protocols: Sequence[str] | None = None,
    ks: Sequence[int] | None = None,
    confusion: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    max_unreadable: float = 0.01,
    progress: bool | None = None,
) -> Evaluation:
    """Measure a bundle's frozen features on labelled data and note the figures in the bundle.

    Args:
        protocols: of ``linear``, ``linear-paper``, ``knn`` and ``clustering``, or ``voc07`` and ``voc07-paper`` where
            an image has several labels; None takes ``linear`` and ``knn``, or ``voc07``.
        ks: numbers of neighbours for ``knn``; None takes those of 1, 5, 20 and 200 for which there are images enough.
        confusion: a CSV file for which class the linear probe takes for which, of the test split.

    Returns:
        Figures by name for each protocol, such as ``{"linear": {"top1": 71.2, "top5": 90.1, "C": 10.0}}``: accuracies
        on the test split in percent, and what was chosen on the training split. See :mod:`mvmr.evaluation.protocols`.

    Raises:
        MvmrError: data that can't be measured with (see ``Labelled.of``), or an unknown protocol or one that does not
            fit the data; all of this before any feature is computed.
    """
    progress = is_wanted(progress)
    check_protocols(protocols or ())
    current = bundles.load(bundle)
    background = current.manifest.preprocessing.background
    labelled = open_labelled(data, background=background, max_unreadable=max_unreadable, progress=progress)
    measures = protocols_for(labelled, protocols, ks=ks)
    _check_confusion(confusion, labelled, measures)
    measurement = Measured(
        current.student(device), labelled, device=device, progress=progress, classify=own_classes(current)
    )
    results = Evaluation()
    for name, measure in measures.items():
        results[name] = measure(measurement)
        command = f"mvmr evaluate {current.path} --data {data} --protocol {name}"
        if ks is not None and name == "knn":
            command += f" --k {','.join(map(str, ks))}"
        current = bundles.add_metrics(current, record(command, data, name, results[name]))
    if "linear" in results:
        _tell_confusion(measurement.confusion(), confusion, progress)
    return results


def probe(
    bundle: str | os.PathLike[str],
    data: str,
    *,
    head: str | None = None,
    balanced: bool = False,
    confusion: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    max_unreadable: float = 0.01,
    progress: bool | None = None,
) -> tuple[Bundle, Values]:
    """Fit a linear head on frozen features and store it in the bundle.

    Args:
        head: name of the head; made from the name of the data when left out.
        balanced: weigh each class alike, however many images it has.
        confusion: as of :func:`evaluate`.

    Returns:
        The bundle as it is now, and the head's figures on the test split, as :func:`evaluate` names them.
    """
    progress = is_wanted(progress)
    current = bundles.load(bundle)
    background = current.manifest.preprocessing.background
    labelled = open_labelled(data, background=background, max_unreadable=max_unreadable, progress=progress)
    if balanced and labelled.several:
        raise MvmrError(f"{labelled.train.name} has several labels to an image, whose classes have no common balance")
    protocol = "voc07" if labelled.several else "linear"
    measures = protocols_for(labelled, [protocol])
    _check_confusion(confusion, labelled, measures)
    measurement = Measured(current.student(device), labelled, device=device, progress=progress, balanced=balanced)
    values = measures[protocol](measurement)
    if not labelled.several:
        _tell_confusion(measurement.confusion(), confusion, progress)
    name = head or head_name(data)
    command = f"mvmr probe {current.path} --data {data} --head {name}" + (" --balanced" if balanced else "")
    metrics = record(command, data, protocol, values) | {"head": name}
    linear_head = measurement.head
    return bundles.add_head(current, name, linear_head.weight, linear_head.bias, labelled.classes, metrics), values


def _check_confusion(path: str | os.PathLike[str] | None, data: Labelled, protocols: Container[str]) -> None:
    """Refuse a file for confusions that will not be counted, before any feature is computed."""
    if path is None:
        return
    if data.several or "linear" not in protocols:
        raise MvmrError("--confusion counts what protocol linear predicts, of one label to an image; ask for that one")
    if os.path.isdir(path):
        raise MvmrError(f"--confusion {os.fspath(path)} is a folder; give the name of a CSV file")


def _tell_confusion(confusion: Confusion, path: str | os.PathLike[str] | None, progress: bool) -> None:
    if worst := confusion.worst():
        say(f"taken for another most often: {worst}", shown=progress)
    if path is not None:
        confusion.write(path)


def open_labelled(
    data: str, *, background: Background, max_unreadable: float = 0.01, progress: bool = False
) -> Labelled:
    """Open the training and the test split of ``data`` with their labels; raises as ``Labelled.of`` does."""
    train, test = (
        open_images(data, split, background=background, max_unreadable=max_unreadable, progress=progress)
        for split in ("train", "test")
    )
    return Labelled.of(train, test)


def head_name(data: str) -> str:
    """A name for the head of ``data`` where the user gave none."""
    return re.sub(r"[^A-Za-z0-9]+", "-", data)[-64:].strip("-") or "head"


def record(command: str, data: str, protocol: str, values: dict[str, Any]) -> dict[str, Any]:
    """A metrics record, as bundle.json holds it."""
    return {"command": command, "data": data, "protocol": protocol, "values": values}


def newest_or(bundle: str | None) -> Path:
    """The bundle named, or the one made last below ``runs/``."""
    return Path(bundle) if bundle else bundles.newest()
