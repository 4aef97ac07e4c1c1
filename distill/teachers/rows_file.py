"""A Parquet file of embeddings: its columns, and its rows a few thousand at a time, whatever its size."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
from pyarrow import parquet

from mvmr.bundles.preprocess import Background, check_background
from mvmr.distillation.teachers.contents import LETTERS
from mvmr.distillation.teachers.teacher import TeacherGone
from mvmr.errors import MvmrError, one_line, shorten, unknown
from mvmr.storage.atomic import cache_dir

HASH, BACKGROUND = "sha256", "background"
_BLOCK = 1024
_HELD = 2**24  # numbers, of the rows that are put in order at a time
# Else pyarrow holds a whole row group at once, or with `pre_buffer` the whole file
_SPARING = {"pre_buffer": False, "buffer_size": 2**20}
# Of a row's norm. A network embeds a copy in another batch, or at another place of its own, with another rounding: some
# 1e-6 in float32, up to about 1e-3 in half precision.
_SAME = 1e-3

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


class RowsFile:
    """A file, or the parts of a folder; every row has been looked at, and none is kept.

    path: as given; digest: of the contents; width: of an embedding
    names: columns of large strings [N] in which no row is without a name, and no name twice
    hashes: columns of sha256 in hex, lower case, null where a row has none
    doubled: columns that give rows one name, with such a name
    backgrounds: what transparent images were laid on, where that is recorded

    Raises: MvmrError for a file that is damaged or has no such columns, rows that are without an embedding, not finite
        or of two widths, two rows of one name, or two embeddings of one content. TeacherGone for one that is not there.
    """

    def __init__(self, path: Path, key: str | None, embedding: str | None) -> None:
        self.path = path
        self._parts = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
        self.digest = _digest(path, self._parts)
        schema, self.backgrounds = _read_schema(path, self._parts)
        self._column = _embedding_column(path, schema, embedding)
        self.names: dict[str, pa.Array] = {}
        self.hashes: dict[str, pa.Array] = {}
        self.doubled: dict[str, tuple[pa.Array, str]] = {}
        with _reading(path):
            self._read_keys(_key_columns(path, schema, key), asked=key is not None)
        self.width = self._check()

    def gather(self, numbers: Numbers) -> Iterator[Floats]:
        """Rows by their numbers, in that order, [b, width] at a time; the file is read once.

        In another order than the file's they lie on disk in between.
        """
        order = np.argsort(numbers, kind="stable")
        picked = self._pick(numbers[order])
        if (order[1:] > order[:-1]).all():
            yield from picked
            return
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            yield from self._reorder(file, order, picked)

    def _reorder(self, file: BinaryIO, order: Numbers, picked: Iterable[Floats]) -> Iterator[Floats]:
        """Rows in their places, where `order` says the place of each: a stretch of places at a time is in memory."""
        stretch, row_bytes = max(_BLOCK, _HELD // self.width), 4 * self.width
        ends, start = np.arange(0, len(order), stretch), 0
        for rows in picked:
            stretches = order[start : start + len(rows)] // stretch
            start += len(rows)
            for number in np.unique(stretches).tolist():
                some = rows[stretches == number]
                file.seek(int(ends[number]) * row_bytes)
                file.write(some.tobytes())
                ends[number] += len(some)
        for begin in range(0, len(order), stretch):
            places = order[(order >= begin) & (order < begin + stretch)] - begin
            file.seek(begin * row_bytes)
            rows = np.empty((len(places), self.width), np.float32)
            rows[places] = np.frombuffer(file.read(len(places) * row_bytes), np.float32).reshape(rows.shape)
            for first in range(0, len(rows), _BLOCK):
                yield rows[first : first + _BLOCK]

    def _pick(self, ascending: Numbers) -> Iterator[Floats]:
        """Rows by numbers that don't descend."""
        for first, rows in self._stream():
            begin, end = np.searchsorted(ascending, (first, first + len(rows))).tolist()
            for start in range(begin, end, _BLOCK):
                yield rows[ascending[start : min(end, start + _BLOCK)] - first]

    def _stream(self) -> Iterator[tuple[int, Floats]]:
        """Number of the first row, and rows, [n, width], of the whole file in order."""
        first = 0
        with _reading(self.path):
            for part in self._parts:
                with parquet.ParquetFile(part, **_SPARING) as opened:
                    for batch in opened.iter_batches(_BLOCK, columns=[self._column]):
                        yield first, self._read(batch.column(0), first)
                        first += len(batch)

    def _name(self, number: int) -> str:
        column = next(iter((*self.names.values(), *self.hashes.values())))
        return shorten(column[number].as_py())

    def _read(self, column: pa.Array, first: int) -> Floats:
        if column.null_count:
            empty = int(np.flatnonzero(np.asarray(column.is_null()))[0])
            raise MvmrError(f"teacher rows:{self.path} has no embedding for {self._name(first + empty)}")
        widths = np.asarray(pa.compute.list_value_length(column))
        if (widths != widths[0]).any() or not widths[0]:
            other = int(np.flatnonzero(widths != widths[0])[0]) if widths.any() else 0
            raise self._two_widths(int(widths[0]), int(widths[other]), first + other)
        values = column.flatten()
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
            rows = np.asarray(values.to_numpy(zero_copy_only=False), np.float32).reshape(len(column), int(widths[0]))
        finite = np.isfinite(rows).all(1)
        if values.null_count or not finite.all():
            name = self._name(first + int(np.argmin(finite)))
            raise MvmrError(f"teacher rows:{self.path}: the embedding of {name} is not finite")
        return rows

    def _two_widths(self, one: int, other: int, number: int) -> MvmrError:
        return MvmrError(f"teacher rows:{self.path} has rows of two widths, {one} and {other} ({self._name(number)})")

    def _check(self) -> int:
        """The width of all rows, each looked at once and kept only where a later one is of the same content."""
        earlier = {number: first for column in self.hashes.values() for number, first in _twins(column)}
        firsts = set(earlier.values())
        seen: dict[int, Floats] = {}
        width = 0
        for first, rows in self._stream():
            if width not in (0, rows.shape[1]):
                raise self._two_widths(width, rows.shape[1], first)
            width = rows.shape[1]
            for number in range(first, first + len(rows)) if firsts else ():
                row = rows[number - first]
                if number in firsts:
                    seen[number] = row.copy()
                if number in earlier and not _agree(seen[earlier[number]], row):
                    raise MvmrError(
                        f"teacher rows:{self.path} has two embeddings of one content ({self._name(number)}); keep one"
                    )
        return width

    def _read_keys(self, columns: Sequence[str], *, asked: bool) -> None:
        """Sort the columns of text into those that tell rows apart, hashes and others."""
        for name in columns:
            values = _read_texts(self._parts, name)
            if _is_hash(values):
                self.hashes[name] = pa.compute.utf8_lower(values)
            elif not values.null_count:
                if (twin := _first_twin(values)) is None:
                    self.names[name] = values
                else:
                    self.doubled[name] = values, twin
        if "path" in self.doubled or (self.doubled and not self.names and not self.hashes):
            name = "path" if "path" in self.doubled else next(iter(self.doubled))
            raise MvmrError(
                f"teacher rows:{self.path} has two rows with {name} {shorten(self.doubled[name][1])!r}; keep one"
            )
        if not self.names and all(values.null_count for values in self.hashes.values()):
            held = f"column {columns[0]}" if asked and columns else "no column"
            raise MvmrError(
                f"teacher rows:{self.path}: {held} holds a text in every row: no row can be given to its image"
            )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever pyarrow meets in a file that is there: damage."""
    try:
        yield
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise MvmrError(
            f"teacher rows:{path} is not a whole Parquet file ({one_line(error)}); make it again"
        ) from error


def _digest(path: Path, parts: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    try:
        for part in parts:
            with part.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    except OSError as error:
        raise TeacherGone(f"teacher rows:{path}: cannot read it: {error.strerror or one_line(error)}") from error
    return digest.hexdigest()


def _read_schema(path: Path, parts: Sequence[Path]) -> tuple[pa.Schema, frozenset[Background]]:
    """The one schema of all parts, and the backgrounds that they record."""
    schemas, count = [], 0
    with _reading(path):
        for part in parts:
            with parquet.ParquetFile(part, **_SPARING) as opened:
                schemas.append(opened.schema_arrow)
                count += opened.metadata.num_rows
    if not count:
        raise MvmrError(f"teacher rows:{path} has no rows")
    if any(not schema.equals(schemas[0]) for schema in schemas):
        raise MvmrError(f"teacher rows:{path}: its parts have different columns; give those of one run")
    return schemas[0], frozenset(background for schema in schemas for background in _backgrounds(schema))


def _backgrounds(schema: pa.Schema) -> list[Background]:
    """The background that `mvmr embed --teacher` records; none of a file of others, whatever they mean by the word."""
    try:
        value = json.loads((schema.metadata or {})[BACKGROUND.encode()])
        background = tuple(value) if isinstance(value, list) else value
        check_background(background)
    except (KeyError, ValueError, MvmrError):
        return []
    return [background]


def _key_columns(path: Path, schema: pa.Schema, wanted: str | None) -> list[str]:
    """Columns of text; those of names before those of hashes, which take a look into every file."""
    if wanted is not None and wanted not in schema.names:
        raise unknown(f"column of {path}", wanted, schema.names)
    texts = [
        field.name
        for field in schema
        if wanted in (None, field.name) and (pa.types.is_string(field.type) or pa.types.is_large_string(field.type))
    ]
    return sorted(texts, key=lambda name: (name == HASH, name != "path"))


def _embedding_column(path: Path, schema: pa.Schema, wanted: str | None) -> str:
    lists = [field.name for field in schema if _is_list_of_numbers(field.type)]
    if wanted is not None and wanted not in lists:
        raise unknown(f"column of lists of numbers in {path}", wanted, lists)
    if wanted is None and len(lists) > 1 and "embedding" in lists:
        return "embedding"
    if wanted is None and len(lists) != 1:
        several = f"several columns of lists of numbers ({', '.join(lists)})" if lists else "no column of embeddings"
        raise MvmrError(f"teacher rows:{path} has {several}; name one: 'rows:{path}?embedding=COLUMN'")
    return wanted or lists[0]


def _read_texts(parts: Sequence[Path], column: str) -> pa.Array:
    """A column of all parts, as large strings: 2 GB of names are no limit."""
    chunks = [chunk for part in parts for chunk in parquet.read_table(part, columns=[column]).column(0).chunks]
    values = pa.concat_arrays([chunk.cast(pa.large_string()) for chunk in chunks])
    values.validate(full=True)
    return values


def _is_list_of_numbers(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def _is_hash(values: pa.Array) -> bool:
    place = pa.compute.index(values.is_valid(), True).as_py()
    first = values[place].as_py() if place >= 0 else ""
    return len(first) == LETTERS and all(letter in "0123456789abcdef" for letter in first.lower())


def _first_twin(values: pa.Array) -> str | None:
    """A value that is there twice."""
    first = _first_places(values)
    again = np.flatnonzero(first != np.arange(len(first)))
    return values[int(again[0])].as_py() if len(again) else None


def _twins(values: pa.Array) -> list[tuple[int, int]]:
    """Row and earlier row of the same content hash: copies of a file are natural, but must have one embedding."""
    first = _first_places(values)
    again = np.flatnonzero((first >= 0) & (first != np.arange(len(first))))
    return list(zip(again.tolist(), first[again].tolist(), strict=True))


def _first_places(values: pa.Array) -> Numbers:
    """Where each value is first, -1 for a null."""
    places = pa.compute.index_in(values, value_set=values, skip_nulls=True)
    return np.asarray(places.fill_null(-1), np.int64)


def _agree(row: Floats, other: Floats) -> bool:
    exact = row.astype(np.float64)
    return bool(np.linalg.norm(exact - other) <= _SAME * np.linalg.norm(exact))
