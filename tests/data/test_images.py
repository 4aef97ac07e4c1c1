"""ImageSet: labels only when asked for, subsets, and a copy for every worker process."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mvmr.data import ImageSet, Skipped, open_images
from mvmr.data.image_set import Arrays, Labels, numbered_names


def small(count: int = 6) -> ImageSet:
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    return ImageSet(name="small", split="train", source=Arrays(pixels, numbered_names("train", count)), fingerprint="f")


def value(image: Image.Image) -> object:
    return image.getpixel((0, 0))


def test_labels_are_read_only_when_asked_for() -> None:
    reads: list[int] = []

    def read() -> Labels:
        reads.append(1)
        return np.arange(6)

    images = replace(small(), read_labels=read, classes=tuple("abcdef"))
    part = images.subset([4, 1])
    assert len(part) == 2
    assert value(part.load(0)) == (4, 4, 4)
    assert list(part.keys) == ["train/00004", "train/00001"]
    assert reads == []
    assert part.labels is not None
    assert part.labels.tolist() == [4, 1]
    assert part.labels is part.labels
    assert reads == [1]


def test_no_labels_are_none() -> None:
    assert small().labels is None
    assert small().subset([1]).labels is None


def test_a_subset_of_a_subset() -> None:
    images = replace(small(), short_sides=np.arange(6, dtype=np.int32))
    part = images.subset([5, 3, 1]).subset(np.array([2, 0]))
    assert [value(part.load(i)) for i in range(len(part))] == [(1, 1, 1), (5, 5, 5)]
    assert part.short_sides is not None
    assert part.short_sides.tolist() == [1, 5]
    assert part.keys[-1] == "train/00005"
    assert list(part.keys[:1]) == ["train/00001"]


def test_a_subset_has_a_fingerprint_of_its_own() -> None:
    images = small()
    prints = {images.fingerprint, *(images.subset(rows).fingerprint for rows in ([0], [1], [0, 1], [1, 0]))}
    assert len(prints) == 5
    assert images.subset([0, 1]).fingerprint == images.subset([0, 1]).fingerprint


@pytest.mark.parametrize("index", [-1, 6])
def test_numbers_outside_are_refused(index: int) -> None:
    with pytest.raises(IndexError, match="small"):
        small().load(index)
    with pytest.raises(IndexError, match="0 to 5"):
        small().subset([index])


def test_an_empty_subset() -> None:
    assert len(small().subset([])) == 0


def test_keys_count_from_both_ends() -> None:
    keys = numbered_names("test", 3)
    assert list(keys) == ["test/00000", "test/00001", "test/00002"]
    assert keys[-1] == "test/00002"
    assert list(keys[1:]) == ["test/00001", "test/00002"]
    with pytest.raises(IndexError):
        keys[3]


def test_describe_counts_small_and_skipped_images() -> None:
    sides = np.array([10, 20, 30, 40, 50, 60], np.int32)
    images = replace(small(), short_sides=sides, skipped=(Skipped("a.jpg", "empty file (0 bytes)"),))
    assert images.smaller_than(30) == 2
    assert images.describe(30) == "small: 6 images, 2 smaller than 30 px (enlarged), 1 skipped"
    assert str(images.skipped[0]) == "a.jpg\tempty file (0 bytes)"


def test_small_images_of_one_size_are_counted() -> None:
    digits = open_images("sample:digits", "test")
    assert (digits.smaller_than(32), digits.smaller_than(33)) == (0, 597)


@pytest.mark.parametrize("name", ["sample:patches", "sample:digits"])
def test_an_image_set_survives_pickling(name: str) -> None:
    images = open_images(name, "test").subset([3, 5])
    again: ImageSet = pickle.loads(pickle.dumps(images))
    assert again.fingerprint == images.fingerprint
    assert again.load(1).tobytes() == images.load(1).tobytes()
    assert again.labels is not None
    assert images.labels is not None
    assert again.labels.tolist() == images.labels.tolist()
