"""Embeddings made elsewhere as teacher, `rows:FILE.parquet[?KEY=VALUE&...]`: by an API, or another team's model.

A row belongs to an image by a column of names (the image's path below the data's folder, a longer path that ends so, or
its file name) or of content hashes (sha256 of the file, in hex). What `mvmr embed` writes, a folder of parts too, is of
this form. Columns are found by themselves, or named:

    key        of names or hashes
    embedding  of lists of numbers, all of one length
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

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
from mvmr.distillation.teachers.teacher import NoTextTower, TeacherGone, read_settings
from mvmr.errors import MvmrError, one_line, shorten, unknown

HASH = "sha256"
_KEYS = ("key", "embedding")
_BLOCK = 4096
_SHOWN = 3
_COMPARED = 16  # images whose content is looked at where names and hashes are both there
_HEX = 64  # letters of a sha256

Floats = npt.NDArray[np.float32]


def load(what: str, *, device: str | torch.device, text: bool) -> StoredRows:
    """Read a Parquet file of embeddings, or the parts of a folder.

    Raises: MvmrError for a file that is missing or damaged, columns that aren't there or could be several, rows without
        an embedding, of several widths or not finite, or two rows of one name.
    """
    file, options = read_settings("rows", what, _KEYS)
    if text:
        raise NoTextTower(f"teacher rows:{file} has no text tower: zero-shot takes a CLIP, such as ViT-B-16")
    return StoredRows(Path(file), what, options.get("key"), options.get("embedding"))


class StoredRows:
    """See `mvmr.distillation.teachers.teacher.Teacher`; it knows the images of its file and no others.

    names: of the rows, by column; dim: of an embedding
    """

    parameters = None

    def __init__(self, file: Path, what: str, key: str | None, embedding: str | None) -> None:
        self.name, self.weights = f"rows:{file.name}", str(file)
        self.origin = {"kind": "rows", "what": what}
        self._parts = _parts(file)
        schema, digest = _read_schema(file, self._parts)
        self.identity = hashlib.sha256(f"{digest} {key} {embedding}".encode()).hexdigest()
        self._column = _embedding_column(file, schema, embedding)
        self.names = _read_names(file, self._parts, _key_columns(file, schema, key), asked=key is not None)
        self._asked = key is not None
        self.dim = self._check()
        self._known: dict[str, npt.NDArray[np.int64]] = {}  # by fingerprint

    def prepare(self, image: Image.Image) -> Tensor:
        raise MvmrError(f"teacher {self.name} is a file of embeddings: it knows its own images and embeds no others")

    def __call__(self, batch: Tensor) -> Tensor:
        raise MvmrError(f"teacher {self.name} is a file of embeddings: it knows its own images and embeds no others")

    def numbers(self, images: ImageSet) -> npt.NDArray[np.int64]:
        """The number of each image's row, [N], -1 where there is none, by the column that knows most of them.

        Raises: MvmrError: none knows any, or two rows could be of one image.
        """
        if images.fingerprint not in self._known:
            self._known[images.fingerprint] = self._match(images)
        return self._known[images.fingerprint]

    def check(self, images: ImageSet) -> None:
        """Refuse images of which some have no row.

        Raises: MvmrError: that says which.
        """
        if missing := describe_missing(images, self.numbers(images)):
            raise MvmrError(f"{self.weights} lacks {missing}")

    def batches(self, images: ImageSet, start: int) -> Iterator[Floats]:
        """Rows of the images from number `start` on, in order, [b, dim] at a time.

        Raises: MvmrError: as `numbers`, or an image has none.
        """
        self.check(images)
        numbers = self.numbers(images)
        rows = np.empty((len(next(iter(self.names.values()))), self.dim), np.float32)
        for first, values in self._stream():
            rows[first : first + len(values)] = values
        for first in range(start, len(numbers), _BLOCK):
            yield rows[numbers[first : first + _BLOCK]]

    def _match(self, images: ImageSet) -> npt.NDArray[np.int64]:
        best = np.full(len(images), -1)
        for values in self.names.values():
            matched = _by_hash(values, images) if _is_hash(values) else _by_name(self.weights, values, images.keys)
            if (matched >= 0).sum() > (best >= 0).sum():
                best = matched
            if (best >= 0).all():
                break
        if not self._asked:
            self._compare_contents(images, best)
        if (best < 0).all():
            column, values = next(iter(self.names.items()))
            raise MvmrError(
                f"no row of {self.weights} is of an image of {images.name}: {column} has {shorten(values[0])!r}, the "
                f"images are called {shorten(images.keys[0])!r}; give rows of these images, or name the column of "
                f"paths, file names or sha256: 'rows:{self.weights}?key=COLUMN'"
            )
        return best

    def _compare_contents(self, images: ImageSet, numbers: npt.NDArray[np.int64]) -> None:
        """Refuse rows whose names are those of the images, but whose hashes say that they are of others."""
        known = np.flatnonzero(numbers >= 0)
        for index in known[:: max(1, len(known) // _COMPARED)].tolist():
            digest = content_hash(images, index)
            for values in filter(_is_hash, self.names.values()):
                if digest is not None and values[numbers[index]].lower() != digest:
                    raise MvmrError(
                        f"{self.weights} has a row of the name {images.keys[index]}, but its sha256 is that of another "
                        f"file; embed these images, or go by names alone: 'rows:{self.weights}?key=COLUMN'"
                    )

    def _stream(self) -> Iterator[tuple[int, Floats]]:
        """Number of the first row, and rows, [n, width], of the whole file in order."""
        first = 0
        for part in self._parts:
            with parquet.ParquetFile(part) as opened:
                for batch in opened.iter_batches(_BLOCK, columns=[self._column]):
                    yield first, self._read(batch.column(0), first)
                    first += len(batch)

    def _read(self, column: pa.Array, first: int) -> Floats:
        names = next(iter(self.names.values()))
        if column.null_count:
            empty = int(np.flatnonzero(np.asarray(column.is_null()))[0])
            raise MvmrError(f"teacher {self.name} has no embedding for {shorten(names[first + empty])}")
        widths = np.asarray(pa.compute.list_value_length(column))
        if (widths != widths[0]).any() or not widths[0]:
            other = int(np.flatnonzero(widths != widths[0])[0]) if widths.any() else 0
            name = shorten(names[first + other])
            raise MvmrError(f"teacher {self.name} has rows of two widths, {widths[0]} and {widths[other]} ({name})")
        values = column.flatten()
        rows = np.asarray(values.to_numpy(zero_copy_only=False), np.float32).reshape(len(column), int(widths[0]))
        finite = np.isfinite(rows).all(1)
        if values.null_count or not finite.all():
            name = shorten(names[first + int(np.argmin(finite))])
            raise MvmrError(f"teacher {self.name}: the embedding of {name} is not finite")
        return rows

    def _check(self) -> int:
        """The width of all rows, each looked at once and kept nowhere but for those of files with the same content."""
        pairs = _twins(self.names)
        wanted = {number for pair in pairs for number in pair}
        seen: dict[int, Floats] = {}
        width = 0
        try:
            for first, rows in self._stream():
                if width not in (0, rows.shape[1]):
                    name = shorten(next(iter(self.names.values()))[first])
                    raise MvmrError(f"teacher {self.name} has rows of two widths, {width} and {rows.shape[1]} ({name})")
                width = rows.shape[1]
                seen |= {first + k: rows[k].copy() for k in range(len(rows)) if wanted and first + k in wanted}
        except (ValueError, MemoryError, OSError, pa.ArrowException) as error:
            raise MvmrError(f"teacher {self.name} can't be read ({one_line(error)}); make it again") from error
        for one, other in pairs:
            if not np.array_equal(seen[one], seen[other]):
                name = shorten(next(iter(self.names.values()))[other])
                raise MvmrError(f"teacher {self.name} has two embeddings of one content ({name}); keep one")
        return width


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


def _parts(file: Path) -> list[Path]:
    return sorted(file.glob("part-*.parquet")) if file.is_dir() else [file]


def _read_schema(file: Path, parts: Sequence[Path]) -> tuple[pa.Schema, str]:
    """The one schema of all parts, and a hash of them."""
    digest, schemas, count = hashlib.sha256(), [], 0
    try:
        for part in parts:
            with part.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
            with parquet.ParquetFile(part) as opened:
                schemas.append(opened.schema_arrow)
                count += opened.metadata.num_rows
    except OSError as error:
        raise TeacherGone(f"teacher rows:{file}: cannot read it: {error.strerror or one_line(error)}") from error
    except (ValueError, MemoryError, pa.ArrowException) as error:
        raise MvmrError(f"teacher rows:{file} is not a whole Parquet file ({one_line(error)})") from error
    if not count:
        raise MvmrError(f"teacher rows:{file} has no rows")
    if any(not schema.equals(schemas[0]) for schema in schemas):
        raise MvmrError(f"teacher rows:{file}: its parts have different columns; give those of one run")
    return schemas[0], digest.hexdigest()


def _key_columns(file: Path, schema: pa.Schema, wanted: str | None) -> list[str]:
    """Columns of text; those of names before those of hashes, which take a look into every file."""
    if wanted is not None and wanted not in schema.names:
        raise unknown(f"column of {file}", wanted, schema.names)
    texts = [
        field.name
        for field in schema
        if wanted in (None, field.name) and (pa.types.is_string(field.type) or pa.types.is_large_string(field.type))
    ]
    return sorted(texts, key=lambda name: (name == HASH, name != "path"))


def _read_names(file: Path, parts: Sequence[Path], columns: Sequence[str], *, asked: bool) -> dict[str, list[str]]:
    """The columns that can tell rows apart: a text in every row, and no name twice."""
    table = pa.concat_tables([parquet.read_table(part, columns=list(columns)) for part in parts])
    names = {name: table.column(name).to_pylist() for name in columns if not table.column(name).null_count}
    if not names:
        held = f"column {columns[0]}" if asked and columns else "no column"
        raise MvmrError(f"teacher rows:{file}: {held} holds a text in every row: no row can be given to its image")
    twins = {name: None if _is_hash(values) else _first_twin(values) for name, values in names.items()}
    usable = {name: values for name, values in names.items() if twins[name] is None}
    if not usable:
        name = next(iter(names))
        raise MvmrError(f"teacher rows:{file} has two rows with {name} {shorten(twins[name])!r}; keep one")
    if "path" in twins and twins["path"] is not None and not asked:
        raise MvmrError(f"teacher rows:{file} has two rows with path {shorten(twins['path'])!r}; keep one")
    return usable


def _embedding_column(file: Path, schema: pa.Schema, wanted: str | None) -> str:
    lists = [field.name for field in schema if _is_list_of_numbers(field.type)]
    if wanted is not None and wanted not in lists:
        raise unknown(f"column of lists of numbers in {file}", wanted, lists)
    if wanted is None and len(lists) > 1 and "embedding" in lists:
        return "embedding"
    if wanted is None and len(lists) != 1:
        several = f"several columns of lists of numbers ({', '.join(lists)})" if lists else "no column of embeddings"
        raise MvmrError(f"teacher rows:{file} has {several}; name one: 'rows:{file}?embedding=COLUMN'")
    return wanted or lists[0]


def _is_list_of_numbers(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def _is_hash(values: Sequence[str]) -> bool:
    return len(values[0]) == _HEX and all(letter in "0123456789abcdef" for letter in values[0].lower())


def _first_twin(values: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def _twins(names: Mapping[str, Sequence[str]]) -> list[tuple[int, int]]:
    """Pairs of rows of the same content hash: copies of a file are natural, but must have one embedding."""
    pairs = []
    for values in names.values():
        places: dict[str, int] = {}
        if _is_hash(values):
            pairs += [
                (places[value.lower()], number)
                for number, value in enumerate(values)
                if places.setdefault(value.lower(), number) != number
            ]
    return pairs


def _by_hash(values: Sequence[str], images: ImageSet) -> npt.NDArray[np.int64]:
    places = {value.lower(): number for number, value in enumerate(values)}
    hashes = (content_hash(images, index) for index in range(len(images)))
    return np.array([-1 if digest is None else places.get(digest, -1) for digest in hashes])


def _by_name(file: str, values: Sequence[str], keys: Sequence[str]) -> npt.NDArray[np.int64]:
    """By the whole name, else by the end of a longer one, else by the file name where it tells images apart."""
    places = {value: number for number, value in enumerate(values)}
    matched = np.array([places.get(key, -1) for key in keys])
    for ends in (_ends_of_values, _ends_of_keys):
        for index, number in ends(values, keys):
            if matched[index] < 0:
                matched[index] = number
            elif values[matched[index]] != keys[index] and matched[index] != number:
                one, other = values[matched[index]], values[number]
                raise MvmrError(f"two rows of {file} could be of {keys[index]}: {shorten(one)} and {shorten(other)}")
    return matched


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
