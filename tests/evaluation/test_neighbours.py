"""kNN is scikit-learn's, by cosine, with weights and without."""

import threading

import faiss
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from mvmr.errors import MvmrError
from mvmr.evaluation.neighbours import Bank, find_neighbours, knn_predict, nearest, neighbour_overlap, votes

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def digits() -> Split:
    images, labels = load_digits(return_X_y=True)
    noisy = (images + np.random.default_rng(0).normal(0, 6, images.shape)).astype(np.float32)
    return noisy[:1000], labels[:1000], noisy[1000:], labels[1000:]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 5, 20, 200])
@pytest.mark.parametrize("temperature", [0.07, None])
def test_knn_is_scikit_learns(digits: Split, k: int, temperature: float | None) -> None:
    x, labels, queries, answers = digits

    def weights(distances: np.ndarray) -> np.ndarray:  # of unit vectors: cosine = 1 - squared distance / 2
        return np.exp((1 - distances**2 / 2) / 0.07)

    kind = "uniform" if temperature is None else weights
    reference = KNeighborsClassifier(k, weights=kind, algorithm="brute").fit(unit(x), labels).predict(unit(queries))
    ours = knn_predict(x, labels, queries, 10, k=k, temperature=temperature)
    assert ours.dtype == np.int64
    assert abs((ours == answers).mean() - (reference == answers).mean()) <= 0.002
    assert (ours == reference).mean() > 0.99


def test_knn_leaves_the_features_as_they_are_and_does_not_mind_their_length(digits: Split) -> None:
    x, labels, queries, _ = digits
    before = x.copy()
    first = knn_predict(x, labels, queries, 10)
    assert np.array_equal(x, before)
    lengths = np.random.default_rng(2).uniform(0.1, 10, (len(x), 1)).astype(np.float32)
    assert (knn_predict(x * lengths, labels, queries * 3, 10) == first).mean() > 0.998


def test_of_equal_votes_the_lower_class_wins() -> None:
    similarity, labels = np.array([[0.9, 0.9, 0.1]], np.float32), np.array([[2, 1, 0]])
    assert votes(similarity, labels, 3, temperature=0.07).argmax(1) == [1]
    assert votes(similarity, labels, 3, temperature=None).argmax(1) == [0]


def test_votes_are_weighted_by_their_cosine() -> None:
    similarity, labels = np.array([[0.8, 0.5, 0.4]], np.float32), np.array([[0, 1, 1]])
    totals = votes(similarity, labels, 2, temperature=0.1)[0]
    assert totals[0] / totals[1] == pytest.approx(np.exp(8) / (np.exp(5) + np.exp(4)), rel=1e-5)


def test_nearest_come_in_order_of_their_cosine(digits: Split) -> None:
    x, _, queries, _ = digits
    similarity, neighbour = nearest(x, queries[:20], 7)
    cosines = unit(queries[:20]) @ unit(x).T
    np.testing.assert_allclose(similarity, -np.sort(-cosines, axis=1)[:, :7], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(cosines, neighbour, 1), similarity, atol=1e-5)
    assert nearest(x[:3], queries[:2], 7)[1].shape == (2, 3)  # no more than there are


def test_a_bank_gives_the_very_cosines_and_rows_of_faiss(digits: Split) -> None:
    x, _, queries, _ = digits
    rows, unit_queries = x.copy(), queries.copy()
    for matrix in (rows, unit_queries):
        faiss.normalize_L2(matrix)
    before = x.copy(), queries.copy()
    bank = Bank(x)
    assert len(bank) == len(x)
    for count in (1, 7, 200):
        for k in (1, 10, 150, 5000):
            answer = bank.search(queries[:count], k)
            wanted = faiss.knn(unit_queries[:count], rows, min(k, len(x)), metric=faiss.METRIC_INNER_PRODUCT)
            assert all(np.array_equal(*pair) for pair in zip(answer, wanted, strict=True))
            assert all(np.array_equal(*pair) for pair in zip(answer, nearest(x, queries[:count], k), strict=True))
    assert answer[0].dtype == np.float32
    assert answer[1].dtype == np.int64
    assert np.array_equal(x, before[0])
    assert np.array_equal(queries, before[1])


