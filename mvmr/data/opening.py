"""From what the user types after `--data` to an `ImageSet`."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import get_args

from mvmr.bundles.preprocess import WHITE, Background, check_background
from mvmr.data import datasets, samples
from mvmr.data.folder import Opening, open_folder
from mvmr.data.image_set import ImageSet, Split
from mvmr.errors import MvmrError, nearest, unknown

SAMPLES: dict[str, Callable[[Split], ImageSet]] = {"patches": samples.patches, "digits": samples.digits}
STANDARD: dict[str, Callable[[str, Opening], ImageSet]] = {
    "stl10": datasets.stl10,
    "cifar10": partial(datasets.cifar, kind="cifar10"),
    "cifar20": partial(datasets.cifar, kind="cifar20"),
    "cifar100": partial(datasets.cifar, kind="cifar100"),
    "imagenet": datasets.imagenet,
    "voc07": datasets.voc07,
}
DEFAULT_ROOT = "data"


def open_images(
    spec: str | os.PathLike[str],
    split: Split = "train",
    *,
    background: Background = WHITE,
    max_unreadable: float = 0.01,
    progress: bool = False,
) -> ImageSet:
    """Open images by a short description.

    spec: a folder; `stl10`, `cifar10`, `cifar20`, `cifar100`, `imagenet` or `voc07`, each with `:ROOT` (else the folder
        "data"); `sample:patches` or `sample:digits`. A folder called "stl10" is "./stl10".
    split: "train" or "test", with labels where there are any, or "unlabelled": all there is to pretrain on, which is
        "train" wherever the data have a split of their own, with STL10's unlabelled images added
    background: what shows through transparent images: sRGB in [0, 255]; None shows their hidden colours. For a student,
        what its bundle's preprocessing says
    max_unreadable: the share of the files, 0 to 1, that may be unreadable; they are left out and listed in `skipped`
    progress: show a progress bar on stderr while the files of a folder are checked for the first time

    Raises: MvmrError for an unknown name or split, missing files, no images, or too many that cannot be read.
    """
    text = os.fspath(spec)
    if split not in get_args(Split):
        raise unknown("split", split, get_args(Split))
    if not 0 <= max_unreadable <= 1:
        raise MvmrError(f"max_unreadable = {max_unreadable} must lie between 0 and 1")
    check_background(background)
    kind, colon, rest = text.partition(":")
    if kind == "sample" and colon:
        if rest not in SAMPLES:
            raise unknown("sample", text, [f"sample:{name}" for name in SAMPLES])
        return replace(SAMPLES[rest](split), background=background)
    opening = Opening(name=text, split=split, background=background, max_unreadable=max_unreadable, progress=progress)
    if kind in STANDARD:
        found = STANDARD[kind](os.path.expanduser(rest or DEFAULT_ROOT), opening)
        return replace(found, background=background)
    if not os.path.exists(os.path.expanduser(text)) and os.sep not in kind:
        known = [*STANDARD, *(f"sample:{name}" for name in SAMPLES)]
        if nearest(text, known) or nearest(kind, known):
            raise unknown("data", text if nearest(text, known) else kind, known)
    return open_folder(text, opening)
