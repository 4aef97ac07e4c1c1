"""The labelled subset: balanced, without replacement, always the same; or exactly what a list file names."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mvmr.data import ImageSet
from mvmr.data.image_set import Arrays
from mvmr.errors import MvmrError
from mvmr.training.subsets import draw, find_listed_images, parse_labels

KEYS = ("train/cat/1.jpg", "train/cat/2.jpg", "train/cat/old/3.jpg", "train/dog/1.jpg", "train/dog/4.jpg")
KINDS = (0, 0, 0, 1, 1)


def images(labels: Sequence[int], keys: Sequence[str] | None = None) -> ImageSet:
    numbers = np.array(labels, np.int64)
    return ImageSet(
        name="photos", split="train", fingerprint="f" * 64,
        source=Arrays(np.zeros((len(numbers), 2, 2, 3), np.uint8), keys or [f"{i}.jpg" for i in range(len(numbers))]),
        read_labels=partial(np.copy, numbers), classes=("cat", "dog", "emu", "fox", "gnu", "hen", "owl", "pig"),
    )  # fmt: skip


def unbalanced_labels(seed: int = 0) -> list[int]:
    """Eight classes of 2, 3, 40, 40, 60, 80, 75 and 100 images, in any order: 400."""
    labels = np.repeat(np.arange(8), (2, 3, 40, 40, 60, 80, 75, 100))
    return list(np.random.default_rng(seed).permutation(labels))


# -- drawn


@pytest.mark.parametrize(("share", "per_class"), [(0.001, 1), (0.01, 1), (0.03, 2), (0.1, 5), (0.5, 25), (1.0, 50)])
def test_every_class_gives_the_same_number_or_all_it_has(share: float, per_class: int) -> None:
    labels = np.array(unbalanced_labels())
    rows = draw(images(labels), share, seed=0)
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()  # ascending, so nothing twice
    counts = np.bincount(labels[rows], minlength=8)
    assert counts.tolist() == [min(per_class, have) for have in np.bincount(labels)]


def test_all_of_a_balanced_set_is_all() -> None:
    assert draw(images([0, 1, 2] * 5), 1.0, seed=3).tolist() == list(range(15))


def test_a_draw_depends_on_labels_share_and_seed_alone() -> None:
    labels = unbalanced_labels()
    np.random.seed(1)  # noqa: NPY002
    first = draw(images(labels), 0.1, seed=0)
    np.random.seed(2)  # noqa: NPY002
    other_names = images(labels, [f"other/{i}.png" for i in range(len(labels))])
    assert np.array_equal(first, draw(other_names, 0.1, seed=0))
    assert not np.array_equal(first, draw(images(labels), 0.1, seed=1))
    assert not np.array_equal(first, draw(images(unbalanced_labels(1)), 0.1, seed=0))
    assert set(first) < set(draw(images(labels), 0.2, seed=0))


def test_over_many_seeds_every_image_has_its_turn() -> None:
    labels = [0] * 4 + [1] * 12
    taken = np.bincount(np.concatenate([draw(images(labels), 0.25, seed) for seed in range(600)]), minlength=16)
    expected = np.array([600 * 2 / 4] * 4 + [600 * 2 / 12] * 12)  # 2 of each class
    assert (abs(taken - expected) < 5 * np.sqrt(expected)).all()


# -- what the user types


@pytest.mark.parametrize(
    ("text", "share"), [("1%", 0.01), ("10%", 0.1), ("0.5 %", 0.005), (".5%", 0.005), ("100%", 1.0), (" 2.% ", 0.02)]
)
def test_a_share_is_read(text: str, share: float) -> None:
    assert parse_labels(text) == pytest.approx(share)


def test_a_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    for name in ("1percent.txt", "1% of them"):
        (tmp_path / name).touch()
        assert parse_labels(str(tmp_path / name)) == tmp_path / name


@pytest.mark.parametrize("text", ["0%", "101%", "-1%", "1e1%", "nan%", "1", "0.1", "ten", "%", "", "missing.txt", "."])
def test_anything_else_is_one_line_that_says_what_is_accepted(text: str) -> None:
    with pytest.raises(MvmrError) as caught:
        parse_labels(text)
    assert str(caught.value) == (
        f"labels {text!r}: give a share of the training images above 0 and up to 100, such as 1% or 10%, "
        "or a file that lists images, one name a line"
    )


# -- listed


def a_list(folder: Path, text: str | bytes) -> Path:
    file = folder / "list.txt"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("train/dog/4.jpg\ntrain/cat/2.jpg\n", [1, 4]),
        ("dog/4.jpg\ncat/2.jpg", [1, 4]),
        ("4.jpg\n2.jpg\n3.jpg\n", [1, 2, 4]),
        ("# of each class\n\n  dog/1.jpg  \r\n\r\n#\nold/3.jpg\r\n", [2, 3]),
        (b"\xef\xbb\xbf4.jpg\n2.jpg\n", [1, 4]),  # as Windows writes UTF-8
        ("train/cat/1.jpg\ncat/2.jpg\n3.jpg\ndog/1.jpg\n4.jpg\n", [0, 1, 2, 3, 4]),
    ],
)
def test_names_are_found_with_and_without_their_folders(tmp_path: Path, text: str | bytes, rows: list[int]) -> None:
    rows_found = find_listed_images(images(KINDS, KEYS), a_list(tmp_path, text))
    assert rows_found.dtype == np.int64
    assert rows_found.tolist() == rows


def test_a_whole_key_comes_before_the_end_of_another(tmp_path: Path) -> None:
    keys = ("b/1.jpg", "1.jpg", "a/b/1.jpg")
    assert find_listed_images(images((0, 1, 1), keys), a_list(tmp_path, "b/1.jpg\n1.jpg\n")).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cat/2.jpg\nx1\nx2\ndog/4.jpg\nx3\nx4\n",
            r"names 4 of 6 images that are not among the training images of photos: x1, x2, x3, \.\.\.; "
            r"list names such as train/cat/1\.jpg$",
        ),
        ("og/4.jpg\n2.jpg\n", r"names 1 of 2 images that are not .* of photos: og/4\.jpg; "),
        ("1.jpg\n2.jpg\n4.jpg\n", r"1\.jpg may be train/cat/1\.jpg or train/dog/1\.jpg: give the folder as well$"),
        ("2.jpg\n4.jpg\n2.jpg\n", r"lists 2\.jpg more than once: name every image once$"),
        ("2.jpg\n4.jpg\ncat/2.jpg\n", r"lists train/cat/2\.jpg under two names: name every image once$"),
        ("1.jpg\n# 2.jpg\n", r"1\.jpg may be"),
        ("2.jpg\n3.jpg\n", r"lists no image of 1 of the classes: dog; list some of each$"),
        ("\n# nothing\n", r"names no image: list one a line, some of every class$"),
        (b"caf\xe9.jpg\n", r"is not UTF-8 text \(byte 3\): give a list of images"),
    ],
)
def test_a_list_that_does_not_fit_is_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    file = a_list(tmp_path, text)
    with pytest.raises(MvmrError, match=message) as caught:
        find_listed_images(images(KINDS, KEYS), file)
    assert str(caught.value).startswith((str(file), f"{file}:"))
    assert "\n" not in str(caught.value)


def test_a_list_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MvmrError, match=r"^cannot read .*list\.txt: No such file or directory; give a list"):
        find_listed_images(images(KINDS, KEYS), tmp_path / "list.txt")


# -- what has no single label


def test_data_without_labels_or_with_several_are_refused(tmp_path: Path) -> None:
    file = a_list(tmp_path, "2.jpg\n")
    bare = ImageSet(name="photos", split="train", fingerprint="f" * 64, source=images(KINDS, KEYS).source)
    several = ImageSet(
        name="voc07", split="train", fingerprint="f" * 64, source=images(KINDS, KEYS).source,
        read_labels=lambda: np.ones((5, 20), np.int64),
    )  # fmt: skip
    for data, message in ((bare, "photos has no labels"), (several, "voc07 has several labels to an image")):
        with pytest.raises(MvmrError, match=message):
            draw(data, 0.5, 0)
        with pytest.raises(MvmrError, match=message):
            find_listed_images(data, file)
