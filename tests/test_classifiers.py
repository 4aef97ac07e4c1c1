"""The probe is scikit-learn's plain pipeline with its scaling folded in, kNN is scikit-learn's, and few images do."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from mvmr.classifiers import knn_predict, linear_probe, nearest
from mvmr.data import open_images
from mvmr.errors import MvmrError

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def digits() -> Split:
    """Pixels of 400 training and all test digits: hard enough that the regularisation matters."""
    train, test = open_images("sample:digits", "train"), open_images("sample:digits", "test")
    assert train.labels is not None
    assert test.labels is not None

    def features(images: object, count: int) -> np.ndarray:
        return np.stack([np.asarray(images.load(i).resize((12, 12)).convert("L"), np.float32) for i in range(count)])  # type: ignore[attr-defined]

    noise = np.random.default_rng(0).normal(0, 60, (len(train) + len(test), 144)).astype(np.float32)
    x, y = features(train, 400).reshape(400, -1), features(test, len(test)).reshape(len(test), -1)
    return x + noise[:400], train.labels[:400], y + noise[-len(test) :], test.labels


def plain(features: np.ndarray, strength: float) -> object:
    """StandardScaler, division by the root of the width, logistic regression to convergence."""
    scale = FunctionTransformer(lambda x: x / np.sqrt(features.shape[1]))
    return make_pipeline(StandardScaler(), scale, LogisticRegression(C=strength, max_iter=5000))


def wide(split: Split) -> Split:
    """The same through a random map to more columns than there are rows."""
    x, labels, queries, answers = split
    into = np.random.default_rng(1).normal(size=(144, 900)).astype(np.float32)
    return np.maximum(x @ into, 0), labels, np.maximum(queries @ into, 0), answers


@pytest.mark.parametrize("columns", ["fewer columns than rows", "more columns than rows"])
def test_the_probe_agrees_with_scikit_learns_plain_pipeline(digits: Split, columns: str) -> None:
    x, labels, queries, answers = digits if columns.startswith("fewer") else wide(digits)
    head = linear_probe(x, labels, 10)
    assert head.weight.shape == (10, x.shape[1])
    assert head.bias.shape == (10,)
    assert head.weight.dtype == head.bias.dtype == np.float32
    reference = plain(x, head.regularisation).fit(x, labels)  # type: ignore[attr-defined]
    ours, theirs = (100 * (found == answers).mean() for found in (head.predict(queries), reference.predict(queries)))
    assert abs(ours - theirs) <= 0.2
    assert ours > 60
    assert (head.predict(queries) == reference.predict(queries)).mean() > 0.99


def test_the_probe_chooses_its_strength_without_the_test_split(digits: Split) -> None:
    x, labels, queries, answers = digits
    head = linear_probe(x, labels, 10)
    assert np.array_equal(head.weight, linear_probe(x, labels, 10).weight)
    accuracy = {
        c: (plain(x, c).fit(x, labels).predict(queries) == answers).mean()  # type: ignore[attr-defined]
        for c in (1.0, 10.0, 100.0)
    }
    assert accuracy[head.regularisation] >= max(accuracy.values()) - 0.03


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_probe_does_not_mind_scale_shift_or_a_constant_column(digits: Split, scale: float) -> None:
    x, labels, queries, answers = digits
    constant = np.full((len(x), 1), 7.0, np.float32), np.full((len(queries), 1), 7.0, np.float32)
    moved, asked = (np.hstack([rows * scale + scale, more]) for rows, more in zip((x, queries), constant, strict=True))
    head = linear_probe(moved, labels, 10)
    assert np.isfinite(head.weight).all()
    assert (
        abs((head.predict(asked) == answers).mean() - (linear_probe(x, labels, 10).predict(queries) == answers).mean())
        < 0.01
    )


def test_two_classes_have_two_rows(digits: Split) -> None:
    x, labels, queries, answers = digits
    known, asked = labels < 2, answers < 2
    head = linear_probe(x[known], labels[known], 2)
    assert head.weight.shape == (2, 144)
    reference = plain(x, head.regularisation).fit(x[known], labels[known])  # type: ignore[attr-defined]
    assert np.array_equal(head.predict(queries[asked]), reference.predict(queries[asked]))
    logits = queries[asked] @ head.weight.T + head.bias
    np.testing.assert_allclose(
        logits[:, 1] - logits[:, 0], reference.decision_function(queries[asked]), rtol=1e-2, atol=1e-2
    )


def test_a_class_without_training_images_is_never_predicted(digits: Split) -> None:
    x, labels, queries, _ = digits
    kept = labels != 4
    head = linear_probe(x[kept], labels[kept], 12)
    assert head.weight.shape == (12, 144)
    assert np.isfinite(head.bias).all()
    assert not set(head.predict(queries)) & {4, 10, 11}
    assert not set(knn_predict(x[kept], labels[kept], queries, 12)) & {4, 10, 11}


@pytest.mark.parametrize("per_class", [1, 2, 4, 5, 6])
def test_few_images_of_a_class_are_enough(digits: Split, per_class: int) -> None:
    x, labels, queries, answers = digits
    few = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)])
    head = linear_probe(x[few], labels[few], 10)
    assert (head.predict(queries) == answers).mean() > 0.15
    assert (knn_predict(x[few], labels[few], queries, 10, k=50) == answers).mean() > 0.15
    rare = np.concatenate([few, np.flatnonzero(labels == 3)])  # one class with many
    assert (linear_probe(x[rare], labels[rare], 10).predict(queries) == answers).mean() > 0.1


def test_one_class_alone_is_refused(digits: Split) -> None:
    x, labels, _, _ = digits
    with pytest.raises(MvmrError, match="all training images are of one class: a linear probe needs images of two"):
        linear_probe(x[labels == 3], labels[labels == 3], 10)


@pytest.mark.parametrize("width", [3, 900])
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_collapsed_encoder_scores_like_chance(digits: Split, width: int, value: float) -> None:
    _, labels, _, answers = digits
    same, asked = np.full((len(labels), width), value, np.float32), np.full((len(answers), width), value, np.float32)
    head = linear_probe(same, labels, 10)
    assert np.isfinite(head.weight).all()
    assert len(set(head.predict(asked))) == 1
    assert (knn_predict(same, labels, asked, 10) == answers).mean() < 0.3  # whichever of the equals are taken


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_is_scikit_learns_with_the_same_weights(digits: Split, k: int) -> None:
    x, labels, queries, _ = digits
    unit, asked = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, queries))

    def votes(distances: np.ndarray) -> np.ndarray:  # of unit vectors: cosine = 1 - squared distance / 2
        return np.exp((1 - distances**2 / 2) / 0.1)

    reference = KNeighborsClassifier(k, weights=votes, algorithm="brute").fit(unit, labels)
    ours = knn_predict(x, labels, queries, 10, k=k)
    assert ours.dtype == np.int64
    assert (ours == reference.predict(asked)).mean() > 0.998


def test_knn_leaves_the_features_as_they_are_and_does_not_mind_their_length(digits: Split) -> None:
    x, labels, queries, _ = digits
    before = x.copy()
    first = knn_predict(x, labels, queries, 10)
    assert np.array_equal(x, before)
    lengths = np.random.default_rng(2).uniform(0.1, 10, (len(x), 1)).astype(np.float32)
    assert (knn_predict(x * lengths, labels, queries * 3, 10) == first).mean() > 0.998


def test_nearest_come_in_order_of_their_cosine(digits: Split) -> None:
    x, _, queries, _ = digits
    similarity, neighbour = nearest(x, queries[:20], 7)
    unit, asked = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, queries[:20]))
    cosines = asked @ unit.T
    np.testing.assert_allclose(similarity, -np.sort(-cosines, axis=1)[:, :7], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(cosines, neighbour, 1), similarity, atol=1e-5)
    assert nearest(x[:3], queries[:2], 7)[1].shape == (2, 3)  # no more than there are
