"""Which class is taken for which; every figure beside scikit-learn's."""

import csv
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score
from sklearn.preprocessing import StandardScaler

from mvmr.evaluation.classifiers import AdamConfig, adam_probe, class_weights, linear_probe
from mvmr.evaluation.confusion import Confusion

CLASSES = ("cat", "dog", "owl", "elk")
LABELS = np.array([0] * 12 + [1] * 5 + [2] * 3)  # no elk
PREDICTED = np.array([0] * 9 + [1, 1, 3] + [1] * 4 + [0] + [2, 0, 0])


def test_figures_are_scikit_learns() -> None:
    confusion = Confusion.of(PREDICTED, LABELS, CLASSES)
    assert np.array_equal(confusion.counts, confusion_matrix(LABELS, PREDICTED, labels=range(4)))
    figures = confusion.figures()
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = balanced_accuracy_score(LABELS, PREDICTED)
    assert figures["balanced_accuracy"] == pytest.approx(100 * balanced)
    macro = f1_score(LABELS, PREDICTED, labels=[0, 1, 2], average="macro")  # of those with images
    assert figures["macro_f1"] == pytest.approx(100 * macro)


def test_the_commonest_mistakes_are_named() -> None:
    assert (
        Confusion.of(PREDICTED, LABELS, CLASSES).worst()
        == "cat as dog (2 of 12), owl as cat (2 of 3), cat as elk (1 of 12)"
    )
    assert Confusion.of(LABELS, LABELS, CLASSES).worst() == ""


def test_the_file_is_read_back(tmp_path: Path) -> None:
    confusion = Confusion.of(PREDICTED, LABELS, ("a, b", 'say "c"', "d", "e"))
    confusion.write(tmp_path / "confusion.csv")
    with open(tmp_path / "confusion.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[1:] == [row[0] for row in rows] == list(confusion.classes)
    assert [[int(cell) for cell in row[1:]] for row in rows] == confusion.counts.tolist()


@pytest.fixture
def rare() -> tuple[np.ndarray, np.ndarray]:
    """Two clouds that overlap, one of them twelve times as large."""
    random = np.random.default_rng(0)
    labels = np.array([0] * 360 + [1] * 30)
    return (random.normal(size=(390, 6)) + 0.6 * labels[:, None]).astype(np.float32), labels


def test_balanced_probes_recognise_the_rare_class(rare: tuple[np.ndarray, np.ndarray]) -> None:
    features, labels = rare
    for fit in (linear_probe, partial(adam_probe, config=AdamConfig(epochs=60, batch_size=64, lrs=(1e-2,)))):
        plain, even = (
            Confusion.of(fit(features, labels, 2, balanced=balanced).predict(features), labels, ("a", "b"))
            for balanced in (False, True)
        )
        assert even.counts[1, 1] > plain.counts[1, 1]
        assert even.figures()["balanced_accuracy"] > plain.figures()["balanced_accuracy"] + 5


def test_balanced_weights_are_scikit_learns(rare: tuple[np.ndarray, np.ndarray]) -> None:
    features, labels = rare
    x = StandardScaler().fit_transform(features) / np.sqrt(6)
    head = linear_probe(features, labels, 2, balanced=True)
    oracle = LogisticRegression(C=head.chosen["C"], class_weight="balanced", max_iter=200).fit(x, labels)
    logits = head.logits(features)
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], oracle.decision_function(x), rtol=1e-2, atol=1e-2)
    assert class_weights(labels, 3) == pytest.approx([390 / (2 * 360), 390 / (2 * 30), 195])