def test_a_bank_leaves_out_the_row_that_asks(digits: Split) -> None:
    x = digits[0][:300]
    asking = np.array([7, 0, 299, 7])
    cosines, rows = Bank(x).search(x[asking], 12, without=asking)
    exact = unit(x.astype(np.float64)) @ unit(x.astype(np.float64)).T
    for row, cosine, own in zip(rows, cosines, asking, strict=True):
        wanted = [i for i in np.argsort(-exact[own]) if i != own][:12]
        assert row.tolist() == wanted
        np.testing.assert_allclose(cosine, exact[own, wanted], atol=1e-6)
    every = Bank(x).search(x, 12, without=np.arange(300))[1]
    assert np.array_equal(every, find_neighbours(x, 12))


def test_a_bank_with_fewer_rows_than_are_asked_for_gives_all_there_are() -> None:
    x = np.eye(4, dtype=np.float32) + 0.1
    assert Bank(x).search(x[:2], 9)[1].shape == (2, 4)
    cosines, rows = Bank(x).search(x[:2], 9, without=np.array([0, 1]))
    assert [sorted(row) for row in rows.tolist()] == [[1, 2, 3], [0, 2, 3]]
    assert cosines.shape == (2, 3)
    assert Bank(x[:1]).search(x[:1], 3, without=np.array([0]))[1].shape == (1, 0)


@pytest.mark.parametrize("copies", [2, 5, 30])
def test_a_bank_leaves_out_one_row_however_many_copies_it_has(digits: Split, copies: int) -> None:
    x = digits[0][:60].copy()
    x[:copies] = x[0]
    rows = Bank(x).search(x[:copies], 5, without=np.arange(copies))[1]
    assert rows.shape == (copies, 5)
    assert not (rows == np.arange(copies)[:, None]).any()
    assert all(len(set(row)) == 5 for row in rows.tolist())


def test_threads_may_share_a_bank(digits: Split) -> None:
    x, _, queries, _ = digits
    bank = Bank(x)
    wanted = [bank.search(queries[start : start + 40], 9) for start in range(0, 160, 40)]
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(50):
            answer = bank.search(queries[40 * number : 40 * number + 40], 9)
            if not all(np.array_equal(*pair) for pair in zip(answer, wanted[number], strict=True)):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_overlap_is_that_of_a_plain_loop(digits: Split) -> None:
    a = digits[0][:150]
    b = np.tanh(a @ np.random.default_rng(1).normal(size=(64, 9)).astype(np.float32) / 50)
    k, cosines = 7, [unit(features.astype(np.float64)) @ unit(features.astype(np.float64)).T for features in (a, b)]
    expected = []
    for row in range(len(a)):
        lists = [sorted(set(range(len(a))) - {row}, key=lambda i: -matrix[row, i])[:k] for matrix in cosines]
        expected.append(len(set(lists[0]) & set(lists[1])) / k)
    overlap = neighbour_overlap(a, b, k)
    assert overlap.dtype == np.float64
    np.testing.assert_allclose(overlap, expected)
    assert 0.1 < overlap.mean() < 0.9
    assert (neighbour_overlap(a, 3 * a, k) == 1).all()


def test_overlap_of_what_is_unrelated_is_that_of_chance() -> None:
    random = np.random.default_rng(0)
    a, b = (random.normal(size=(400, 8)).astype(np.float32) for _ in range(2))
    assert neighbour_overlap(a, b, 20).mean() == pytest.approx(20 / 399, abs=0.006)


@pytest.mark.parametrize("copies", [2, 5, 6, 7, 30])
def test_a_row_is_never_its_own_neighbour_however_many_copies_it_has(digits: Split, copies: int) -> None:
    x = digits[0][:60].copy()
    x[:copies] = x[0]
    neighbours = find_neighbours(x, 5)
    assert neighbours.shape == (60, 5)
    assert neighbours.dtype == np.int64
    assert not (neighbours == np.arange(60)[:, None]).any()
    assert all(len(set(row)) == 5 for row in neighbours.tolist())
    assert (neighbours[:copies, : min(5, copies - 1)] < copies).all()  # its copies come first
    blank = find_neighbours(np.zeros((9, 4), np.float32), 8)
    assert [sorted(row) for row in blank.tolist()] == [[j for j in range(9) if j != i] for i in range(9)]


@pytest.mark.parametrize("k", [0, 10, 11])
def test_neighbours_that_are_not_there_are_one_line(digits: Split, k: int) -> None:
    with pytest.raises(MvmrError, match=f"{k} neighbours of each of 10 images") as caught:
        neighbour_overlap(digits[0][:10], digits[0][:10], k)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="10 and 9"):
        neighbour_overlap(digits[0][:10], digits[0][:9], 3)
