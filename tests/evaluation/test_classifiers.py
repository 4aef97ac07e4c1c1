"""The probes are scikit-learn's plain pipeline with its scaling folded in, and few images do."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from mvmr.data import open_images
from mvmr.errors import MvmrError
from mvmr.evaluation.classifiers import (
    PAPER_VOC,
    AdamConfig,
    LinearHead,
    adam_one_vs_all,
    adam_probe,
    hold_out,
    linear_probe,
    one_vs_all,
)

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
    reference = plain(x, head.chosen["C"]).fit(x, labels)  # type: ignore[attr-defined]
    ours, theirs = (100 * (solver.predict(queries) == answers).mean() for solver in (head, reference))
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
    assert accuracy[head.chosen["C"]] >= max(accuracy.values()) - 0.03


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_probe_does_not_mind_scale_shift_or_a_constant_column(digits: Split, scale: float) -> None:
    x, labels, queries, answers = digits
    constant = np.full((len(x), 1), 7.0, np.float32), np.full((len(queries), 1), 7.0, np.float32)
    train, test = (np.hstack([rows * scale + scale, more]) for rows, more in zip((x, queries), constant, strict=True))
    head = linear_probe(train, labels, 10)
    assert np.isfinite(head.weight).all()
    assert (
        abs((head.predict(test) == answers).mean() - (linear_probe(x, labels, 10).predict(queries) == answers).mean())
        < 0.01
    )


def test_two_classes_have_two_rows(digits: Split) -> None:
    x, labels, queries, answers = digits
    train, test = labels < 2, answers < 2
    head = linear_probe(x[train], labels[train], 2)
    assert head.weight.shape == (2, 144)
    reference = plain(x, head.chosen["C"]).fit(x[train], labels[train])  # type: ignore[attr-defined]
    assert np.array_equal(head.predict(queries[test]), reference.predict(queries[test]))
    logits = queries[test] @ head.weight.T + head.bias
    np.testing.assert_allclose(
        logits[:, 1] - logits[:, 0], reference.decision_function(queries[test]), rtol=1e-2, atol=1e-2
    )


def test_a_class_without_training_images_is_never_predicted(digits: Split) -> None:
    x, labels, queries, _ = digits
    mask = labels != 4
    head = linear_probe(x[mask], labels[mask], 12)
    assert head.weight.shape == (12, 144)
    assert np.isfinite(head.bias).all()
    assert not set(head.predict(queries)) & {4, 10, 11}


@pytest.mark.parametrize("per_class", [1, 2, 4, 5, 6])
def test_few_images_of_a_class_are_enough(digits: Split, per_class: int) -> None:
    x, labels, queries, answers = digits
    few = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)])
    head = linear_probe(x[few], labels[few], 10)
    assert (head.predict(queries) == answers).mean() > 0.15
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
    x, queries = np.full((len(labels), width), value, np.float32), np.full((len(answers), width), value, np.float32)
    head = linear_probe(x, labels, 10)
    assert np.isfinite(head.weight).all()
    assert len(set(head.predict(queries))) == 1


SHORT = AdamConfig(epochs=60, batch_size=64, lrs=(1e-2,))


@pytest.mark.slow
def test_mini_batches_come_as_far_as_logistic_regression(digits: Split) -> None:
    x, labels, queries, answers = digits
    reference = 100 * (linear_probe(x, labels, 10).predict(queries) == answers).mean()
    head = adam_probe(x, labels, 10, SHORT)
    assert head.weight.dtype == head.bias.dtype == np.float32
    assert 100 * (head.predict(queries) == answers).mean() > reference - 4  # it is not regularised, this data is noisy
    again = adam_probe(x, labels, 10, SHORT)
    assert np.array_equal(head.weight, again.weight)
    assert not np.array_equal(head.weight, adam_probe(x, labels, 10, SHORT, seed=1).weight)


@pytest.mark.slow
def test_mini_batches_find_the_minimum_of_the_same_loss() -> None:
    """On a problem with a finite minimum and full batches: what L-BFGS finds without regularisation."""
    random = np.random.default_rng(0)
    x = random.normal(3, 2, (300, 4)).astype(np.float32)
    labels = (x[:, 0] + random.normal(0, 2, 300) > 3).astype(np.int64) + (x[:, 1] + random.normal(0, 2, 300) > 3)
    head = adam_probe(x, labels, 3, AdamConfig(epochs=3000, batch_size=300, lrs=(0.05,)))
    reference = LogisticRegression(C=np.inf, max_iter=5000, tol=1e-8).fit(x, labels)
    logits = head.logits(x)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(odds / odds.sum(1, keepdims=True), reference.predict_proba(x), atol=2e-3)


@pytest.mark.slow
def test_the_learning_rate_is_chosen_on_rows_held_out() -> None:
    """The class is the difference of two columns: the means, which a tiny step finds, are not enough."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 400)
    nuisance = random.normal(0, 5, 400)
    x = np.stack([labels + random.normal(0, 0.1, 400) + nuisance, nuisance], axis=1).astype(np.float32)

    def fit(*lrs: float) -> LinearHead:
        return adam_probe(x, labels, 2, AdamConfig(epochs=40, batch_size=64, lrs=lrs))

    assert (fit(1e-7).predict(x) == labels).mean() < 0.7
    head = fit(1e-7, 0.3)
    assert head.chosen == {"lr": 0.3}
    assert (head.predict(x) == labels).mean() > 0.95
    assert np.array_equal(head.weight, fit(0.3).weight)  # fitted on all rows afterwards


