"""Metrics against scikit-learn, slow exact re-derivations, Gram matrices, and cases worked out by hand."""

from fractions import Fraction

import numpy as np
import pytest
import repsim
from sklearn.metrics import average_precision_score, top_k_accuracy_score

from mvmr.errors import MvmrError
from mvmr.evaluation.scores import Definition, average_precision, linear_cka, mean_average_precision, top_k

DEFINITIONS: tuple[Definition, ...] = ("area", "voc07")
DTYPES = (np.float16, np.float32, np.float64)


def images(count: int, seed: int, *, levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Scores, of a few levels only where asked, and presence in VOC's code: a fifth present, a tenth difficult."""
    rng = np.random.default_rng(seed)
    present = rng.choice([1, -1, 0], count, p=[0.2, 0.7, 0.1])
    present[:2] = 1, -1
    scores = rng.normal(size=count) + present
    return (scores if levels is None else np.round(scores * levels / 4)), present


def eleven_points(scores: np.ndarray, present: np.ndarray) -> Fraction:
    """The rule as it is told: images one by one, absent first among equals, precisions and recalls as fractions."""
    counted = [(-s, p) for s, p in zip(scores.tolist(), present.tolist(), strict=True) if p != 0]
    positives = sum(p == 1 for _, p in counted)
    points, hits = [], 0
    for rank, (_, p) in enumerate(sorted(counted), start=1):
        hits += p == 1
        points.append((Fraction(hits, positives), Fraction(hits, rank)))
    return sum((max(p for r, p in points if r >= Fraction(i, 10)) for i in range(11)), Fraction(0)) / 11


def gram_cka(x: np.ndarray, y: np.ndarray) -> float:
    """A ratio of HSICs, each of two N x N Gram matrices centred by the centring matrix."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    k, m = (h @ (rows.astype(np.float64) @ rows.astype(np.float64).T) @ h for rows in (x, y))
    return float(np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m)))


# top k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_is_scikit_learns_where_nothing_ties(k: int, dtype: type) -> None:
    rng = np.random.default_rng(k)
    logits = rng.permuted(np.tile(np.arange(10.0), (300, 1)), axis=1).astype(dtype)
    labels = rng.integers(0, 10, 300)
    expected = 100 * top_k_accuracy_score(labels, logits, k=k, labels=np.arange(10))
    assert top_k(logits, labels, k) == pytest.approx(expected, abs=1e-9)


def test_top_k_by_hand() -> None:
    logits = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [-np.inf, 0.0, np.inf]])
    labels = np.array([0, 1, 0, 2])
    assert top_k(logits, labels, 1) == 50.0
    assert top_k(logits, labels, 2) == 75.0
    assert top_k(logits, labels, 3) == 100.0
    assert type(top_k(logits, labels, 1)) is float


@pytest.mark.parametrize("value", [0.0, -np.inf, np.inf])
def test_a_constant_classifier_is_never_right_by_luck(value: float) -> None:
    logits, labels = np.full((12, 4), value), np.arange(12) % 4
    assert [top_k(logits, labels, k) for k in (1, 2, 3)] == [0.0, 0.0, 0.0]
    assert [top_k(logits, labels, k) for k in (4, 5)] == [100.0, 100.0]  # no more than all classes


def test_a_tie_counts_against_the_label_at_the_edge_only() -> None:
    logits = np.array([[5.0, 5.0, 1.0, 0.0]])
    assert top_k(logits, np.array([1]), 1) == 0.0
    assert top_k(logits, np.array([1]), 2) == 100.0
    assert top_k(logits, np.array([2]), 3) == 100.0


def test_top_k_refuses_what_it_cannot_score() -> None:
    logits, labels = np.eye(3), np.arange(3)
    bad = logits.copy()
    bad[1, 2] = np.nan
    with pytest.raises(MvmrError, match="1 of 9 logits are NaN"):
        top_k(bad, labels, 1)
    with pytest.raises(MvmrError, match="0 labelled images"):
        top_k(logits[:0], labels[:0], 1)
    with pytest.raises(ValueError, match="k of at least 1, got 0"):
        top_k(logits, labels, 0)
    with pytest.raises(ValueError, match="labels from -1 to 1 do not index 3 columns"):
        top_k(logits, labels - 1, 1)
    with pytest.raises(ValueError, match="labels from 1 to 3 do not index 3 columns"):
        top_k(logits, labels + 1, 1)
    with pytest.raises(ValueError, match=r"\(3, 3\) and \(2,\)"):
        top_k(logits, labels[:2], 1)


# average precision of one class


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [None, 30, 6, 2])
@pytest.mark.parametrize("seed", range(5))
def test_area_is_scikit_learns_without_the_difficult(seed: int, levels: int | None, dtype: type) -> None:
    scores, present = images(200, seed, levels=levels)
    scores = scores.astype(dtype)
    counted = present != 0
    expected = average_precision_score(present[counted] == 1, scores[counted])
    assert average_precision(scores, present, definition="area") == pytest.approx(expected, abs=1e-12)
    assert 0.2 < expected < 0.99


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [None, 30, 6, 2])
@pytest.mark.parametrize("count", [8, 53, 200])
def test_voc07_is_the_rule_in_exact_fractions(count: int, levels: int | None, dtype: type) -> None:
    scores, present = images(count, count, levels=levels)
    scores = scores.astype(dtype)
    expected = eleven_points(scores, present)
    assert average_precision(scores, present, definition="voc07") == pytest.approx(float(expected), abs=1e-12)


def test_average_precision_by_hand() -> None:
    # ranks: present, absent, present, (difficult), absent; precisions at the hits: 1 and 2/3
    scores, present = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([1, -1, 1, 0, -1])
    assert average_precision(scores, present, definition="area") == pytest.approx((1 + 2 / 3) / 2)
    # recalls 0 to 0.5, six of them, have precision 1; the five above have 2/3
    assert average_precision(scores, present, definition="voc07") == pytest.approx((6 + 5 * 2 / 3) / 11)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_all_positives_first_is_one(definition: Definition) -> None:
    for positives in (1, 3, 7, 10):
        present = np.array([1] * positives + [-1] * 20)
        assert average_precision(-np.arange(len(present)).astype(float), present, definition=definition) == 1.0
    assert average_precision(np.arange(5.0), np.ones(5, np.int64), definition=definition) == 1.0  # and nothing else


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_one_positive_ranked_last_is_one_in_all(definition: Definition) -> None:
    scores, present = np.arange(25, 0, -1).astype(float), np.array([-1] * 24 + [1])
    assert average_precision(scores, present, definition=definition) == pytest.approx(1 / 25)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_difficult_images_change_nothing_wherever_they_rank(definition: Definition) -> None:
    scores, present = images(100, 3)
    mask = present != 0
    without = average_precision(scores[mask], present[mask], definition=definition)
    assert average_precision(scores, present, definition=definition) == without
    for rank in (-99.0, 99.0):
        assert average_precision(np.where(mask, scores, rank), present, definition=definition) == without
    as_absent = average_precision(scores, np.where(mask, present, -1), definition=definition)
    assert as_absent < without


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_constant_scores_earn_the_share_of_positives_in_any_order(definition: Definition) -> None:
    present = np.array([1] * 3 + [-1] * 9)
    for order in (present, present[::-1], np.random.default_rng(0).permutation(present)):
        assert average_precision(np.zeros(12), order, definition=definition) == pytest.approx(0.25)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_the_order_of_the_images_and_the_scale_of_scores_do_not_matter(definition: Definition) -> None:
    scores, present = images(120, 5, levels=6)
    before = average_precision(scores, present, definition=definition)
    order = np.random.default_rng(1).permutation(120)
    assert average_precision(scores[order], present[order], definition=definition) == before
    assert average_precision(np.exp(scores), present, definition=definition) == before
    infinite = np.where(scores == scores.max(), np.inf, np.where(scores == scores.min(), -np.inf, scores))
    assert average_precision(infinite, present, definition=definition) == before


@pytest.mark.parametrize("tenths", range(1, 11))
@pytest.mark.parametrize("positives", [10, 20, 70])
def test_a_recall_of_exactly_so_many_tenths_reaches_the_threshold(positives: int, tenths: int) -> None:
    hits = positives * tenths // 10  # all first, then so many absent, then the other positives
    absent = 1000
    present = np.array([1] * hits + [-1] * absent + [1] * (positives - hits))
    scores = np.arange(len(present), 0, -1).astype(float)
    last = Fraction(positives, len(present))  # the precision at full recall, the highest after the gap
    expected = (tenths + 1 + (10 - tenths) * last) / 11
    assert average_precision(scores, present, definition="voc07") == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_average_precision_refuses_what_it_cannot_score(definition: Definition) -> None:
    scores, present = images(30, 0)
    with pytest.raises(MvmrError, match=r"none of 3 images has this class \(2 without, 1 difficult\)"):
        average_precision(scores[:3], np.array([-1, 0, -1]), definition=definition)
    with pytest.raises(MvmrError, match="none of 0 images"):
        average_precision(scores[:0], present[:0], definition=definition)
    with pytest.raises(MvmrError, match=r"2 images coded 0 .* absent is -1"):
        average_precision(scores[:3], np.array([0, 1, 0]), definition=definition)
    with pytest.raises(MvmrError, match="1 of 30 scores are NaN"):
        average_precision(np.where(np.arange(30) == 4, np.nan, scores), present, definition=definition)
    with pytest.raises(ValueError, match="got bool"):
        average_precision(scores, present == 1, definition=definition)
    with pytest.raises(ValueError, match=r"got int64 .*2"):
        average_precision(scores, present * 2, definition=definition)
    with pytest.raises(ValueError, match=r"\(30,\) and \(29,\)"):
        average_precision(scores, present[1:], definition=definition)


def test_an_unknown_definition_names_those_there_are() -> None:
    scores, present = images(30, 0)
    with pytest.raises(MvmrError, match="unknown definition of average precision 'voc7'; did you mean 'voc07'"):
        average_precision(scores, present, definition="voc7")  # type: ignore[arg-type]


# mean over the classes


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_the_mean_is_over_classes_and_in_percent(definition: Definition) -> None:
    pairs = [images(150, seed) for seed in range(4)]
    scores, present = (np.stack(part, axis=1) for part in zip(*pairs, strict=True))
    mean, by_class = mean_average_precision(scores, present, ["cat", "dog", "cow", "sofa"], definition=definition)
    assert list(by_class) == ["cat", "dog", "cow", "sofa"]
    for name, (s, p) in zip(by_class, pairs, strict=True):
        oracle = average_precision_score(p[p != 0] == 1, s[p != 0]) if definition == "area" else eleven_points(s, p)
        assert by_class[name] == pytest.approx(100 * float(oracle), abs=1e-9)
    assert mean == pytest.approx(sum(by_class.values()) / 4)
    assert type(mean) is float


def test_a_rare_class_weighs_as_much_as_a_frequent_one() -> None:
    present = np.array([[1, -1]] * 9 + [[-1, 1]])
    scores = np.column_stack([np.arange(10, 0, -1), np.arange(10, 0, -1)]).astype(float)
    mean, by_class = mean_average_precision(scores, present, ["frequent", "rare"], definition="area")
    assert by_class == {"frequent": pytest.approx(100), "rare": pytest.approx(10)}
    assert mean == pytest.approx(55)
    flattened = 100 * average_precision(scores.ravel(), present.ravel(), definition="area")
    assert abs(mean - flattened) > 1


def test_the_class_that_cannot_be_scored_is_named() -> None:
    scores, present = (np.stack(part, axis=1) for part in zip(images(20, 0), images(20, 1), strict=True))
    present[:, 1] = -1
    with pytest.raises(MvmrError, match="class 'sofa': none of 20 images has this class"):
        mean_average_precision(scores, present, ["cat", "sofa"], definition="voc07")
    scores[3, 0] = np.nan
    with pytest.raises(MvmrError, match="class 'cat': 1 of 20 scores are NaN"):
        mean_average_precision(scores, present, ["cat", "sofa"], definition="voc07")
    with pytest.raises(ValueError, match=r"\(20, 2\), \(20, 2\) and 1"):
        mean_average_precision(scores, present, ["cat"], definition="voc07")
    with pytest.raises(ValueError, match=r"different names, got .'cat', 'cat'"):
        mean_average_precision(scores, present, ["cat", "cat"], definition="voc07")
    with pytest.raises(ValueError, match="different names"):
        mean_average_precision(scores[:, :0], present[:, :0], [], definition="voc07")


# linear CKA


def batches(n: int, d1: int, d2: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two noisy linear images of the same three hidden numbers a row, away from the origin."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n, 3)) * [3, 1, 1]
    first, second = (hidden @ rng.normal(size=(3, d)) + rng.normal(size=(n, d)) + 2 for d in (d1, d2))
    return first, second


@pytest.mark.parametrize("shape", [(200, 7, 5), (40, 90, 5), (40, 5, 90), (40, 300, 4), (40, 90, 120), (2, 3, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cka_is_the_ratio_of_hsics_of_gram_matrices(shape: tuple[int, int, int], dtype: type) -> None:
    x, y = (rows.astype(dtype) for rows in batches(*shape))
    assert linear_cka(x, y) == pytest.approx(gram_cka(x, y), abs=1e-10)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), abs=1e-12)
    assert type(linear_cka(x, y)) is float


@pytest.mark.parametrize("shape", [(200, 7, 5), (40, 90, 5), (30, 50, 60)])
def test_cka_is_that_of_a_published_package(shape: tuple[int, int, int]) -> None:
    x, y = batches(*shape)
    assert linear_cka(x, y) == pytest.approx(repsim.cka([x, y], kernel_type="linear", estimator="gretton")[0, 1])


def test_cka_of_single_columns_is_their_squared_correlation() -> None:
    x, y = batches(50, 1, 1)
    assert linear_cka(x, y) == pytest.approx(np.corrcoef(x[:, 0], y[:, 0])[0, 1] ** 2)
    # by hand: (1, 0, -1) with (1, -2, 1) is uncorrelated, with (1, 1, -2) has 3^2 / (2 * 6)
    a, b, c = (np.array([column], np.float64).T for column in ([1, 0, -1], [1, -2, 1], [1, 1, -2]))
    assert linear_cka(a, b) == pytest.approx(0, abs=1e-15)
    assert linear_cka(a, c) == pytest.approx(0.75)


@pytest.mark.parametrize("shape", [(60, 7, 5), (20, 50, 30)])
@pytest.mark.parametrize("scale", [1e-90, 1e-3, -1.0, 1e3, 1e90])
def test_cka_is_one_for_and_does_not_see_scaled_rotated_shifted_copies(
    scale: float, shape: tuple[int, int, int]
) -> None:
    x, y = batches(*shape)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(shape[1], shape[1])))[0]
    copy = scale * (x @ rotation + 3)
    assert linear_cka(x, copy) == pytest.approx(1, abs=1e-9)
    assert linear_cka(x, copy) <= 1
    assert linear_cka(copy, y) == pytest.approx(linear_cka(x, y), abs=1e-9)
    assert linear_cka(x, y) < 0.99


@pytest.mark.parametrize("rows", [50, 7])
def test_cka_sees_a_stretched_direction(rows: int) -> None:
    noise = np.random.default_rng(0).normal(size=(rows, 6))
    x = np.linalg.qr(noise - noise.mean(0))[0]  # six uncorrelated columns of mean 0 and equal variance
    # by hand, of variances 1, ..., 1 and 100, 1, ..., 1: their product over the roots of their squares, summed
    assert linear_cka(x, x * [10, 1, 1, 1, 1, 1]) == pytest.approx(105 / np.sqrt(6 * 10_005))


def test_cka_is_near_zero_for_independent_batches_of_many_rows_and_none_of_few() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5000, 8)), rng.normal(size=(5000, 8))
    assert 0 <= linear_cka(x, y) < 0.01
    assert linear_cka(rng.normal(size=(16, 4096)), rng.normal(size=(16, 4096))) > 0.9  # as the docstring warns


def test_cka_is_computed_in_float64() -> None:
    x, y = (rows.astype(np.float32) for rows in batches(500, 7, 5))
    far = x + np.float32(10_000)
    assert linear_cka(far, y) == pytest.approx(linear_cka(far.astype(np.float64) - 10_000, y), abs=1e-9)
    half = x.astype(np.float16)
    assert linear_cka(half, y) == pytest.approx(linear_cka(half.astype(np.float64), y), abs=1e-12)


@pytest.mark.parametrize("width", [3, 90])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e30])
def test_cka_is_zero_for_a_constant_batch(value: float, width: int) -> None:
    x, _ = batches(30, 7, 5)
    constant = np.full((30, width), value)
    assert linear_cka(x, constant) == linear_cka(constant, x) == linear_cka(constant, constant) == 0.0
    assert linear_cka(x[:1], x[:1]) == 0.0  # one row varies with nothing


def test_cka_leaves_the_batches_as_they_are() -> None:
    x, y = batches(30, 7, 5)
    before = x.copy(), y.copy()
    linear_cka(x, y)
    assert np.array_equal(x, before[0])
    assert np.array_equal(y, before[1])


@pytest.mark.parametrize("shape", [(200_000, 4, 3), (10, 200_000, 3), (10, 200_000, 200_000)])
def test_cka_builds_no_square_of_the_longer_side(shape: tuple[int, int, int]) -> None:
    x, y = batches(*shape)  # 320 GB, squared
    assert 0.1 < linear_cka(x, y) < 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_cka_refuses_what_is_not_finite_or_does_not_pair(bad: float) -> None:
    x, y = batches(30, 7, 5)
    broken = x.copy()
    broken[[3, 4], 2] = bad
    for pair in ((broken, y), (y, broken)):
        with pytest.raises(MvmrError, match="NaN or infinity in 2 of 30 rows"):
            linear_cka(*pair)
    with pytest.raises(ValueError, match="got 30 and 29"):
        linear_cka(x, y[1:])
    with pytest.raises(ValueError, match="got 0 and 0"):
        linear_cka(x[:0], y[:0])
    with pytest.raises(ValueError, match=r"\(30,\)"):
        linear_cka(x[:, 0], y)
