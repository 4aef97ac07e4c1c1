"""The protocols by which frozen features are measured: fitted on the training split, scored once on the test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from mvmr.cores import usable_cores
from mvmr.data import ImageSet
from mvmr.errors import MvmrError, unknown
from mvmr.evaluation.classifiers import (
    PAPER,
    PAPER_VOC,
    LinearHead,
    adam_one_vs_all,
    adam_probe,
    linear_probe,
    one_vs_all,
)
from mvmr.evaluation.clustering import cluster, compare_clusters, silhouette
from mvmr.evaluation.confusion import Confusion
from mvmr.evaluation.neighbours import nearest, votes
from mvmr.evaluation.scores import Definition, mean_average_precision, top_k
from mvmr.representations import Representation
from mvmr.representations.cache import represent

Values = dict[str, float]
KS = (1, 5, 20, 200)
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Labelled:
    """Two labelled splits of the same classes, checked before any feature is computed.

    labels, test_labels: int64 [N], or [N, C] in VOC's code where an image has several (1, -1, 0 left out).
    """

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    labels: np.ndarray
    test_labels: np.ndarray

    @property
    def several(self) -> bool:
        """Whether an image has several labels."""
        return self.labels.ndim == 2

    @classmethod
    def of(cls, train: ImageSet, test: ImageSet) -> Labelled:
        """Read the labels of both splits.

        Raises:
            MvmrError: there are none, the splits' classes differ, there is one class only, or a class of the test
                split has no image in the training split.
        """
        classes, labels = _labels(train)
        test_classes, test_labels = _labels(test)
        if test_classes != classes:
            odd = sorted(set(test_classes) ^ set(classes))[0]
            raise MvmrError(f"{train.name}: training and test split have other classes ({odd!r} is in one only)")
        data = cls(train, test, classes, labels, test_labels)
        in_train, in_test = data._counts(labels) > 0, data._counts(test_labels) > 0
        if np.count_nonzero(in_train) < 2:
            raise MvmrError(f"{train.name}: all training images are of one class; measuring needs two or more")
        if len(absent := np.flatnonzero(in_test & ~in_train)):
            raise MvmrError(
                f"{train.name}: class {classes[absent[0]]!r} is in the test split and has no image in the training "
                "split; put some there, or leave the class out of both"
            )
        if data.several and len(lacking := np.flatnonzero(~in_test)):
            raise MvmrError(
                f"{test.name}: class {classes[lacking[0]]!r} has no image in the test split: no precision to measure"
            )
        return data

    def _counts(self, labels: np.ndarray) -> np.ndarray:
        if self.several:
            return (labels > 0).sum(0)
        return np.bincount(labels, minlength=len(self.classes))


class Measured:
    """Features of both splits under one representation; every test image is counted in every protocol.

    Args:
        classify: gives features classes that were found without labels, where the representation has such.
        balanced: whether the linear probe weighs each class alike, however many images it has.
    """

    def __init__(
        self, representation: Representation, data: Labelled, *, device: str = "cpu", progress: bool = False,
        classify: Callable[[np.ndarray], np.ndarray] | None = None, balanced: bool = False,
    ) -> None:  # fmt: skip
        self.data, self._progress, self._classify, self._balanced = data, progress, classify, balanced
        workers = 0 if data.train.native_size else usable_cores()  # arrays in memory need no help
        self.features, self.test_features = (
            represent(images, representation, device=device, workers=workers, progress=progress)
            for images in (data.train, data.test)
        )

    @cached_property
    def head(self) -> LinearHead:
        """The linear probe of protocol ``linear``, or of ``voc07`` where an image has several labels."""
        if self.data.several:
            return one_vs_all(self.features, self.data.labels)
        return linear_probe(
            self.features, self.data.labels, len(self.data.classes), balanced=self._balanced, progress=self._progress
        )

    def confusion(self) -> Confusion:
        """Which class of the test split the linear probe takes for which; of one label to an image."""
        return Confusion.of(self.head.predict(self.test_features), self.data.test_labels, self.data.classes)

    def linear(self) -> Values:
        """``top1``, ``top5``, ``balanced_accuracy`` and ``macro_f1`` in percent (:mod:`mvmr.evaluation.confusion`), and
        the hyper-parameter that was chosen on a part of the training split."""
        return self._score(self.head)

    def linear_paper(self) -> Values:
        """As ``linear``, by the paper's 100 epochs of Adam (1e-3); the last one counts, and nothing is chosen."""
        classes = len(self.data.classes)
        return self._score(adam_probe(self.features, self.data.labels, classes, PAPER, progress=self._progress))

    def knn(self, ks: Sequence[int] | None = None) -> Values:
        """``top1_weighted_k5`` and ``top1_plain_k5`` in percent, and so on for every k.

        Weighted: each of the k nearest by cosine votes exp(cosine / 0.07); plain: each has one vote.

        Args:
            ks: left out, those of 1, 5, 20 and 200 for which there are training images enough.

        Raises:
            MvmrError: as :func:`check_ks`.
        """
        classes, labels = len(self.data.classes), self.data.labels
        numbers = [k for k in KS if k <= len(labels)] if ks is None else list(ks)
        check_ks(numbers, self.data)
        similarity, neighbour = nearest(self.features, self.test_features, max(numbers))
        values = {}
        for k in numbers:
            for name, temperature in (("weighted", TEMPERATURE), ("plain", None)):
                totals = votes(similarity[:, :k], labels[neighbour[:, :k]], classes, temperature=temperature)
                values[f"top1_{name}_k{k}"] = 100 * float((totals.argmax(1) == self.data.test_labels).mean())
        return values

    def clustering(self) -> Values:
        """``nmi``, ``ami``, ``ari``, ``accuracy`` in percent and ``silhouette``: k-means, a cluster to a class.

        Fitted on the training split without its labels; see :mod:`mvmr.evaluation.clustering`. Where the representation
        has classes of its own, the same of them as ``own_nmi`` and so on, and ``own_classes``, how many there are among
        test images; with more of them than classes, accuracy counts only one for each class.
        """
        assigned = cluster(self.features, self.test_features, len(self.data.classes))
        values = compare_clusters(assigned, self.data.test_labels) | silhouette(self.test_features, assigned)
        if self._classify is not None:
            own = self._classify(self.test_features)
            figures = compare_clusters(own, self.data.test_labels) | silhouette(self.test_features, own)
            values |= {f"own_{name}": value for name, value in figures.items()} | {"own_classes": len(np.unique(own))}
        return values

    def voc07(self) -> Values:
        """``map_area`` and ``map_11point`` in percent: means over classes of the average precision."""
        return self._precision(self.head)

    def voc07_paper(self) -> Values:
        """As ``voc07``, by the released code's 1000 epochs of Adam (1e-4, batches of 32); nothing is chosen."""
        return self._precision(adam_one_vs_all(self.features, self.data.labels, PAPER_VOC, progress=self._progress))

    def _precision(self, head: LinearHead) -> Values:
        logits = head.logits(self.test_features)

        def score(definition: Definition) -> float:
            mean, _ = mean_average_precision(logits, self.data.test_labels, self.data.classes, definition=definition)
            return mean

        return {"map_11point": score("voc07"), "map_area": score("area"), **head.chosen}

    def _score(self, head: LinearHead) -> Values:
        return classification(head.logits(self.test_features), self.data.test_labels, self.data.classes) | dict(
            head.chosen
        )