@pytest.mark.slow
def test_mini_batches_read_a_memory_map_and_never_predict_an_unseen_class(digits: Split, tmp_path: Path) -> None:
    x, labels, queries, _ = digits
    mask = labels != 4
    np.save(tmp_path / "kept.npy", x[mask])
    memory_map = np.load(tmp_path / "kept.npy", mmap_mode="r")
    head = adam_probe(memory_map, labels[mask], 12, SHORT)
    assert np.array_equal(head.weight, adam_probe(x[mask], labels[mask], 12, SHORT).weight)
    assert not set(head.predict(queries)) & {4, 10, 11}
    with pytest.raises(MvmrError, match="all training images are of one class"):
        adam_probe(x[labels == 3], labels[labels == 3], 10, SHORT)


def test_a_fifth_of_every_class_is_held_out_but_of_small_classes_none() -> None:
    labels = np.repeat([0, 1, 2, 3], [50, 10, 5, 4])
    parts = hold_out(labels, seed=0)
    assert parts is not None
    fit, validation = parts
    assert sorted([*fit, *validation]) == list(range(len(labels)))
    assert np.bincount(labels[validation], minlength=4).tolist() == [10, 2, 1, 0]
    assert hold_out(np.repeat([0, 1], 4), seed=0) is None


def several(labels: np.ndarray) -> np.ndarray:
    """Three overlapping properties of a digit, in VOC's code."""
    return np.where(np.stack([labels % 2 == 0, labels > 6, np.isin(labels, (0, 6, 8, 9))], axis=1), 1, -1)


def test_one_vs_all_is_a_logistic_regression_for_each_class(digits: Split) -> None:
    x, labels, queries, answers = digits
    present = several(labels)
    head = one_vs_all(x, present)
    logits = head.logits(queries)
    for column in range(3):
        reference = plain(x, head.chosen["C"]).fit(x, present[:, column])  # type: ignore[attr-defined]
        expected = reference.decision_function(queries)
        assert np.corrcoef(logits[:, column], expected)[0, 1] > 0.999
        assert ((logits[:, column] > 0) == (several(answers)[:, column] > 0)).mean() > 0.75


def test_one_vs_all_leaves_difficult_images_out_of_their_class_alone(digits: Split) -> None:
    x, labels, *_ = digits
    present = several(labels)
    difficult = present.copy()
    difficult[:50, 1] = 0
    head, full = one_vs_all(x, difficult), one_vs_all(x, present)
    assert head.chosen == full.chosen  # else the rest would differ for another reason
    assert np.array_equal(head.weight[[0, 2]], full.weight[[0, 2]])
    reference = plain(x, head.chosen["C"]).fit(x[50:], present[50:, 1])  # type: ignore[attr-defined]
    assert np.corrcoef(head.logits(x)[:, 1], reference.decision_function(x))[0, 1] > 0.99


@pytest.mark.slow
def test_mini_batches_fit_one_classifier_to_a_class(digits: Split) -> None:
    x, labels, queries, answers = digits
    present = several(labels)
    present[:50, 1] = 0
    config = AdamConfig(epochs=60, batch_size=32, lrs=(3e-3,))
    head, exact = adam_one_vs_all(x, present, config), one_vs_all(x, present)
    mine, theirs = (((fit.logits(queries) > 0) == (several(answers) > 0)).mean(0) for fit in (head, exact))
    assert mine.min() > 0.75
    assert (mine > theirs - 0.04).all()


@pytest.mark.slow
def test_what_is_coded_0_teaches_its_own_class_nothing() -> None:
    """Coded 0 where the first number is positive: taken for absent, half of the images would look so."""
    x = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    truth = np.where(x > 0, 1, -1)
    coded = np.stack([truth[:, 0], np.where(x[:, 0] > 0, 0, truth[:, 1])], axis=1)
    head = adam_one_vs_all(x, coded, AdamConfig(epochs=80, batch_size=32, lrs=(1e-2,)))
    assert ((head.logits(x) > 0) == (truth > 0)).mean(0).min() > 0.95


def test_one_vs_all_needs_images_with_and_without_each_class(digits: Split) -> None:
    x, labels, *_ = digits
    for value in (1, -1):
        present = several(labels)
        present[:, 2] = np.where(present[:, 2] == value, value, 0)
        for fit in (one_vs_all, partial(adam_one_vs_all, config=PAPER_VOC)):
            with pytest.raises(MvmrError, match="class number 2 is in none or in all of the training images"):
                fit(x, present)
