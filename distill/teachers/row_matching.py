"""Which row of a file of embeddings is of which image: by names, or by the contents of the images' files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute

from mvmr.data import ImageSet
from mvmr.distillation.teachers.rows_file import Numbers, RowsFile
from mvmr.errors import MvmrError, shorten


def match(file: RowsFile, images: ImageSet, read_contents: Callable[[], pa.Array]) -> Numbers:
    """The number of each image's row, [N], -1 where there is none, by the column that knows most of them.

    read_contents: the sha256 of the images' files, as `Contents.of` gives them; asked for where there are hashes

    Raises: MvmrError: no column knows any, two rows could be of one image, or a row is of another file than the image
        of its name.
    """
    best = np.full(len(images), -1)
    for numbers in _candidates(file, images, read_contents):
        if (numbers >= 0).sum() > (best >= 0).sum():
            best = numbers
        if (best >= 0).all():
            break
    if (best < 0).all():
        raise _no_match(file, images)
    for column, agree in compare_contents(file, best, read_contents).items():
        if wrong := np.flatnonzero(agree == 0).tolist():
            more = f", and {len(wrong) - 1:,} more are" if len(wrong) > 1 else ""
            raise MvmrError(
                f"{file.path} has a row of the name {images.keys[wrong[0]]}, but its {column} is that of another file"
                f"{more}; embed these images, or go by names alone: 'rows:{file.path}?key=COLUMN'"
            )
    return best


def compare_contents(file: RowsFile, numbers: Numbers, read_contents: Callable[[], pa.Array]) -> dict[str, np.ndarray]:
    """By column of hashes, of each image: 1 where its row says the hash of its file, 0 another, -1 nothing is known."""
    rows = pa.array(numbers, mask=numbers < 0)
    return {
        column: np.asarray(pa.compute.equal(said.take(rows), read_contents()).cast(pa.int8()).fill_null(-1))
        for column, said in file.hashes.items()
    }


def _candidates(file: RowsFile, images: ImageSet, read_contents: Callable[[], pa.Array]) -> Iterator[Numbers]:
    for names in file.names.values():
        yield _by_name(file, names, images.keys)
    for hashes in file.hashes.values():
        yield _places(read_contents(), hashes)


def _places(values: pa.Array, rows: pa.Array) -> Numbers:
    """The first row of each value, -1 where there is none."""
    places = pa.compute.index_in(values, value_set=rows, skip_nulls=True)
    return np.array(places.fill_null(-1), np.int64)


def _by_name(file: RowsFile, names: pa.Array, keys: Sequence[str]) -> Numbers:
    """By the whole name, else by the end of a longer one, else by the file name where it tells images apart."""
    matched = _places(pa.array(keys, pa.large_string()), names)
    whole = matched >= 0
    left = np.setdiff1d(np.arange(len(names)), matched)
    if not len(left):
        return matched
    values = list(zip(left.tolist(), names.take(pa.array(left)).to_pylist(), strict=True))
    for ends in (_ends_of_names, _ends_of_keys):
        for index, number in ends(values, keys):
            if matched[index] < 0:
                matched[index] = number
            elif not whole[index] and matched[index] != number:
                one, other = (shorten(names[int(row)].as_py()) for row in (matched[index], number))
                raise MvmrError(f"two rows of {file.path} could be of {keys[index]}: {one} and {other}")
    return matched


def _ends_of_names(values: Sequence[tuple[int, str]], keys: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Image and row where the row's name is longer: "/data/photos/a/b.jpg" of "a/b.jpg"."""
    images = {key: index for index, key in enumerate(keys)}
    for number, value in values:
        parts = value.split("/")
        for cut in range(1, len(parts)):
            index = images.get("/".join(parts[cut:]))
            if index is not None:
                yield index, number
                break


def _ends_of_keys(values: Sequence[tuple[int, str]], keys: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Image and row where the row has the file name alone, "b.jpg" of "a/b.jpg", and only one image has that."""
    files: dict[str, int | None] = {}
    for index, key in enumerate(keys):
        name = PurePosixPath(key).name
        files[name] = None if name in files else index
    for number, value in values:
        if (only := files.get(value)) is not None:
            yield only, number


def _no_match(file: RowsFile, images: ImageSet) -> MvmrError:
    """What to say of rows none of which is of an image."""
    files = {PurePosixPath(key).name for key in images.keys}
    for column, (values, twin) in file.doubled.items():
        if any(PurePosixPath(value).name in files for value in values.to_pylist()):
            return MvmrError(
                f"teacher rows:{file.path}: its column {column} names the images of {images.name}, but has two rows of "
                f"one name, {shorten(twin)!r}; keep one"
            )
    column, values = next(iter((file.names | file.hashes).items()))
    return MvmrError(
        f"no row of {file.path} is of an image of {images.name}: {column} has {shorten(values[0])!r}, the images are "
        f"called {shorten(images.keys[0])!r}; give rows of these images, or name the column of paths, file names or "
        f"sha256: 'rows:{file.path}?key=COLUMN'"
    )
