"""Nearest neighbours among frozen features, by cosine, and what they vote for."""

from __future__ import annotations

import faiss
import numpy as np


def nearest(features: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and row numbers of the k features most similar to each query, most similar first; exact.

    Shapes:
        features: [N, D], queries: [M, D] float32, not normalised; returns [M, min(k, N)] float32 and int64.
    """
    bank, asked = _normalised(features), _normalised(queries)
    similarity, neighbour = faiss.knn(asked, bank, min(k, len(bank)), metric=faiss.METRIC_INNER_PRODUCT)
    return similarity, neighbour


def votes(similarity: np.ndarray, labels: np.ndarray, classes: int, *, temperature: float | None) -> np.ndarray:
    """Votes of each query's neighbours: exp(cosine / temperature) each, or 1 each where there is no temperature.

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (2018), section 3.4.

    Shapes:
        similarity: [M, k] cosines and labels: [M, k] integers, of the neighbours; returns [M, classes] float64.
    """
    weights = np.ones_like(similarity) if temperature is None else np.exp((similarity - 1) / temperature)
    counted = np.zeros((len(labels), classes))
    np.add.at(counted, (np.arange(len(labels))[:, None], labels), weights)
    return counted


def knn_predict(
    features: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    classes: int,
    *,
    k: int = 5,
    temperature: float | None = 0.07,
) -> np.ndarray:
    """Classes of ``queries`` by vote of the k most similar training features; of equal votes the lower class.

    Shapes:
        features: [N, D], queries: [M, D] float32, not normalised; returns [M] int64.
    """
    similarity, neighbour = nearest(features, queries, k)
    return votes(similarity, labels[neighbour], classes, temperature=temperature).argmax(1)


def _normalised(features: np.ndarray) -> np.ndarray:
    rows = np.array(features, dtype=np.float32, order="C")
    faiss.normalize_L2(rows)
    return rows
