"""Clusters are compared with classes as partitions, whatever they are called; accuracy is that of the best names."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from mvmr.errors import MvmrError
from mvmr.evaluation.clustering import cluster, compare_clusters, silhouette
from mvmr.evaluation.evaluate import evaluate
from tests.evaluation.test_evaluate import COLOURS, a_bundle, write_photos

LABELS = np.repeat([0, 1, 2], [30, 20, 10])


def blobs(seed: int = 0) -> np.ndarray:
    """Three groups in other directions, of other lengths."""
    random = np.random.default_rng(seed)
    centres = np.array([[5.0, 0, 0, 0], [0, 50, 0, 0], [0, 0, 0.5, 0]])[LABELS]
    return (centres * (1 + 0.05 * random.normal(size=(60, 4)))).astype(np.float32)


def test_groups_are_found_whatever_their_length_and_order() -> None:
    order = np.random.default_rng(1).permutation(60)
    assigned = cluster(blobs(), blobs(1)[order], 3)
    figures = compare_clusters(assigned, LABELS[order])
    assert figures == pytest.approx({"nmi": 100, "ami": 100, "ari": 100, "accuracy": 100})
    assert silhouette(blobs(1)[order], assigned)["silhouette"] > 0.9
    assert np.array_equal(assigned, cluster(blobs(), blobs(1)[order], 3))


def test_accuracy_is_that_of_the_best_of_all_names() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        labels, assigned = random.integers(0, 4, (2, 50))
        best = max(np.mean(np.array(names)[assigned] == labels) for names in permutations(range(4)))
        assert compare_clusters(assigned, labels)["accuracy"] == pytest.approx(100 * best)


def test_mutual_information_is_its_definition() -> None:
    labels, assigned = np.random.default_rng(0).integers(0, 3, (2, 40))
    joint = np.array([[np.mean((labels == a) & (assigned == b)) for b in range(3)] for a in range(3)])
    p, q = joint.sum(1), joint.sum(0)
    information = sum(
        joint[a, b] * np.log(joint[a, b] / (p[a] * q[b])) for a in range(3) for b in range(3) if joint[a, b]
    )
    entropies = [-(part * np.log(part)).sum() for part in (p, q)]
    assert compare_clusters(assigned, labels)["nmi"] == pytest.approx(100 * information / np.mean(entropies))


def test_random_clusters_are_worth_nothing() -> None:
    labels, assigned = np.random.default_rng(0).integers(0, 5, (2, 3000))
    figures = compare_clusters(assigned, labels)
    assert abs(figures["ami"]) < 0.5
    assert abs(figures["ari"]) < 0.5
    assert figures["accuracy"] < 25


def test_a_cluster_that_no_drawn_image_has_leaves_no_silhouette(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvmr.evaluation.clustering._LARGEST", 40)
    rows = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    drawn = np.random.default_rng(0).permutation(60)[:40]
    left_out = np.setdiff1d(np.arange(60), drawn)
    assert silhouette(rows, np.isin(np.arange(60), left_out[:1]).astype(np.int64)) == {}
    assert "silhouette" in silhouette(rows, np.isin(np.arange(60), drawn[:3]).astype(np.int64))


def test_equal_features_are_one_cluster_and_have_no_silhouette() -> None:
    rows = np.ones((12, 3), np.float32)
    assigned = cluster(rows, rows, 3)
    assert len(np.unique(assigned)) == 1
    assert silhouette(rows, assigned) == {}


@pytest.mark.slow
def test_a_bundle_is_measured_and_keeps_the_figures(tmp_path: Path) -> None:
    bundle = a_bundle(tmp_path / "runs" / "mine")
    photos = write_photos(tmp_path / "photos", dict.fromkeys(COLOURS, 10))
    figures = evaluate(bundle.path, str(photos), protocols=["clustering"])["clustering"]
    assert figures.keys() == {"nmi", "ami", "ari", "accuracy", "silhouette"}
    assert figures["accuracy"] == 100  # of three colours
    with pytest.raises(MvmrError, match="numbers of neighbours are for protocol knn, which was not asked for"):
        evaluate(bundle.path, str(photos), protocols=["clustering"], ks=[5])
