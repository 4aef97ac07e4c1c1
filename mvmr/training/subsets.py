"""Which images to fine-tune on: a class-balanced share of a training split, or those a list file names."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np

from mvmr.data import ImageSet
from mvmr.errors import MvmrError

_SHARE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*%")
_NAMED = 3  # names shown in an error


def parse_labels(labels: str) -> float | Path:
    """Read which labels to use: "1%" is a share, 0.01; anything else is the path of a list file.

    Raises:
        MvmrError: neither a share above 0 and up to 100 % nor a file that is there.
    """
    if match := _SHARE.fullmatch(labels.strip()):
        percent = float(match[1])
        if 0 < percent <= 100:
            return percent / 100
    elif Path(labels).is_file():
        return Path(labels)
    raise MvmrError(
        f"labels {labels!r}: give a share of the training images above 0 and up to 100, such as 1% or 10%, "
        "or a file that lists images, one name a line"
    )


def draw(images: ImageSet, share: float, seed: int) -> np.ndarray:
    """Draw the same number of images of every class, without replacement.

    Of N images of C classes a share takes max(1, round(share * N / C)) of each class, and all of a class that has
    fewer. With one seed, a smaller share lies within a larger one.

    Args:
        share: in (0, 1].

    Shapes:
        returns row numbers, int64 [n], ascending: a function of the labels, the share and the seed alone.

    Raises:
        MvmrError: the images have no labels, or several each.
    """
    labels = _labels(images)
    classes = np.unique(labels)
    per_class = max(1, round(share * len(labels) / len(classes)))
    random = np.random.default_rng(seed)
    return np.sort(np.concatenate([random.permutation(np.flatnonzero(labels == c))[:per_class] for c in classes]))


def find_listed_images(images: ImageSet, file: Path) -> np.ndarray:
    """Find the images that a list file names, one a line; blank lines and those that begin with "#" don't count.

    A name is an image's key, or the end of it from a folder on: ``train/n01440764/n01440764_10026.JPEG`` may be
    listed so, without ``train/``, or by the file's name alone, as in the published 1 % and 10 % lists of ImageNet.

    Shapes:
        returns row numbers, int64 [n], ascending.

    Raises:
        MvmrError: the file can't be read or names nothing, a name that is not there, is listed twice or stands for
            several images, or a class of which no image is listed.
    """
    labels, names = _labels(images), _read(file)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise MvmrError(f"{file} lists {_first(twice)} more than once: name every image once")
    rows_by_name = _find(images, frozenset(names))
    if missing := [name for name in names if name not in rows_by_name]:
        raise MvmrError(
            f"{file} names {len(missing):,} of {len(names):,} images that are not among the training images of "
            f"{images.name}: {_first(missing)}; list names such as {images.keys[0]}"
        )
    if several := [name for name in names if len(rows_by_name[name]) > 1]:
        first, second = (images.keys[row] for row in rows_by_name[several[0]][:2])
        raise MvmrError(f"{file}: {several[0]} may be {first} or {second}: give the folder as well")
    rows = np.sort(np.array([rows_by_name[name][0] for name in names], dtype=np.int64))
    if len(again := rows[1:][rows[1:] == rows[:-1]]):
        raise MvmrError(f"{file} lists {images.keys[int(again[0])]} under two names: name every image once")
    if len(absent := np.setdiff1d(labels, labels[rows])) and images.classes is not None:
        names = [images.classes[int(c)] for c in absent]
        raise MvmrError(f"{file} lists no image of {len(names):,} of the classes: {_first(names)}; list some of each")
    return rows


def _labels(images: ImageSet) -> np.ndarray:
    labels = images.labels
    if labels is None:
        raise MvmrError(f"{images.name} has no labels: put the images of each class into a folder of its own")
    if labels.ndim > 1:
        raise MvmrError(f"{images.name} has several labels to an image: fine-tuning takes data with one")
    return labels


def _read(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise MvmrError(f"cannot read {file}: {error.strerror}; give a list of images, one name a line") from error
    except UnicodeDecodeError as error:
        raise MvmrError(f"{file} is not UTF-8 text (byte {error.start}): give a list of images, one a line") from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise MvmrError(f"{file} names no image: list one a line, some of every class")
    return names


def _find(images: ImageSet, names: frozenset[str]) -> dict[str, list[int]]:
    """The rows each name may stand for; an image whose whole key it is comes before all others."""
    exact: dict[str, list[int]] = {}
    ends: dict[str, list[int]] = {}
    for row, key in enumerate(images.keys):
        if key in names:
            exact[key] = [row]
        _, slash, end = key.partition("/")
        while slash:
            if end in names:
                ends.setdefault(end, []).append(row)
            _, slash, end = end.partition("/")
    return ends | exact


def _first(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
