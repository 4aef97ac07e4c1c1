"""Clusters against classes, as the literature of clustering reports them."""

from __future__ import annotations

import warnings

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.metrics.cluster import contingency_matrix
from sklearn.preprocessing import normalize

_STARTS = 10
_LARGEST = 10_000  # rows of which the silhouette compares every pair


def cluster(features: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """Cluster features by k-means (k-means++, ten starts, one seed), on the sphere, and give each query its cluster.

    Shapes: features [N, D], queries [M, D] float32, not normalised; returns int64 [M], 0 to count - 1.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters: some stay empty
        means = KMeans(count, n_init=_STARTS, random_state=0).fit(normalize(features))
    return np.asarray(means.predict(normalize(queries)), np.int64)


def compare_clusters(assigned: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well clusters are classes, in percent: 100 is the same partition under other names.

    nmi: mutual information over the mean of both entropies; ami, ari: 0 in expectation for random clusters
    accuracy: images whose class is their cluster's, each cluster being given a class of its own, as well as can be
        (Hungarian method; Kuhn 1955)

    Shapes: int64 [M] each.
    """
    table = contingency_matrix(labels, assigned)
    classes, clusters = linear_sum_assignment(table, maximize=True)
    return {
        "nmi": 100 * float(normalized_mutual_info_score(labels, assigned)),
        "ami": 100 * float(adjusted_mutual_info_score(labels, assigned)),
        "ari": 100 * float(adjusted_rand_score(labels, assigned)),
        "accuracy": 100 * float(table[classes, clusters].sum() / len(labels)),
    }


def silhouette(queries: np.ndarray, assigned: np.ndarray) -> dict[str, float]:
    """``silhouette``, -1 to 1, by cosine: how much nearer images are to their own cluster than to the next one.

    Of more than 10,000 images, of so many that are drawn. Nothing where all are of one cluster, or each of its own.
    """
    if len(queries) > _LARGEST:
        drawn = np.random.default_rng(0).permutation(len(queries))[:_LARGEST]
        queries, assigned = queries[drawn], assigned[drawn]
    if not 1 < len(np.unique(assigned)) < len(assigned):
        return {}
    score = silhouette_score(queries, assigned, metric="cosine")
    return {"silhouette": float(score)}
