"""Which images student and teacher are compared on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mvmr.data import ImageSet, Split

Open = Callable[[Split], ImageSet]
SEED = 0


def evaluated(open_split: Open) -> ImageSet:
    """The images that student and teacher are compared on: the test split, or all where there are no labels."""
    test = open_split("test")
    return test if test.classes is not None else open_split("unlabelled")


def drawn(images: ImageSet, limit: int) -> ImageSet:
    """All images, or ``limit`` of them drawn by the seed, in their order."""
    if len(images) <= limit:
        return images
    return images.subset(np.sort(np.random.default_rng(SEED).choice(len(images), limit, replace=False)))
