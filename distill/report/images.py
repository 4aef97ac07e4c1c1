"""Which images student and teacher are compared on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mvmr.data import ImageSet, Split

Open = Callable[[Split], ImageSet]
SEED = 0


def open_evaluation_images(open_split: Open) -> ImageSet:
    """The images that student and teacher are compared on: the test split, or all where there are no labels."""
    test = open_split("test")
    return test if test.classes is not None else open_split("unlabelled")


def draw_rows(count: int, limit: int) -> np.ndarray:
    """Numbers of the images that are compared, of ``count``: all, or ``limit`` of them drawn by the seed; int64."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(SEED).choice(count, limit, replace=False))


def draw(images: ImageSet, limit: int) -> ImageSet:
    """All images, or ``limit`` of them drawn by the seed, in their order."""
    if len(images) <= limit:
        return images
    return images.subset(draw_rows(len(images), limit))
