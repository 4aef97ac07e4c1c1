"""Which real images an artifact is verified with, and int8 calibrated with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mvmr.bundles.bundle import Bundle
from mvmr.data import ImageSet, open_images
from mvmr.data.image_set import Split
from mvmr.errors import MvmrError
from mvmr.progress import say

IMAGES, FEWEST = 256, 16
CALIBRATION, FEWEST_CALIBRATION = 256, 100


def choose_verification_images(
    bundle: Bundle,
    data: str | None = None,
    *,
    count: int = IMAGES,
    max_unreadable: float = 0.01,
    progress: bool = False,
) -> tuple[ImageSet, dict[str, Any]]:
    """Draw images the student has not seen where there are any, else some that it has.

    Args:
        data: left out, what the student was trained on.

    Returns:
        The images, and JSON values for the report: data, split, held_out (None: not known, for other data than it was
        trained on), images_wanted and fingerprint.

    Raises:
        MvmrError: there are fewer than 16 images, or the training data can't be opened any more.
    """
    if count < FEWEST:
        raise MvmrError(f"{count} images are too few to verify with; give at least {FEWEST}")
    name, trained_on = _training_data(bundle)
    own_data = data in (None, name)
    split = trained_on if own_data else "unlabelled"
    fallback = _open(bundle, data, split, "--data", max_unreadable=max_unreadable, progress=progress)
    try:
        test = open_images(
            fallback.name, "test", background=fallback.background, max_unreadable=max_unreadable, progress=progress
        )
    except MvmrError:
        test = fallback
    disjoint = set(test.keys).isdisjoint(fallback.keys)
    images = test if (disjoint and len(test) >= FEWEST) or len(test) >= count else fallback
    if len(images) < FEWEST:
        raise MvmrError(f"{images.name} has {len(images)} images, verifying takes at least {FEWEST}; give more: --data")
    if len(images) < count:
        say(f"verifying with all {len(images)} images of {images.name}, fewer than {count}", shown=progress)
    sample = _draw(images, count, seed=0)
    return sample, {
        "data": images.name,
        "split": images.split,
        "held_out": images is test and disjoint if own_data else None,
        "images_wanted": count,
        "fingerprint": sample.fingerprint,
    }


def choose_calibration_images(
    bundle: Bundle, data: str | None = None, *, max_unreadable: float = 0.01, progress: bool = False
) -> ImageSet:
    """Draw the images that the ranges of int8 are taken from: of `data`, or of what the student was trained on.

    Raises: MvmrError for fewer than 100 of them, or training data that can't be opened any more.
    """
    split = "unlabelled" if data else _training_data(bundle)[1]
    images = _open(bundle, data, split, "--calibration", max_unreadable=max_unreadable, progress=progress)
    if len(images) < FEWEST_CALIBRATION:
        few = f"{images.name} has {len(images)} images, int8 takes at least {FEWEST_CALIBRATION} to calibrate"
        raise MvmrError(f"{few}; give more: --calibration")
    return _draw(images, CALIBRATION, seed=1)


def _open(
    bundle: Bundle, data: str | None, split: Split, option: str, *, max_unreadable: float, progress: bool
) -> ImageSet:
    name = data or _training_data(bundle)[0]
    if not name:
        raise MvmrError(f"bundle {bundle.path} doesn't say what it was trained on; give images: {option}")
    try:
        return open_images(
            name, split, background=bundle.manifest.preprocessing.background, max_unreadable=max_unreadable,
            progress=progress,
        )  # fmt: skip
    except MvmrError as error:
        if data is not None:
            raise
        raise MvmrError(f"the training data can't be opened ({error}); give images: {option}") from error


def _draw(images: ImageSet, count: int, *, seed: int) -> ImageSet:
    return images.subset(np.sort(np.random.default_rng(seed).permutation(len(images))[:count]))


def _training_data(bundle: Bundle) -> tuple[str, Split]:
    """Name ("" where a bundle doesn't say) and split of the data a student was trained on."""
    data = bundle.manifest.training.get("data")
    record = data if isinstance(data, Mapping) else {}
    return str(record.get("name") or ""), "train" if record.get("split") == "train" else "unlabelled"
