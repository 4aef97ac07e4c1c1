"""Which class is taken for which: counts, and figures that a large class can't hide small ones behind."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import confusion_matrix

from mvmr.storage.atomic import atomic

_SHOWN = 3


@dataclass(frozen=True)
class Confusion:
    """counts: int64 [C, C], a row for each class as labelled, a column for each as predicted; classes: their names."""

    counts: np.ndarray
    classes: tuple[str, ...]

    @classmethod
    def of(cls, predicted: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> Confusion:
        """Count int64 [N] predictions beside int64 [N] labels."""
        return cls(confusion_matrix(labels, predicted, labels=np.arange(len(classes))), classes)

    def figures(self) -> dict[str, float]:
        """``balanced_accuracy``, the mean share of a class that is recognised, and ``macro_f1``, the mean F1 of the
        classes, both in percent, of the classes that have images."""
        right, there, said = np.diag(self.counts), self.counts.sum(1), self.counts.sum(0)
        some = there > 0
        recall, f1 = right[some] / there[some], 2 * right[some] / (there + said)[some]
        return {"balanced_accuracy": 100 * float(recall.mean()), "macro_f1": 100 * float(f1.mean())}

    def worst(self) -> str:
        """The commonest mistakes, "cat as dog (12 of 40)"; "" where there are none."""
        wrong = self.counts - np.diag(np.diag(self.counts))
        order = np.argsort(-wrong, axis=None, kind="stable")[:_SHOWN]
        pairs = [divmod(int(cell), len(self.classes)) for cell in order if wrong.flat[cell] > 0]
        return ", ".join(
            f"{self.classes[row]} as {self.classes[column]} ({wrong[row, column]} of {self.counts[row].sum()})"
            for row, column in pairs
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """As CSV: a line for each class as labelled, a column for each as predicted."""
        with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["labelled \\ predicted", *self.classes])
            writer.writerows([name, *row] for name, row in zip(self.classes, self.counts.tolist(), strict=True))
