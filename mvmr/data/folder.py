"""A folder of images as an `ImageSet`: its layout, its classes, its splits."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from mvmr.bundles.preprocess import Background
from mvmr.data.checking import Verdicts, check_files
from mvmr.data.image_set import ImageSet, Labels, Skipped, Split, background_mark, digest
from mvmr.data.scan import Files, Scan, printable, scan
from mvmr.errors import MvmrError

TEST_SHARE = 0.2
_NAMED = 3  # unreadable files named in an error


@dataclass(frozen=True)
class Labelling:
    """Names of classes, and what computes the numbers into them of all files, int64 [N]."""

    classes: tuple[str, ...]
    read: Callable[[], Labels]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How to open images.

    name: as typed; max_unreadable: the share of the files that may be unreadable, and are left out
    check: whether every file is decoded to find those; else all count as readable
    """

    name: str
    split: Split
    background: Background
    max_unreadable: float
    progress: bool = False
    check: bool = True


def open_folder(path: str, opening: Opening) -> ImageSet:
    """Open a folder of images of any depth.

    A folder that holds `train/` and `test/` (or `val/`) has its splits there. Any other is one piece: "unlabelled" is
    all of it, "train" and "test" a fixed 80 : 20 split by the hash of each file's path, class by class. The folders on
    the first level are the classes when every image lies in one and there are at least two.

    Raises: MvmrError when the folder holds no images, or too many cannot be read.
    """
    root = os.fsencode(os.path.abspath(path))
    test_part = next((part for part in (b"test", b"val") if os.path.isdir(os.path.join(root, part))), None)
    if test_part is not None and os.path.isdir(os.path.join(root, b"train")):
        return open_parts(root, b"train", test_part, opening)
    contents = scan(root)
    return _one_piece(contents, opening, _by_folder(contents.files, b"", _first_level(contents.files.names)))


def open_files(files: Files, opening: Opening, labelling: Labelling | None = None) -> ImageSet:
    """Open files whose names are known as a folder of one piece.

    Raises: MvmrError when too many cannot be read.
    """
    return _one_piece(Scan(files), opening, labelling)


def _one_piece(contents: Scan, opening: Opening, labelling: Labelling | None) -> ImageSet:
    files, verdicts = contents.files, _check_readable(contents, opening)
    good = np.flatnonzero(verdicts.short_sides > 0)
    if opening.split == "unlabelled":
        return _image_set(contents, verdicts, good, opening, None)
    labels = np.zeros(len(files.names), np.int64) if labelling is None else labelling.read()
    in_test = _test_mask(files, good, labels)
    indices = good[in_test if opening.split == "test" else ~in_test]
    return _image_set(contents, verdicts, indices, opening, labelling)


def open_parts(root: bytes, train: bytes, test: bytes, opening: Opening) -> ImageSet:
    """Open one of two sub-folders of `root` as the split asked for; both have the same classes in the same order."""
    part = test if opening.split == "test" else train
    contents = scan(root, part)
    verdicts = _check_readable(contents, opening)
    good = np.flatnonzero(verdicts.short_sides > 0)
    classes: tuple[bytes, ...] | None = None
    if opening.split != "unlabelled" and _first_level(contents.files.names, len(part) + 1, fewest=1) is not None:
        # a class without images in one part must not shift the numbers of the others
        both = sorted({*_folders(os.path.join(root, train)), *_folders(os.path.join(root, test))})
        classes = tuple(both) if len(both) > 1 else None
    return _image_set(contents, verdicts, good, opening, _by_folder(contents.files, part + b"/", classes))


def open_listed(files: Files, opening: Opening, labelling: Labelling | None = None) -> ImageSet:
    """Open all files whose names are known, whatever the split."""
    contents = Scan(files)
    verdicts = _check_readable(contents, opening)
    return _image_set(contents, verdicts, np.flatnonzero(verdicts.short_sides > 0), opening, labelling)


def _by_folder(files: Files, below: bytes, classes: Sequence[bytes] | None) -> Labelling | None:
    if classes is None:
        return None
    return Labelling(tuple(map(printable, classes)), partial(folder_labels, files, below, classes))


