"""How many classes a method looks for, where that hangs on the number of images."""

from __future__ import annotations

from mvmr.errors import MvmrError

_IMAGES_TO_A_CLASS = 10  # ImageNet has 400 to each of the papers' 3,000 classes; with fewer than ten, most are noise


def count_classes(most: int, images: int) -> int:
    """As many as the paper has, or where that is less one to ten images, and two at least."""
    return max(2, min(most, images // _IMAGES_TO_A_CLASS))


def check_classes(key: str, count: int, images: int | None = None) -> None:
    """Refuse numbers of classes that can't be: 0 leaves it to the number of images.

    Raises: MvmrError: fewer than two, or more than there are images.
    """
    if count == 1 or count < 0:
        raise MvmrError(f"[method] {key} = {count}: give 2 or more, or 0 to let the number of images decide")
    if images is not None and count > images:
        raise MvmrError(f"[method] {key} = {count}, of {images} images: give {images} or fewer")
