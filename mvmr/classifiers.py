"""Classifiers on frozen features: weighted k nearest neighbours and the linear probe."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import faiss
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from mvmr.errors import MvmrError

_STRENGTHS = (1.0, 10.0, 100.0)  # of C, the inverse regularisation, for features of a mean square norm of 1
_ITERATIONS = 200  # a fit that has not converged by then is as good a classifier, and is taken as it is
_FEWEST = 5  # images of a class of which a fifth can be held out
_SMALL = 1e9  # multiply-adds in a pass over the rows; below, threads wait for each other longer than they work
_NEVER = -1e9


@dataclass(frozen=True)
class LinearHead:
    """logits = features @ weight.T + bias.

    weight: [C, D] float32, bias: [C] float32, for raw features: the probe's standardisation is folded in.
    """

    weight: np.ndarray
    bias: np.ndarray
    regularisation: float  # the chosen C of logistic regression

    def predict(self, features: np.ndarray) -> np.ndarray:
        """[N, D] -> class indices [N] int64."""
        return (features @ self.weight.T + self.bias).argmax(1)


def linear_probe(features: np.ndarray, labels: np.ndarray, classes: int, *, seed: int = 0) -> LinearHead:
    """Fit logistic regression on frozen features of the training split.

    The regularisation is chosen on a fifth of them, held out by class (of a class with fewer than 5 images, none is),
    then the probe is fitted on all. Where nothing can be held out it is the strongest.

    Shapes:
        features: [N, D] float32, labels: [N] integers below ``classes``.

    Raises:
        MvmrError: all labels are the same.
    """
    counts = np.bincount(labels, minlength=classes)
    if np.count_nonzero(counts) < 2:
        raise MvmrError("all training images are of one class: a linear probe needs images of two or more")
    scaler = StandardScaler().fit(features)
    space = _RowSpace((scaler.transform(features) / np.sqrt(features.shape[1])).astype(np.float32))
    strength = _choose_strength(space.rows, labels, counts, seed)
    solver = _solve(space.rows, labels, strength)
    coefficients, intercept = space.back(solver.coef_), solver.intercept_
    if len(solver.classes_) == 2:  # scikit-learn keeps one row for two classes
        coefficients, intercept = np.vstack([-coefficients, coefficients]) / 2, np.hstack([-intercept, intercept]) / 2
    weight, bias = np.zeros((classes, features.shape[1])), np.full(classes, _NEVER)  # of a class that was never seen
    weight[solver.classes_] = coefficients / (scaler.scale_ * np.sqrt(features.shape[1]))
    bias[solver.classes_] = intercept - weight[solver.classes_] @ scaler.mean_
    return LinearHead(weight.astype(np.float32), bias.astype(np.float32), strength)


def _choose_strength(x: np.ndarray, labels: np.ndarray, counts: np.ndarray, seed: int) -> float:
    splittable = np.flatnonzero(counts[labels] >= _FEWEST)
    if len(splittable) == 0:
        return _STRENGTHS[0]
    fit, held = train_test_split(splittable, test_size=0.2, random_state=seed, stratify=labels[splittable])
    fit = np.concatenate([fit, np.flatnonzero(counts[labels] < _FEWEST)])
    right = {c: (_solve(x[fit], labels[fit], c).predict(x[held]) == labels[held]).sum() for c in _STRENGTHS}
    return max(_STRENGTHS, key=lambda c: right[c])  # of equals the most regularised


def _solve(x: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
    solver = LogisticRegression(C=strength, max_iter=_ITERATIONS)
    threads = 1 if x.size * (labels.max() + 1) < _SMALL else None
    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return solver.fit(x, labels)


class _RowSpace:
    """Coordinates of rows in the space they span: with more columns than rows an exact rotation, and far less work.

    The solution of a regularised linear classifier lies in that space.

    rows: [N, min(N, D)] float32.
    """

    def __init__(self, x: np.ndarray):
        self.basis: np.ndarray | None = None  # [D, N]
        self.rows = x
        if x.shape[1] > x.shape[0] and x.any():  # a collapsed encoder's features span nothing
            values, vectors = np.linalg.eigh((x @ x.T).astype(np.float64))
            kept = values > values[-1] * 1e-6
            self.rows = (vectors[:, kept] * np.sqrt(values[kept])).astype(np.float32)
            self.basis = x.T @ (vectors[:, kept] / np.sqrt(values[kept])).astype(np.float32)

    def back(self, coefficients: np.ndarray) -> np.ndarray:
        """[C, K] on ``rows`` -> [C, D] on the rows as they were given."""
        return coefficients if self.basis is None else coefficients @ self.basis.T


def knn_predict(
    features: np.ndarray, labels: np.ndarray, queries: np.ndarray, classes: int, *, k: int = 5, temperature: float = 0.1
) -> np.ndarray:
    """Classes of ``queries`` by the k most similar training features, each voting exp(cosine / temperature).

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (2018), section 3.4.

    Shapes:
        features: [N, D], queries: [M, D] float32, not normalised; returns [M] int64.
    """
    similarity, neighbour = nearest(features, queries, k)
    votes = np.zeros((len(queries), classes))
    np.add.at(votes, (np.arange(len(queries))[:, None], labels[neighbour]), np.exp(similarity / temperature))
    return votes.argmax(1)


def nearest(features: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and row numbers of the k features most similar to each query, most similar first.

    Shapes:
        features: [N, D], queries: [M, D] float32, not normalised; returns [M, min(k, N)] float32 and int64.
    """
    bank = _normalised(features)
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank)
    similarity, neighbour = index.search(_normalised(queries), min(k, len(bank)))
    return similarity, neighbour


def _normalised(features: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(features, dtype=np.float32).copy()
    faiss.normalize_L2(rows)
    return rows
