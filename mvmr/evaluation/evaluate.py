"""Measuring a bundle's frozen features on labelled data, and keeping figures and heads in the bundle."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvmr.bundles import bundle as bundles
from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import Background
from mvmr.data import open_images
from mvmr.evaluation.own_classes import own_classes
from mvmr.evaluation.protocols import Labelled, Measured, Values, check_protocols, protocols_for


def evaluate(
    bundle: str | os.PathLike[str],
    data: str,
    *,
    protocols: Sequence[str] | None = None,
    ks: Sequence[int] | None = None,
    device: str = "cpu",
    max_unreadable: float = 0.01,
    progress: bool = False,
) -> dict[str, Values]:
    """Measure a bundle's frozen features on labelled data and note the figures in the bundle.

    Args:
        protocols: of ``linear``, ``linear-paper``, ``knn`` and ``clustering``, or ``voc07`` and ``voc07-paper`` where
            an image has several labels; None takes ``linear`` and ``knn``, or ``voc07``.
        ks: numbers of neighbours for ``knn``; None takes those of 1, 5, 20 and 200 for which there are images enough.

    Returns:
        Figures by name for each protocol, such as ``{"linear": {"top1": 71.2, "top5": 90.1, "C": 10.0}}``: accuracies
        on the test split in percent, and what was chosen on the training split. See :mod:`mvmr.evaluation.protocols`.

    Raises:
        MvmrError: data that can't be measured with (see ``Labelled.of``), or an unknown protocol or one that does not
            fit the data; all of this before any feature is computed.
    """
    check_protocols(protocols or ())
    current = bundles.load(bundle)
    background = current.manifest.preprocessing.background
    labelled = open_labelled(data, background=background, max_unreadable=max_unreadable, progress=progress)
    measures = protocols_for(labelled, protocols, ks=ks)
    measurement = Measured(
        current.student(device), labelled, device=device, progress=progress, classify=own_classes(current)
    )
    results = {}
    for name, measure in measures.items():
        results[name] = measure(measurement)
        command = f"mvmr evaluate {current.path} --data {data} --protocol {name}"
        if ks is not None and name == "knn":
            command += f" --k {','.join(map(str, ks))}"
        current = bundles.add_metrics(current, record(command, data, name, results[name]))
    return results


def probe(
    bundle: str | os.PathLike[str],
    data: str,
    *,
    head: str | None = None,
    device: str = "cpu",
    max_unreadable: float = 0.01,
    progress: bool = False,
) -> tuple[Bundle, Values]:
    """Fit a linear head on frozen features and store it in the bundle.

    Args:
        head: name of the head; made from the name of the data when left out.

    Returns:
        The bundle as it is now, and the head's figures on the test split, as :func:`evaluate` names them.
    """
    current = bundles.load(bundle)
    background = current.manifest.preprocessing.background
    labelled = open_labelled(data, background=background, max_unreadable=max_unreadable, progress=progress)
    measurement = Measured(current.student(device), labelled, device=device, progress=progress)
    protocol = "voc07" if labelled.several else "linear"
    values = protocols_for(labelled, [protocol])[protocol](measurement)
    name = head or head_name(data)
    command = f"mvmr probe {current.path} --data {data} --head {name}"
    metrics = record(command, data, protocol, values) | {"head": name}
    linear_head = measurement.head
    return bundles.add_head(current, name, linear_head.weight, linear_head.bias, labelled.classes, metrics), values


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
