"""Nearest neighbours among frozen features, by cosine, and what they vote for."""

from __future__ import annotations

import faiss
import numpy as np

from mvmr.errors import MvmrError

_COMPARED = 10**7


class Bank:
    """Features to be searched by cosine, exactly: normalised and put into a FAISS index once. Threads may share it.

    Shapes:
        features: [N, D] float32, not normalised.
    """

    def __init__(self, features: np.ndarray) -> None:
        rows = _normalise(features)
        self._index = faiss.IndexFlatIP(rows.shape[1])
        self._index.add(rows)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(
        self, queries: np.ndarray, k: int, *, without: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and row numbers of the k features most similar to each query, most similar first.

        Args:
            without: for each query a row that is not to be found: its own, where it is one of the features.

        Shapes:
            queries: [M, D] float32, not normalised; without: [M] integers; returns [M, k] float32 and int64, with fewer
            columns where there are not k features, ``without`` left out.
        """
        count = min(k + (without is not None), len(self))
        similarity, neighbour = self._index.search(_normalise(queries), count)
        if without is None:
            return similarity, neighbour
        own = neighbour == without[:, None]
        # A row with as many copies or more may not be among its own nearest: then the last of them is one too many.
        own[~own.any(1), -1] = True
        shape = (len(queries), count - 1)
        return similarity[~own].reshape(shape), neighbour[~own].reshape(shape)


def nearest(features: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and row numbers of the k features most similar to each query, most similar first; exact.

    Shapes:
        features: [N, D], queries: [M, D] float32, not normalised; returns [M, min(k, N)] float32 and int64.
    """
    return Bank(features).search(queries, k)


def find_neighbours(features: np.ndarray, k: int) -> np.ndarray:
    """Row numbers of the k rows most similar to each row by cosine, most similar first; never the row itself.

    Shapes:
        features: [N, D] float32, not normalised; returns [N, k] int64.

    Raises:
        MvmrError: k is below 1, or there are not k other rows.
    """
    if not 1 <= k < len(features):
        raise MvmrError(f"{k} neighbours of each of {len(features)} images: give a k from 1 to {len(features) - 1}")
    return Bank(features).search(features, k, without=np.arange(len(features)))[1]


def neighbour_overlap(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """Share of each row's k nearest other rows, by cosine, that two descriptions of the same images have in common.

    Two descriptions that know nothing of each other share k / (N - 1) of them on average.

    Shapes:
        a: [N, D1], b: [N, D2] float32, row i of both is of the same image; returns [N] float64 in [0, 1].

    Raises:
        MvmrError: as :func:`find_neighbours`.
        ValueError: the descriptions differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"neighbours are compared row by row: got {len(a)} and {len(b)} of them")
    ours, theirs = find_neighbours(a, k), find_neighbours(b, k)
    step = max(1, _COMPARED // k**2)  # rows at a time: all at once would take N k^2 bytes
    parts = [
        (ours[i : i + step, :, None] == theirs[i : i + step, None, :]).any(2).mean(1) for i in range(0, len(ours), step)
    ]
    return np.concatenate(parts)


def votes(similarity: np.ndarray, labels: np.ndarray, classes: int, *, temperature: float | None) -> np.ndarray:
    """Votes of each query's neighbours: exp(cosine / temperature) each, or 1 each where there is no temperature.

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (2018), section 3.4.

    Shapes:
        similarity: [M, k] cosines and labels: [M, k] integers, of the neighbours; returns [M, classes] float64.
    """
    weights = np.ones_like(similarity) if temperature is None else np.exp((similarity - 1) / temperature)
    totals = np.zeros((len(labels), classes))
    np.add.at(totals, (np.arange(len(labels))[:, None], labels), weights)
    return totals


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


def _normalise(features: np.ndarray) -> np.ndarray:
    rows = np.array(features, dtype=np.float32, order="C")
    faiss.normalize_L2(rows)
    return rows
