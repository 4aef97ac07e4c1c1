"""Neighbours of one image under two encoders, against plain numpy; classes from what is typed."""

from __future__ import annotations

import numpy as np
import pytest

from mvmr.app.classify import best, names_of, suggest_names
from mvmr.app.compare import Side, compare
from mvmr.errors import MvmrError
from mvmr.evaluation.neighbours import Bank, neighbour_overlap

RANDOM = np.random.default_rng(0)
TEACHER, STUDENT = (RANDOM.normal(size=(40, width)).astype(np.float32) for width in (12, 7))


def ranks(rows: np.ndarray, query: np.ndarray, without: int | None) -> list[int]:
    cosines = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    return [int(i) for i in np.argsort(-cosines) if i != without]


@pytest.mark.parametrize("row", [0, 17, 39])
def test_neighbours_and_their_places_are_those_of_plain_sorting(row: int) -> None:
    comparison = compare(Side(Bank(TEACHER), TEACHER[row]), Side(Bank(STUDENT), STUDENT[row]), 5, without=row)
    teacher, student = ranks(TEACHER, TEACHER[row], row), ranks(STUDENT, STUDENT[row], row)
    assert comparison.teacher is not None
    assert comparison.student is not None
    assert [neighbour.row for neighbour in comparison.teacher] == teacher[:5]
    assert [neighbour.row for neighbour in comparison.student] == student[:5]
    assert [neighbour.elsewhere for neighbour in comparison.teacher] == [1 + student.index(i) for i in teacher[:5]]
    assert [neighbour.elsewhere for neighbour in comparison.student] == [1 + teacher.index(i) for i in student[:5]]
    shared = set(teacher[:5]) & set(student[:5])
    assert {neighbour.row for neighbour in comparison.student if neighbour.shared} == shared
    assert comparison.overlap == 20 * len(shared)
    assert comparison.overlap == pytest.approx(100 * neighbour_overlap(TEACHER, STUDENT, 5)[row])


def test_an_image_from_elsewhere_may_be_nearest_to_any_row() -> None:
    comparison = compare(Side(Bank(TEACHER), TEACHER[3]), Side(Bank(STUDENT), STUDENT[3]), 4)
    assert comparison.teacher is not None
    assert (comparison.teacher[0].row, comparison.teacher[0].elsewhere, comparison.teacher[0].shared) == (3, 1, True)
    assert comparison.teacher[0].cosine == pytest.approx(1, abs=1e-6)


def test_one_side_alone_and_a_small_gallery() -> None:
    alone = compare(None, Side(Bank(STUDENT), STUDENT[3]), 4)
    assert (alone.teacher, alone.overlap) == (None, None)
    assert alone.student is not None
    assert all(neighbour.elsewhere is None and not neighbour.shared for neighbour in alone.student)
    few = compare(Side(Bank(TEACHER[:3]), TEACHER[1]), Side(Bank(STUDENT[:3]), STUDENT[1]), 10, without=1)
    assert few.k == 2
    assert few.overlap == 100


def test_copies_are_told_apart_as_the_overlap_of_all_images_tells_them() -> None:
    copies = np.repeat(TEACHER[:6], 5, axis=0)
    overlap = 100 * neighbour_overlap(copies, copies, 4)
    for row in range(len(copies)):
        side = Side(Bank(copies), copies[row])
        assert compare(side, side, 4, without=row).overlap == overlap[row]


def test_class_names_are_read_from_commas_and_lines() -> None:
    assert names_of(" cat,dog, a  red   car ,, cat ") == ("cat", "dog", "a red car")
    assert names_of("crane, bird\n\ncrane, machine\n") == ("crane, bird", "crane, machine")
    for classes in (("cat", "dog"), ("crane, bird", "dog"), tuple(f"class {i}" for i in range(500))):
        assert names_of(suggest_names(classes)) == classes[:200]
    for typed, message in (("", "two class names"), ("cat", "two class names"), ("a," + "b" * 100, "longer than")):
        with pytest.raises(MvmrError, match=message):
            names_of(typed)
    with pytest.raises(MvmrError, match="300 class names"):
        names_of(",".join(map(str, range(300))))


def test_the_best_classes_come_first_and_equal_ones_in_their_order() -> None:
    guesses = best(np.array([0.1, 0.4, 0.1, 0.4], np.float32), ("a", "b", "c", "d"), 3)
    assert [guess.name for guess in guesses] == ["b", "d", "a"]


def test_no_cosine_leaves_its_range() -> None:
    rows = np.concatenate([TEACHER, -TEACHER])
    sides = [Side(Bank(rows), row) for row in rows]
    cosines = [neighbour.cosine for side in sides for neighbour in compare(None, side, len(rows)).student or ()]
    assert (min(cosines), max(cosines)) == (-1, 1)
    assert max(float(side.bank.search(side.query[None], 1)[0].max()) for side in sides) > 1  # what is cut off
