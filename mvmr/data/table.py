"""A table of images: a CSV or Parquet file with a column of paths, one of labels, and perhaps one of splits.

    table:photos/labels.csv
    table:photos.parquet?file=path&label=species&split=fold

Paths are relative to the table's folder. A table without the column of labels names images alone.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from mvmr.data import decoding
from mvmr.data.scan import Packed, printable
from mvmr.errors import MvmrError, shorten, unknown

COLUMNS = {"file": "file", "label": "label", "split": "split"}  # what a column holds -> its name where none is given
_SPLITS = {"train": "train", "test": "test", "val": "test", "validation": "test"}
_FIRST = 1  # rows are counted from it, without the header


@dataclass(frozen=True)
class Table:
    """What a table says.

    folder: that paths are relative to; names: the images' paths, each once
    labels: int64 [N], numbers into `classes`; None, and no classes, where there is no column of labels
    splits: "train" or "test" for each image; None where there is no such column
    """

    folder: bytes
    names: Packed
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    splits: np.ndarray | None


def split_query(location: str) -> tuple[str, str]:
    """The file and the query of "FILE?label=species"; a file of that whole name comes first."""
    if os.path.exists(location):
        return location, ""
    path, _, query = location.partition("?")
    return path, query


def read_table(location: str) -> Table:
    """Read a table.

    location: FILE or FILE?file=COLUMN&label=COLUMN&split=COLUMN, a name for each column that is called otherwise.

    Raises: MvmrError, one line: a file that can't be read or is no table, a column that isn't there, no rows, a path
        that is empty or there twice, an image without a label where others have one, or a split by another name.
    """
    path, query = split_query(location)
    chosen = _columns(query, location)
    columns = _read(path, chosen)
    files = [str(name) for name in columns["file"]]
    if not files:
        raise MvmrError(f"table {path} has no rows; write an image on each")
    _check_names(path, files)
    labels, classes = _number(path, columns.get("label"))
    names = Packed.of(map(os.fsencode, files))
    return Table(os.fsencode(os.path.dirname(os.path.abspath(path))), names, labels, classes, _splits(path, columns))


def _columns(query: str, location: str) -> dict[str, str]:
    """The name of each column that was asked for."""
    pairs = parse_qsl(query, keep_blank_values=True)
    for key, _ in pairs:
        if key not in COLUMNS:
            raise unknown("column", key, COLUMNS)
    if query and (not pairs or not all(value for _, value in pairs)):
        raise MvmrError(f"cannot read {location!r}: write FILE?file=COLUMN&label=COLUMN&split=COLUMN, any of them")
    return dict(pairs)


def _read(path: str, chosen: Mapping[str, str]) -> dict[str, list[Any]]:
    """The columns that are there, by what they hold; those that were asked for must be."""
    try:
        header, take = (_parquet if path.lower().endswith(".parquet") else _csv)(path)
    except OSError as error:
        raise MvmrError(f"cannot read the table {path}: {decoding.reason(error)}; check the path") from error
    names = {kind: chosen.get(kind, default) for kind, default in COLUMNS.items()}
    for kind, name in names.items():
        if name not in header and (kind == "file" or kind in chosen):
            there = shorten(", ".join(map(repr, header))) or "none"
            raise MvmrError(
                f"table {path} has no column {name!r}; it has {there}: say which holds what, "
                f"'table:{path}?{kind}=COLUMN'"
            )
    return {kind: take(name) for kind, name in names.items() if name in header}


def _csv(path: str) -> tuple[list[str], Any]:
    """Header, and a function that gives a column."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise MvmrError(f"{path} is no CSV file in UTF-8 ({shorten(error)}); save it as one") from error
    if not rows:
        raise MvmrError(f"table {path} is empty; its first line names the columns, such as file,label")
    header, body = rows[0], rows[1:]
    if (odd := next((number for number, row in enumerate(body) if len(row) != len(header)), None)) is not None:
        raise MvmrError(
            f"table {path}, row {odd + _FIRST}: {len(body[odd])} values for {len(header)} columns; quote values that "
            "hold a comma"
        )
    return header, lambda name: [row[header.index(name)] for row in body]


def _parquet(path: str) -> tuple[list[str], Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        return list(file.schema_arrow.names), lambda name: file.read(columns=[name]).column(name).to_pylist()
    except pa.ArrowInvalid as error:
        raise MvmrError(f"{path} is no Parquet file: {shorten(error)}") from error


def _check_names(path: str, files: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for number, name in enumerate(files, start=_FIRST):
        if not name or name == "None" or "\x00" in name:
            raise MvmrError(f"table {path}, row {number}: no path of an image; give one, or take the row out")
        if "://" in name:
            raise MvmrError(f"table {path}, row {number}: {shorten(name)} is an address; copy the images here")
        if name in seen:
            raise MvmrError(f"table {path}: {shorten(name)} is in rows {seen[name]} and {number}; an image has one row")
        seen[name] = number


def _number(path: str, values: Iterable[Any] | None) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels as numbers, and the names of the classes in order: as numbers where all are whole ones."""
    if values is None:
        return None, None
    texts = ["" if value is None else str(value).strip() for value in values]
    if "" in texts:
        raise MvmrError(
            f"table {path}, row {texts.index('') + _FIRST}: no label; give one, or keep rows without labels in a table "
            "of their own"
        )
    distinct = set(texts)
    numeric = all(text.lstrip("-").isdecimal() for text in distinct)
    classes = tuple(sorted(distinct, key=lambda text: (int(text), text)) if numeric else sorted(distinct))
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[text] for text in texts], np.int64), tuple(printable(os.fsencode(c)) for c in classes)


def _splits(path: str, columns: Mapping[str, list[Any]]) -> np.ndarray | None:
    if "split" not in columns:
        return None
    words = [str(value).strip().lower() for value in columns["split"]]
    if (odd := next((number for number, word in enumerate(words) if word not in _SPLITS), None)) is not None:
        raise MvmrError(
            f"table {path}, row {odd + _FIRST}: split {shorten(words[odd])!r} should be one of {', '.join(_SPLITS)}"
        )
    return np.array([_SPLITS[word] for word in words])
