"""From what the user types after `--data` to an `ImageSet`: images known by number, with their labels."""

import glob
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np

from mvmr.bundles.preprocess import WHITE, Background, check_background
from mvmr.data import datasets, grammar, samples
from mvmr.data.folder import Labelling, Opening, open_files, open_folder, open_listed
from mvmr.data.grammar import Described
from mvmr.data.image_set import ImageSet, Split
from mvmr.data.scan import Packed, match, read_list, stat_files
from mvmr.data.table import read_table
from mvmr.errors import MvmrError, unknown
from mvmr.progress import is_wanted


def open_images(
    spec: str | os.PathLike[str],
    split: Split = "train",
    *,
    background: Background = WHITE,
    max_unreadable: float = 0.01,
    progress: bool | None = None,
) -> ImageSet:
    """Open images by a short description.

    spec: a folder, a glob, `list:FILE`, or the name of a data set, as docs/data.md and `mvmr.data.grammar` have them. A
        folder called "stl10" is "./stl10".
    split: "train" or "test", with labels where there are any, or "unlabelled": all there is to pretrain on, which is
        "train" wherever the data have a split of their own, with STL10's unlabelled images added; all of a folder that
        has none, a glob or a list, of whose images a fifth are "test"
    background: what shows through transparent images: sRGB in [0, 255]; None shows their hidden colours. For a student,
        what its bundle's preprocessing says
    max_unreadable: the share of the files, 0 to 1, that may be unreadable; they are left out and listed in `skipped`
    progress: show a progress bar on stderr while the files of a folder are checked for the first time

    Raises: MvmrError for an unknown name or split, missing files, no images, too many that cannot be read, or a kind of
        description that only `mvmr embed` takes.
    """
    progress = is_wanted(progress)
    text = os.fspath(spec)
    if split not in get_args(Split):
        raise unknown("split", split, get_args(Split))
    if not 0 <= max_unreadable <= 1:
        raise MvmrError(f"max_unreadable = {max_unreadable} must lie between 0 and 1")
    check_background(background)
    opening = Opening(name=text, split=split, background=background, max_unreadable=max_unreadable, progress=progress)
    return open_description(grammar.parse(text), opening)


def open_description(description: Described, opening: Opening) -> ImageSet:
    """Open what has been parsed; raises as `open_images` does."""
    if description.kind.refusal:
        raise MvmrError(f"data {description.text!r} {description.kind.refusal}")
    return replace(_SETS[description.kind.name](description.location, opening), background=opening.background)


def _glob(pattern: str, opening: Opening) -> ImageSet:
    absolute = os.fsencode(os.path.abspath(pattern))
    root = os.path.dirname(absolute)
    while glob.has_magic(root):
        root = os.path.dirname(root)
    names = (os.path.relpath(path, root) for path in match(absolute)[0])
    return open_files(stat_files(root, Packed.of(names)), opening)


def _list(path: str, opening: Opening) -> ImageSet:
    absolute = os.fsencode(os.path.abspath(path))
    names = read_list(absolute)
    if any(b"://" in name for name in names):
        raise MvmrError(
            f"data {opening.name!r} lists addresses, which only `mvmr embed` reads as yet: copy the images here, and "
            "list their paths"
        )
    return open_files(stat_files(os.path.dirname(absolute), names), opening)


def _table(location: str, opening: Opening) -> ImageSet:
    """The images of a table, its own split where it has one; a path that leads nowhere counts as unreadable."""
    table = read_table(location)
    rows = np.arange(len(table.names))
    if table.splits is not None:
        rows = np.flatnonzero(table.splits == ("test" if opening.split == "test" else "train"))
        if not len(rows):
            raise MvmrError(f"data {opening.name!r}: no row of the table is in the {opening.split!r} split; add some")
    names = Packed.of(table.names[int(row)] for row in rows)
    files = stat_files(table.folder, names)
    labels = table.labels
    labelling = (
        None if labels is None or table.classes is None else Labelling(table.classes, partial(np.take, labels, rows))
    )
    if table.splits is None:
        return open_files(files, opening, labelling)
    return open_listed(files, opening, None if opening.split == "unlabelled" else labelling)


_SETS: dict[str, Callable[[str, Opening], ImageSet]] = {
    "folder": open_folder,
    "glob": _glob,
    "list": _list,
    "table": _table,
    "stl10": datasets.stl10,
    "cifar10": partial(datasets.cifar, kind="cifar10"),
    "cifar20": partial(datasets.cifar, kind="cifar20"),
    "cifar100": partial(datasets.cifar, kind="cifar100"),
    "imagenet": datasets.imagenet,
    "voc07": datasets.voc07,
    "sample:patches": lambda _, opening: samples.patches(opening.split),
    "sample:digits": lambda _, opening: samples.digits(opening.split),
}