def folder_labels(files: Files, below: bytes, classes: Sequence[bytes]) -> Labels:
    """Return int64 [N], the number of the first folder under `below` in each file's path."""
    numbers = {name: number for number, name in enumerate(classes)}
    cut = len(below)
    return np.fromiter((numbers[name[cut:].split(b"/", 1)[0]] for name in files.names), np.int64, len(files.names))


def _image_set(
    contents: Scan,
    verdicts: Verdicts,
    indices: npt.NDArray[np.intp],
    opening: Opening,
    labelling: Labelling | None,
) -> ImageSet:
    files = contents.files
    keys = files.keys
    if len(indices) == 0:
        raise MvmrError(
            f"data {opening.name!r}: no images in the {opening.split!r} split of {printable(files.root)}; add some"
        )
    stamps = np.stack([files.sizes[indices], files.times[indices]]).astype("<i8").tobytes()
    return ImageSet(
        name=opening.name,
        split=opening.split,
        source=files,
        fingerprint=digest(
            [stamps, *(files.names[int(index)] for index in indices), *background_mark(opening.background)]
        ),
        background=opening.background,
        read_labels=None if labelling is None else labelling.read,
        classes=None if labelling is None else labelling.classes,
        short_sides=verdicts.short_sides[indices],
        skipped=(*contents.unlisted, *(Skipped(keys[index], text) for index, text in sorted(verdicts.reasons.items()))),
        chosen=indices.astype(np.int64),
    )


def _check_readable(contents: Scan, opening: Opening) -> Verdicts:
    """Check all files. Raises: MvmrError when there are none, or too many are bad."""
    files = contents.files
    total, root = len(files.names), printable(files.root)
    if total == 0 and not contents.unlisted:
        seen = f"{contents.other_files:,} other files, but no images" if contents.other_files else "nothing"
        raise MvmrError(
            f"data {opening.name!r}: {root} holds {seen}; give a folder with images (jpg, png, webp, tiff, ...)"
        )
    if not opening.check:
        return Verdicts(np.ones(total, np.int32), {})
    verdicts = check_files(files, progress=opening.progress)
    bad = [f"{item.key} ({item.reason})" for item in contents.unlisted]
    keys = files.keys
    bad += [f"{keys[index]} ({text})" for index, text in sorted(verdicts.reasons.items())[:_NAMED]]
    count = len(contents.unlisted) + len(verdicts.reasons)
    everything = total + len(contents.unlisted)
    if count > opening.max_unreadable * everything:
        more = f" and {count - _NAMED:,} more" if count > _NAMED else ""
        share, limit = _percent(count / everything), _percent(opening.max_unreadable)
        raise MvmrError(
            f"data {opening.name!r}: {count:,} of {everything:,} image files in {root} ({share}) cannot be read, more "
            f"than the {limit} allowed: {', '.join(bad[:_NAMED])}{more}; mend or remove them, or allow a larger "
            "share with max_unreadable (--max-unreadable)"
        )
    return verdicts


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _first_level(names: Sequence[bytes], cut: int = 0, fewest: int = 2) -> tuple[bytes, ...] | None:
    """Return the sorted folders the files lie in, after `cut` letters; None when one lies outside, or too few."""
    folders: set[bytes] = set()
    for name in names:
        folder, slash, _ = name[cut:].partition(b"/")
        if not slash:
            return None
        folders.add(folder)
    return tuple(sorted(folders)) if len(folders) >= fewest else None


def _folders(path: bytes) -> list[bytes]:
    with os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(b".")]


def _test_mask(files: Files, good: npt.NDArray[np.intp], labels: Labels) -> npt.NDArray[np.bool_]:
    """Return bool [len(good)], True for the test images: in each class the 20 % whose paths have the lowest hashes.

    A class of one image has none in the test split. Adding images moves few of the others across.
    """
    hashes = np.fromiter(
        (int.from_bytes(hashlib.blake2b(files.names[int(i)], digest_size=8).digest(), "little") for i in good),
        np.uint64,
        len(good),
    )
    in_test = np.zeros(len(good), bool)
    for label in np.unique(labels[good]):
        rows = np.flatnonzero(labels[good] == label)
        count = 0 if len(rows) < 2 else max(1, round(TEST_SHARE * len(rows)))
        in_test[rows[np.argsort(hashes[rows], kind="stable")[:count]]] = True
    return in_test
