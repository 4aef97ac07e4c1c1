"""The files of an index: described by index.json, and read so that what a stranger put there is refused or harmless.

Sizes and hashes show accidents. A stranger writes the hashes, too; against that stands that every file is checked for
all that a search relies on, whatever the hashes say. The vectors of an exact index are not hashed when they are opened,
for they may be larger than memory: any bytes of the right number are vectors, and NaN is near to nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from stat import S_ISREG
from typing import Any

import pyarrow as pa

from mvmr import __version__, strict_json
from mvmr.bundles.manifest import WIDEST
from mvmr.errors import MvmrError, shorten
from mvmr.serve.index.faiss_kinds import FILES, KINDS, NUMBERS, Kind
from mvmr.storage import staging
from mvmr.storage.atomic import write_json

FORMAT = 1
DESCRIPTION, PATHS = "index.json", "paths.arrow"
SCHEMA = pa.schema([("path", pa.string())])
_CURE = "build it again with `mvmr index`"


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of index.json.

    numbers: of `mvmr.serve.index.faiss_kinds.choose_numbers`; vectors, dim: how many, how wide; recall: see `Index`
    space_id, bundle, precision: of the embeddings; files: sizes in bytes by name
    sha256: of the files, hex, by name; empty in an index of before, which had none
    """

    kind: Kind
    numbers: Mapping[str, int]
    vectors: int
    dim: int
    space_id: str
    bundle: str
    precision: str
    recall: float
    files: Mapping[str, int]
    sha256: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Read index.json.

        Raises: FileNotFoundError; MvmrError for one that is damaged, of a newer mvmr, or describes no index.
        """
        if not (folder / DESCRIPTION).exists():
            raise FileNotFoundError(errno.ENOENT, "no such file", os.fspath(folder / DESCRIPTION))
        document = strict_json.read_object(folder / DESCRIPTION, "the description of an index")
        if document.get("format") != FORMAT:
            form = shorten(repr(document.get("format")))
            raise MvmrError(f"{folder} has format {form}, this mvmr reads {FORMAT}; upgrade: pip install -U mvmr")
        document.setdefault("sha256", {})
        for field in fields(cls):
            if field.name not in document or not _FITS[field.name](document[field.name]):
                value = shorten(repr(document.get(field.name, "nothing")))
                raise MvmrError(f"cannot read the index {folder}: {DESCRIPTION} says {field.name} = {value}; {_CURE}")
        index = cls(**{field.name: document[field.name] for field in fields(cls)})
        names = {FILES[index.kind], PATHS}
        if set(index.numbers) != set(NUMBERS[index.kind]) or set(index.files) != names or set(index.sha256) - names:
            raise MvmrError(f"cannot read the index {folder}: its {DESCRIPTION} is of no {index.kind} index; {_CURE}")
        return index

    def write(self, folder: Path) -> None:
        """Write index.json."""
        write_json(folder / DESCRIPTION, {"format": FORMAT, "mvmr_version": __version__, **asdict(self)})


def fingerprints(files: Sequence[Path]) -> dict[str, Any]:
    """What a description says of files: ``files`` and ``sha256``."""
    return {
        "files": {file.name: file.stat().st_size for file in files},
        "sha256": {file.name: staging.digest(file) or "" for file in files},
    }


def check_files(folder: Path, description: Description) -> None:
    """Look whether the files are those that were written, by size, and by hash where they are small or have a format.

    Raises: OSError for a file that is missing, MvmrError for another one.
    """
    for name, size in description.files.items():
        status = (folder / name).stat()
        if not S_ISREG(status.st_mode) or status.st_size != size:
            raise MvmrError(f"{folder / name} has not the {size} bytes it was written with; {_CURE}")
    for name, digest in description.sha256.items():
        if name != FILES["exact"] and staging.digest(folder / name) != digest:
            raise MvmrError(f"{folder / name} has changed since it was written; {_CURE}")


def read_paths(file: Path) -> pa.ChunkedArray:
    """The paths, memory-mapped: strings, none of them null; every offset and every letter has been looked at.

    Raises: OSError, ValueError or pa.ArrowException.
    """
    with pa.ipc.open_file(pa.memory_map(str(file))) as opened:
        if not opened.schema.equals(SCHEMA):
            raise ValueError(f"{file.name} holds other columns than the paths")
        table = opened.read_all()
    table.validate(full=True)
    paths = table["path"]
    if paths.null_count:
        raise ValueError(f"{file.name} lacks {paths.null_count} paths")
    return paths


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object, least: int = 1, most: int = 2**48) -> bool:
    return type(value) is int and least <= value <= most


def _is_table(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


_FITS: dict[str, Callable[[Any], bool]] = {
    "kind": lambda value: value in KINDS,
    "numbers": lambda value: _is_table(value, lambda number: _is_count(number, most=2**31 - 1)),
    "vectors": _is_count,
    "dim": lambda value: _is_count(value, most=WIDEST),
    "space_id": _is_text,
    "bundle": _is_text,
    "precision": _is_text,
    "recall": lambda value: type(value) in (int, float) and 0 <= value <= 1,
    "files": lambda value: _is_table(value, lambda size: _is_count(size, least=0)),
    "sha256": lambda value: _is_table(value, _is_text),
}
