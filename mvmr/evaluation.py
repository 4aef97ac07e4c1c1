"""How good frozen features are: kNN and a linear probe, fitted on the training split, scored once on the test split."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvmr import bundle as bundles
from mvmr.bundle import Bundle
from mvmr.classifiers import LinearHead, knn_predict, linear_probe
from mvmr.cores import usable_cores
from mvmr.data import ImageSet, open_images
from mvmr.errors import MvmrError, unknown
from mvmr.representations import Representation
from mvmr.row_cache import represent

PROTOCOLS = ("linear", "knn")


class Measured:
    """Features of a labelled training and test split under one representation; every test image is counted."""

    def __init__(
        self,
        representation: Representation,
        train: ImageSet,
        test: ImageSet,
        *,
        device: str = "cpu",
        progress: bool = False,
    ):
        self.classes, self.labels = classes_of(train)
        test_classes, self.test_labels = classes_of(test)
        if test_classes != self.classes:
            odd = sorted(set(test_classes) ^ set(self.classes))[0]
            raise MvmrError(f"{train.name}: training and test split have other classes ({odd!r} is in one only)")
        workers = 0 if train.native_size else usable_cores()  # arrays in memory need no help
        self.features, self.test_features = (
            np.asarray(represent(images, representation, device=device, workers=workers, progress=progress))
            for images in (train, test)
        )

    def linear(self) -> tuple[float, LinearHead]:
        """(top-1 accuracy on the test split in percent, the head)."""
        head = linear_probe(self.features, self.labels, len(self.classes))
        return self._percent(head.predict(self.test_features)), head

    def knn(self) -> float:
        """Top-1 accuracy on the test split in percent: 5 neighbours, cosine, temperature 0.1."""
        return self._percent(knn_predict(self.features, self.labels, self.test_features, len(self.classes)))

    def _percent(self, predicted: np.ndarray) -> float:
        return 100 * float((predicted == self.test_labels).mean())


def evaluate(
    bundle: str | os.PathLike[str],
    data: str,
    *,
    protocols: Sequence[str] = PROTOCOLS,
    device: str = "cpu",
    max_unreadable: float = 0.01,
    progress: bool = False,
) -> dict[str, float]:
    """Measure a bundle's frozen features on labelled data and note the figures in the bundle.

    Args:
        protocols: of ``linear`` and ``knn``.

    Returns:
        Top-1 accuracy on the test split by protocol, in percent.

    Raises:
        MvmrError: data without labels or with several labels to an image, or an unknown protocol.
    """
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise unknown("protocol", protocol, PROTOCOLS)
    opened = bundles.load(bundle)
    measured = _measure(opened, data, device, max_unreadable, progress)
    actions: dict[str, Callable[[], float]] = {"linear": lambda: measured.linear()[0], "knn": measured.knn}
    results = {protocol: actions[protocol]() for protocol in protocols}
    for protocol, accuracy in results.items():
        command = f"mvmr evaluate {opened.path} --data {data} --protocol {protocol}"
        opened = bundles.add_metrics(opened, _record(command, data, protocol, {"top1": accuracy}))
    return results


def probe(
    bundle: str | os.PathLike[str],
    data: str,
    *,
    head: str | None = None,
    device: str = "cpu",
    max_unreadable: float = 0.01,
    progress: bool = False,
) -> tuple[Bundle, float]:
    """Fit a linear head on frozen features and store it in the bundle.

    Args:
        head: name of the head; made from the name of the data when left out.

    Returns:
        The bundle as it is now, and the head's top-1 accuracy on the test split in percent.
    """
    opened = bundles.load(bundle)
    measured = _measure(opened, data, device, max_unreadable, progress)
    accuracy, fitted = measured.linear()
    name = head or re.sub(r"[^A-Za-z0-9]+", "-", data)[-64:].strip("-") or "head"
    command = f"mvmr probe {opened.path} --data {data} --head {name}"
    record = _record(command, data, "linear", {"top1": accuracy, "C": fitted.regularisation}) | {"head": name}
    return bundles.add_head(opened, name, fitted.weight, fitted.bias, measured.classes, record), accuracy


def classes_of(images: ImageSet) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and labels, int64 [N], of a set with one label to an image.

    Raises:
        MvmrError: there are no labels, or several to an image.
    """
    labels = images.labels
    if labels is None or images.classes is None:
        raise MvmrError(
            f"{images.name} has no labels to measure with: put the images of each class into a folder of its own"
        )
    if labels.ndim != 1:
        raise MvmrError(f"{images.name} has several labels to an image, which these protocols can't score")
    return images.classes, labels


def _measure(bundle: Bundle, data: str, device: str, max_unreadable: float, progress: bool) -> Measured:
    train, test = (
        open_images(data, split, max_unreadable=max_unreadable, progress=progress) for split in ("train", "test")
    )
    return Measured(bundle.student(device), train, test, device=device, progress=progress)


def _record(command: str, data: str, protocol: str, values: dict[str, Any]) -> dict[str, Any]:
    return {"command": command, "data": data, "protocol": protocol, "values": values}


def newest_or(bundle: str | None) -> Path:
    """The bundle named, or the one made last below ``runs/``."""
    return Path(bundle) if bundle else bundles.newest()
