"""Embeddings made elsewhere as teacher, `rows:FILE.parquet[?KEY=VALUE&...]`: by an API, or another team's model.

A row belongs to an image by a column of names (the image's path below the data's folder, a longer path that ends so, or
its file name) or of content hashes (sha256 of the file, in hex). What `mvmr embed` writes, a folder of parts too, is of
this form. Columns are found by themselves, or named:

    key        of names or hashes
    embedding  of lists of numbers, all of one length
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from mvmr.data import ImageSet
from mvmr.data.scan import Files
from mvmr.distillation.teachers.teacher import NoTextTower
from mvmr.errors import MvmrError, one_line, shorten, unknown

HASH = "sha256"
_KEYS = ("key", "embedding")
_BLOCK = 4096
_SHOWN = 3
_HEX = 64  # letters of a sha256

Floats = npt.NDArray[np.float32]


def load(what: str, *, device: str | torch.device, text: bool) -> StoredRows:
    """Read a Parquet file of embeddings, or the parts of a folder.

    Raises: MvmrError for a file that is missing or damaged, columns that aren't there or could be several, rows without
        an embedding, of several widths or not finite, or two rows of one name.
    """
    file, _, query = what.partition("?")
    if text:
        raise NoTextTower(f"teacher rows:{file} has no text tower: zero-shot takes a CLIP, such as ViT-B-16")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in _KEYS:
            raise unknown(f"setting of teacher rows:{file}", key, _KEYS)
    return StoredRows(Path(file), what, options.get("key"), options.get("embedding"))


class StoredRows:
    """See `mvmr.distillation.teachers.teacher.Teacher`; it knows the images of its file and no others.

    names: of the rows, by column
    rows: float32 [M, dim]
    """

    parameters = None

    def __init__(self, file: Path, what: str, key: str | None, embedding: str | None) -> None:
        self.name, self.weights = f"rows:{file.name}", str(file)
        self.origin = {"kind": "rows", "what": what}
        table, digest = _read(file)
        self.identity = hashlib.sha256(f"{digest} {key} {embedding}".encode()).hexdigest()
        self.names = {name: table.column(name).to_pylist() for name in _key_columns(file, table, key)}
        first = next(iter(self.names.values()))
        self.rows = _embeddings(file, table, embedding, first)
        self.dim = self.rows.shape[1]
        for name, values in self.names.items():
            if not _is_hash(values):
                _refuse_twins(file, name, values)

    def prepare(self, image: Image.Image) -> Tensor:
        raise MvmrError(f"teacher {self.name} is a file of embeddings: it knows its own images and embeds no others")

    def __call__(self, batch: Tensor) -> Tensor:
        raise MvmrError(f"teacher {self.name} is a file of embeddings: it knows its own images and embeds no others")

    def numbers(self, images: ImageSet) -> npt.NDArray[np.int64]:
        """The number of each image's row, [N], -1 where there is none, by the column that knows most of them.

        Raises: MvmrError: none knows any, or two rows could be of one image.
        """
        best = np.full(len(images), -1)
        for values in self.names.values():
            found = _by_hash(values, images) if _is_hash(values) else _by_name(self.weights, values, images.keys)
            if (found >= 0).sum() > (best >= 0).sum():
                best = found
            if (best >= 0).all():
                break
        if (best < 0).all():
            column, values = next(iter(self.names.items()))
            raise MvmrError(
                f"no row of {self.weights} is of an image of {images.name}: {column} has {shorten(values[0])!r}, "
                f"the images are called {shorten(images.keys[0])!r}; name the column of paths, file names or sha256: "
                f"'rows:{self.weights}?key=COLUMN'"
            )
        return best

    def batches(self, images: ImageSet, start: int) -> Iterator[Floats]:
        """Rows of the images from number `start` on, in order, [b, dim] at a time.

        Raises: MvmrError: as `numbers`, or an image has none.
        """
        numbers = self.numbers(images)
        if missing := describe_missing(images, numbers):
            raise MvmrError(f"{self.weights} lacks {missing}")
        for first in range(start, len(numbers), _BLOCK):
            yield self.rows[numbers[first : first + _BLOCK]]


def describe_missing(images: ImageSet, numbers: npt.NDArray[np.int64]) -> str | None:
    """How many images have no row, and some of them; None where all have one."""
    missing = np.flatnonzero(numbers < 0)
    if not len(missing):
        return None
    shown = ", ".join(images.keys[int(index)] for index in missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN:,} more" if len(missing) > _SHOWN else ""
    return f"{len(missing):,} of the {len(images):,} images of {images.name} ({shown}{more})"


def content_hash(images: ImageSet, index: int) -> str | None:
    """The sha256 of an image's file in hex; None where it is no file."""
    source = images.source
    if not isinstance(source, Files):
        return None
    with open(source.path(index if images.chosen is None else int(images.chosen[index])), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(file: Path) -> tuple[pa.Table, str]:
    """All rows, and a hash of the files."""
    parts = sorted(file.glob("part-*.parquet")) if file.is_dir() else [file]
    digest = hashlib.sha256()
    try:
        for part in parts:
            with part.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        tables = [parquet.ParquetFile(part).read() for part in parts]
        if not sum(len(table) for table in tables):
            raise MvmrError(f"teacher rows:{file} has no rows")
        return pa.concat_tables(tables, promote_options="default"), digest.hexdigest()
    except OSError as error:
        raise MvmrError(f"teacher rows:{file}: cannot read it: {error.strerror or one_line(error)}") from error
    except (ValueError, MemoryError, pa.ArrowException) as error:
        raise MvmrError(f"teacher rows:{file} is not a whole Parquet file of one schema ({one_line(error)})") from error


def _key_columns(file: Path, table: pa.Table, wanted: str | None) -> list[str]:
    """Columns of text without a gap; those of names before those of hashes, which take a look into every file."""
    if wanted is not None and wanted not in table.column_names:
        raise unknown(f"column of {file}", wanted, table.column_names)
    texts = [
        field.name
        for field in table.schema
        if wanted in (None, field.name)
        and (pa.types.is_string(field.type) or pa.types.is_large_string(field.type))
        and not table.column(field.name).null_count
    ]
    if not texts:
        held = f"column {wanted}" if wanted is not None else f"none of the columns {', '.join(table.column_names)}"
        raise MvmrError(f"teacher rows:{file}: {held} holds a text in every row: no row can be given to its image")
    return sorted(texts, key=lambda name: (name == HASH, name != "path"))


def _embeddings(file: Path, table: pa.Table, wanted: str | None, names: Sequence[str]) -> Floats:
    lists = [field.name for field in table.schema if _is_list_of_numbers(field.type)]
    if wanted is not None and wanted not in lists:
        raise unknown(f"column of lists of numbers in {file}", wanted, lists)
    if wanted is None and len(lists) > 1 and "embedding" in lists:
        lists = ["embedding"]
    if wanted is None and len(lists) != 1:
        several = f"several columns of lists of numbers ({', '.join(lists)})" if lists else "no column of embeddings"
        raise MvmrError(f"teacher rows:{file} has {several}; name one: 'rows:{file}?embedding=COLUMN'")
    column = table.column(wanted or lists[0]).combine_chunks()
    if column.null_count:
        empty = int(np.flatnonzero(np.asarray(column.is_null()))[0])
        raise MvmrError(f"teacher rows:{file} has no embedding for {shorten(names[empty])}")
    widths = np.asarray(pa.compute.list_value_length(column))
    if widths.min() != widths.max() or not widths[0]:
        other = int(np.flatnonzero(widths != widths[0])[0]) if widths.min() != widths.max() else 0
        raise MvmrError(
            f"teacher rows:{file} has rows of two widths, {widths[0]} and {widths[other]} ({shorten(names[other])})"
        )
    values = column.flatten()
    rows: Floats = np.asarray(values.to_numpy(zero_copy_only=False), np.float32).reshape(len(column), int(widths[0]))
    finite = np.isfinite(rows).all(1)
    if values.null_count or not finite.all():
        raise MvmrError(f"teacher rows:{file}: the embedding of {shorten(names[int(np.argmin(finite))])} is not finite")
    return rows


def _is_list_of_numbers(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def _is_hash(values: Sequence[str]) -> bool:
    return len(values[0]) == _HEX and all(letter in "0123456789abcdef" for letter in values[0].lower())


def _refuse_twins(file: Path, column: str, values: Sequence[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise MvmrError(f"teacher rows:{file} has two rows with {column} {shorten(value)!r}; keep one")
        seen.add(value)


def _by_hash(values: Sequence[str], images: ImageSet) -> npt.NDArray[np.int64]:
    places = {value.lower(): number for number, value in enumerate(values)}
    hashes = (content_hash(images, index) for index in range(len(images)))
    return np.array([-1 if digest is None else places.get(digest, -1) for digest in hashes])


def _by_name(file: str, values: Sequence[str], keys: Sequence[str]) -> npt.NDArray[np.int64]:
    """By the whole name, else by the end of a longer one, else by the file name where it tells images apart."""
    places = {value: number for number, value in enumerate(values)}
    found = np.array([places.get(key, -1) for key in keys])
    for ends in (_ends_of_values, _ends_of_keys):
        for index, number in ends(values, keys):
            if found[index] < 0:
                found[index] = number
            elif values[found[index]] != keys[index] and found[index] != number:
                one, other = values[found[index]], values[number]
                raise MvmrError(f"two rows of {file} could be of {keys[index]}: {shorten(one)} and {shorten(other)}")
    return found


def _ends_of_values(values: Sequence[str], keys: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Image and row where the row's name is longer: "/data/photos/a/b.jpg" of "a/b.jpg"."""
    images = {key: index for index, key in enumerate(keys)}
    for number, value in enumerate(values):
        parts = value.split("/")
        for cut in range(1, len(parts)):
            index = images.get("/".join(parts[cut:]))
            if index is not None:
                yield index, number
                break


def _ends_of_keys(values: Sequence[str], keys: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Image and row where the row has the file name alone, "b.jpg" of "a/b.jpg", and only one image has that."""
    files: dict[str, int | None] = {}
    for index, key in enumerate(keys):
        name = PurePosixPath(key).name
        files[name] = None if name in files else index
    for number, value in enumerate(values):
        if (only := files.get(value)) is not None:
            yield only, number
