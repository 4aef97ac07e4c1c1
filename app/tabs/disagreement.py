"""Where teacher and student disagree: neighbour overlap image by image and class by class, as `mvmr report` has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mvmr.app.table import to_csv
from mvmr.app.tabs.probes import Probes
from mvmr.distillation.report.fidelity import interval, predictions
from mvmr.distillation.report.images import SEED
from mvmr.evaluation.neighbours import neighbour_overlap

Floats = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]
Advance = Callable[[int, int], None]
RIGHT = ("neither", "teacher only", "student only", "both")


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval, in one unit."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Accuracy:
    """Percent right of a class by the probes of both sides; difference: student minus teacher, in points."""

    teacher: float
    student: float
    difference: Interval


@dataclass(frozen=True)
class ClassFidelity:
    """One class; overlap in percent; accuracy: None where there are no probes."""

    name: str
    images: int
    overlap: Interval
    accuracy: Accuracy | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Fidelity:
    """How faithful the student is to its teacher on the images of a gallery.

    k: neighbours compared; chance: the overlap, in percent, of two encoders that share nothing
    overlap: float64 [N], percent of each image's k neighbours that both sides have; overall: their mean
    classes: those with images, the lowest overlap first; None where there are no labels
    probes: None where they were not fitted; agreement: percent of the images they put into the same class
    """

    k: int
    chance: float
    overlap: Floats
    overall: Interval
    labels: Labels | None
    class_names: tuple[str, ...]
    classes: tuple[ClassFidelity, ...] | None
    probes: Probes | None
    agreement: float | None

    @classmethod
    def of(
        cls,
        overlap: Floats,
        k: int,
        labels: Labels | None = None,
        classes: Sequence[str] | None = None,
        *,
        probes: Probes | None = None,
    ) -> Fidelity:
        """From the overlap of each image in percent, [N]; see :func:`fidelity_of`."""
        names = tuple(classes or ())
        comparison = None
        if labels is not None and probes is not None:
            comparison = predictions(labels, names, probes.student.predicted, probes.teacher.predicted, seed=SEED)
        return cls(
            k=k,
            chance=100 * k / (len(overlap) - 1),
            overlap=overlap,
            overall=Interval(**interval(overlap, seed=SEED)),
            labels=labels,
            class_names=names,
            classes=None if labels is None else _by_class(overlap, labels, names, comparison),
            probes=None if labels is None else probes,
            agreement=None if comparison is None else comparison["agreement"],
        )

    def worst(self, of_class: str | None = None) -> Labels:
        """Numbers of the images, all or those of a class, the lowest overlap first: int64 [<= N]."""
        order: Labels = np.argsort(self.overlap, kind="stable")
        if of_class is None or self.labels is None:
            return order
        return order[self.labels[order] == self.class_names.index(of_class)]

    @property
    def right(self) -> npt.NDArray[np.uint8] | None:
        """Which side's probe is right about each image, a number into `RIGHT`: uint8 [N]; None without probes."""
        if self.labels is None or self.probes is None:
            return None
        teacher, student = (side.predicted == self.labels for side in (self.probes.teacher, self.probes.student))
        return (teacher + 2 * student).astype(np.uint8)

    def images_csv(self, keys: Sequence[str]) -> str:
        """A line for every image, the lowest overlap first; keys: their names, in the gallery's order."""
        columns = ["image", f"overlap@{self.k} (%)"]
        columns += [] if self.labels is None else ["class"]
        right = self.right
        columns += [] if right is None else ["teacher says", "student says", "right"]
        lines = []
        for i in self.worst().tolist():
            line: list[object] = [keys[i], float(self.overlap[i])]
            if self.labels is not None:
                line.append(self.class_names[self.labels[i]])
            if right is not None and self.probes is not None:
                predicted = (self.probes.teacher.predicted[i], self.probes.student.predicted[i])
                line += [*(self.class_names[number] for number in predicted), RIGHT[right[i]]]
            lines.append(line)
        return to_csv(columns, lines)

    def classes_csv(self) -> str:
        """A line for every class, the lowest overlap first; only the header where there are no labels."""
        columns = ["class", "images", *_ends(f"overlap@{self.k}", "%")]
        if self.probes is not None:
            columns += ["teacher's accuracy (%)", "student's accuracy (%)", *_ends("difference", "points")]
        lines: list[list[object]] = []
        for row in self.classes or ():
            line: list[object] = [row.name, row.images, *asdict(row.overlap).values()]
            if row.accuracy is not None:
                line += [row.accuracy.teacher, row.accuracy.student, *asdict(row.accuracy.difference).values()]
            lines.append(line)
        return to_csv(columns, lines)


def fidelity_of(
    teacher: Floats,
    student: Floats,
    k: int,
    labels: Labels | None = None,
    classes: Sequence[str] | None = None,
    *,
    probes: Probes | None = None,
) -> Fidelity:
    """Compare the k nearest neighbours of every image under teacher and student, by the figures of `mvmr report`.

    Args:
        labels: of the images, numbers into `classes`; without them nothing is told by class.
        probes: both sides' linear probes, for the accuracies; they take labels.

    Shapes:
        teacher: [N, D1], student: [N, D2] float32, row i of both is of the same image; labels: int64 [N].

    Raises:
        MvmrError: k is below 1, or there are not k other images.
    """
    return Fidelity.of(100 * neighbour_overlap(teacher, student, k), k, labels, classes, probes=probes)


def _ends(title: str, unit: str) -> list[str]:
    return [f"{title} ({unit})", f"{title}, low ({unit})", f"{title}, high ({unit})"]


def _by_class(
    overlap: Floats, labels: Labels, classes: Sequence[str], comparison: Mapping[str, Any] | None
) -> tuple[ClassFidelity, ...]:
    accuracies = {
        row["name"]: Accuracy(row["teacher"], row["student"], Interval(row["difference"], row["low"], row["high"]))
        for row in (comparison["classes"] if comparison else ())
    }
    rows = []
    for number, name in enumerate(classes):
        own = overlap[labels == number]
        if len(own):
            mean = Interval(**interval(own, seed=SEED))
            rows.append(ClassFidelity(name, len(own), mean, accuracies.get(name)))
    return tuple(sorted(rows, key=lambda row: row.overlap.mean))