def classification(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> Values:
    """``top1``, ``top5`` (of more than 5 classes), ``balanced_accuracy`` and ``macro_f1`` in percent.

    Shapes: logits: [N, C] floating, labels: [N] integers in [0, C).
    """
    tops = {f"top{k}": top_k(logits, labels, k) for k in (1, 5) if k < len(classes)}
    return tops | Confusion.of(logits.argmax(1), labels, classes).figures()


# By name; the first set for one label to an image, the second for several.
SINGLE: dict[str, Callable[[Measured], Values]] = {
    "linear": Measured.linear,
    "linear-paper": Measured.linear_paper,
    "knn": Measured.knn,
    "clustering": Measured.clustering,
}
SEVERAL: dict[str, Callable[[Measured], Values]] = {
    "voc07": Measured.voc07,
    "voc07-paper": Measured.voc07_paper,
}
DEFAULTS = {False: ("linear", "knn"), True: ("voc07",)}


def check_protocols(names: Sequence[str]) -> None:
    """Refuse names that are no protocol.

    Raises:
        MvmrError: naming the nearest one.
    """
    for name in names:
        if name not in SINGLE | SEVERAL:
            raise unknown("protocol", name, SINGLE | SEVERAL)


def check_ks(ks: Sequence[int], data: Labelled) -> None:
    """Refuse numbers of neighbours that can't be counted.

    Raises:
        MvmrError: a k below 1, or more than there are training images.
    """
    if not ks or min(ks) < 1:
        raise MvmrError("kNN takes one or more neighbours: give numbers such as 5 or 1,5,20")
    if max(ks) > len(data.labels):
        raise MvmrError(
            f"kNN with k = {max(ks)}: {data.train.name} has {len(data.labels)} training images; give a smaller k"
        )


def protocols_for(
    data: Labelled, names: Sequence[str] | None, *, ks: Sequence[int] | None = None
) -> dict[str, Callable[[Measured], Values]]:
    """The protocols asked for, or those that suit the data; ``knn`` with the numbers of neighbours in ``ks``.

    Raises:
        MvmrError: an unknown protocol, or one for another kind of labels; or as :func:`check_ks`.
    """
    choices = SEVERAL if data.several else SINGLE
    selection = DEFAULTS[data.several] if names is None else names
    check_protocols(selection)
    if unfit := [name for name in selection if name not in choices]:
        kind = "several labels" if data.several else "one label"
        raise MvmrError(
            f"protocol {unfit[0]} does not fit {data.train.name}, which has {kind} to an image; "
            f"use {', '.join(choices)}"
        )
    if ks is None:
        return {name: choices[name] for name in selection}
    if "knn" not in selection:
        raise MvmrError("numbers of neighbours are for protocol knn, which was not asked for")
    check_ks(ks, data)
    return {name: partial(Measured.knn, ks=ks) if name == "knn" else choices[name] for name in selection}


def _labels(images: ImageSet) -> tuple[tuple[str, ...], np.ndarray]:
    labels = images.labels
    if labels is None or images.classes is None:
        raise MvmrError(
            f"{images.name} has no labels to measure with: put the images of each class into a folder of its own, or "
            "name files and labels in a table, table:labels.csv (docs/data.md)"
        )
    return images.classes, labels
