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

_STRENGTHS = (1.0, 10.0, 100.0)  # of C, the inverse regularisation, for features of a mean square norm of 1
_ITERATIONS = 200  # a fit that has not converged by then is as good a classifier, and is taken as it is
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

    The regularisation is chosen on a fifth of them, held out by class, then the probe is fitted on all.

    Shapes:
        features: [N, D] float32, labels: [N] integers below ``classes``.
    """
    fit, held = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
    accuracy = {
        c: float((_fit(features[fit], labels[fit], classes, c).predict(features[held]) == labels[held]).mean())
        for c in _STRENGTHS
    }
    best = max(_STRENGTHS, key=lambda c: accuracy[c])  # of equals the most regularised
    return _fit(features, labels, classes, best)


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


def _fit(features: np.ndarray, labels: np.ndarray, classes: int, strength: float) -> LinearHead:
    scaler = StandardScaler().fit(features)
    width = np.sqrt(features.shape[1])
    x = (scaler.transform(features) / width).astype(np.float32)
    # The solution lies in the span of the rows: with more columns than rows a rotation onto it is exact, and faster.
    basis = np.linalg.qr(x.T)[0] if x.shape[1] > x.shape[0] else None
    solver = LogisticRegression(C=strength, max_iter=_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solver.fit(x if basis is None else x @ basis, labels)
    coefficients = solver.coef_ if basis is None else solver.coef_ @ basis.T
    intercept = solver.intercept_
    if len(solver.classes_) == 2:  # scikit-learn keeps one row for two classes
        coefficients, intercept = (
            np.vstack([-coefficients, coefficients]) / 2,
            np.array([-intercept[0], intercept[0]]) / 2,
        )
    weight, bias = np.zeros((classes, features.shape[1])), np.full(classes, _NEVER)  # of a class that was never seen
    weight[solver.classes_] = coefficients / (scaler.scale_ * width)
    bias[solver.classes_] = intercept - weight[solver.classes_] @ scaler.mean_
    return LinearHead(weight.astype(np.float32), bias.astype(np.float32), strength)
