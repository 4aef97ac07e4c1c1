"""Embeddings that `mvmr embed` has written, read a stretch at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from mvmr.bundles.manifest import WIDEST
from mvmr.errors import MvmrError, one_line, shorten
from mvmr.serve.batch.manifest import MANIFEST, read_manifest
from mvmr.serve.batch.single_file import manifest_file, paths_file
from mvmr.serve.engine import Floats
from mvmr.storage.row_store import open_rows

CHUNK = 4096
_VALUES = 2**24  # at once, so that wide embeddings take no more memory than usual ones
_SHARD = re.compile(r"shard-(\d+)-of-(\d+)")
_CURE = "give the --out of a finished `mvmr embed`"


@dataclass(frozen=True)
class Stored:
    """Embeddings on disk.

    path: as given; files: in order; count: N rows; dim: width D; space_id: of the embedding space
    bundle: where the bundle that made them was, "" when nobody knows; precision: what they were computed in
    """

    path: Path
    files: tuple[Path, ...]
    count: int
    dim: int
    space_id: str
    bundle: str
    precision: str

    def chunks(self, rows: int = CHUNK) -> Iterator[tuple[list[str], Floats]]:
        """Paths, and embeddings float32 [n, D] as they were written, of at most `rows` rows at a time.

        Raises: MvmrError for a file that is damaged.
        """
        rows = max(1, min(rows, _VALUES // self.dim))
        for file in self.files:
            yield from self._of_npy(file, rows) if file.suffix == ".npy" else self._of_parquet(file, rows)

    def _of_parquet(self, file: Path, rows: int) -> Iterator[tuple[list[str], Floats]]:
        try:
            with parquet.ParquetFile(file) as opened:
                if misfit := _misfit(opened.schema_arrow, self.dim):
                    raise MvmrError(f"{file} {misfit}; {_CURE}")
                for batch in opened.iter_batches(rows, columns=["path", "embedding"]):
                    yield self._of_batch(file, batch)
        except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
            raise MvmrError(f"cannot read {file}: {one_line(error)}; make it again") from error

    def _of_batch(self, file: Path, batch: pa.RecordBatch) -> tuple[list[str], Floats]:
        batch.validate(full=True)
        paths, embeddings = batch.column("path"), batch.column("embedding")
        values = embeddings.flatten()
        if paths.null_count or embeddings.null_count or values.null_count:
            raise MvmrError(f"{file} has rows without a path or an embedding; {_CURE}")
        with np.errstate(over="ignore"):  # what is too large becomes infinite, which an index refuses
            floats = values.to_numpy(zero_copy_only=False).astype(np.float32)
        return paths.to_pylist(), floats.reshape(-1, self.dim)

    def _of_npy(self, file: Path, rows: int) -> Iterator[tuple[list[str], Floats]]:
        values = open_rows(file)
        if values.shape[1] != self.dim:
            raise MvmrError(f"{file} has embeddings {values.shape[1]} wide, its manifest says {self.dim}; {_CURE}")
        try:
            with paths_file(file).open(encoding="utf-8", newline="\n") as lines:
                for start in range(0, len(values), rows):
                    paths = [line.rstrip("\n") for line in islice(lines, rows)]
                    stretch = np.array(values[start : start + rows], np.float32)
                    if len(paths) != len(stretch):
                        raise MvmrError(f"{paths_file(file)} has fewer lines than {file} has rows; {_CURE}")
                    yield paths, stretch
        except OSError as error:
            raise MvmrError(f"cannot read {paths_file(file)}: {error.strerror}; {_CURE}") from error
        except UnicodeDecodeError as error:
            raise MvmrError(f"{paths_file(file)} is not UTF-8 text (byte {error.start}); {_CURE}") from error


def open_embeddings(path: str | Path) -> Stored:
    """Open a folder of parts, a folder of shards, a ``.parquet`` or a ``.npy`` file.

    Raises: MvmrError for anything else, a run or a shard that has not finished, shards of several spaces, or parts
        that lie elsewhere.
    """
    source = Path(path)
    stored = _open(source)
    files = [*stored.files, *(paths_file(file) for file in stored.files if file.suffix == ".npy")]
    within = (source if source.is_dir() else source.parent).resolve()
    for file in files:
        # A link would let a stranger's run name any file of this machine; the file that was given may be one.
        if file != source and not file.resolve().is_relative_to(within):
            raise MvmrError(f"{file} is a link out of {within}; put the file itself there, or give its own folder")
        if not file.is_file():
            raise MvmrError(f"{stored.path} lacks {file.name}; {_CURE}")
    return stored


def _open(path: Path) -> Stored:
    if path.is_file() and path.suffix in (".parquet", ".npy"):
        return _open_file(path)
    if (path / MANIFEST).is_file():
        return _open_folder(path)
    shards = sorted(child for child in path.iterdir() if _SHARD.fullmatch(child.name)) if path.is_dir() else []
    if shards:
        return _open_shards(path, shards)
    if path.with_name(f"{path.name}.partial").is_dir():
        raise MvmrError(f"the run that makes {path} has not finished; go on with it by `mvmr embed --resume`")
    raise MvmrError(f"no embeddings at {path}; {_CURE}")


def _open_folder(folder: Path) -> Stored:
    manifest = read_manifest(folder / MANIFEST)
    if manifest["state"] != "finished":
        raise MvmrError(f"the run in {folder} has not finished; go on with it by `mvmr embed --resume`")
    files = tuple(folder / part["file"] for part in manifest["parts"])
    return _from_manifest(folder, files, manifest)


def _open_shards(folder: Path, shards: Sequence[Path]) -> Stored:
    total = int(shards[0].name.rpartition("-")[2])
    expected = [folder / f"shard-{number:05d}-of-{total:05d}" for number in range(total)]
    if missing := [shard.name for shard in expected if not (shard / MANIFEST).is_file()]:
        raise MvmrError(f"{folder} lacks {missing[0]}, {len(missing)} of {total} shards; run `mvmr embed` for them")
    if strange := sorted(set(shards) - set(expected)):
        raise MvmrError(f"{folder} holds shards of two runs, {expected[0].name} and {strange[0].name}; move one away")
    pieces = [_open_folder(shard) for shard in expected]
    first = pieces[0]
    for piece in pieces:
        if (piece.space_id, piece.dim) != (first.space_id, first.dim):
            message = f"{first.path.name} is of space {first.space_id[:12]}, {piece.path.name} of {piece.space_id[:12]}"
            raise MvmrError(f"{folder} mixes embedding spaces: {message}; embed all shards by one bundle, alike")
    files = tuple(file for piece in pieces for file in piece.files)
    count = sum(piece.count for piece in pieces)
    return Stored(folder, files, count, first.dim, first.space_id, first.bundle, first.precision)


def _open_file(file: Path) -> Stored:
    manifest = manifest_file(file)
    if manifest.is_file():
        return _from_manifest(file, (file,), read_manifest(manifest))
    if file.suffix == ".npy":
        raise MvmrError(f"{file} has no {manifest.name} beside it, which says of which space it is; {_CURE}")
    try:
        footer = parquet.ParquetFile(file)
        schema, count = footer.schema_arrow, footer.metadata.num_rows
        dim, metadata = schema.field("embedding").type.list_size, schema.metadata or {}
        space, precision = metadata[b"space_id"].decode(), metadata[b"precision"].decode()
    except (OSError, ValueError, MemoryError, pa.ArrowException, KeyError, AttributeError) as error:
        raise MvmrError(f"{file} is no Parquet file of embeddings that names their space; {_CURE}") from error
    if not 1 <= dim <= WIDEST:
        raise MvmrError(f"{file} has embeddings {dim} wide, not between 1 and {WIDEST}; {_CURE}")
    return Stored(file, (file,), count, dim, space, "", precision)


def _misfit(schema: pa.Schema, dim: int) -> str | None:
    """What keeps columns from being those of embeddings of width `dim`; None where nothing does."""
    for name in ("path", "embedding"):
        if len(schema.get_all_field_indices(name)) != 1:
            return f"has not one column {name!r}"
    path, embedding = schema.field("path").type, schema.field("embedding").type
    if not pa.types.is_string(path) and not pa.types.is_large_string(path):
        return f"has a column 'path' of {shorten(path)} instead of strings"
    if not pa.types.is_fixed_size_list(embedding) or not pa.types.is_floating(embedding.value_type):
        return f"has a column 'embedding' of {shorten(embedding)} instead of lists of {dim} floats"
    return None if embedding.list_size == dim else f"has embeddings {embedding.list_size} wide instead of {dim}"


def _from_manifest(source: Path, files: tuple[Path, ...], manifest: dict[str, Any]) -> Stored:
    try:
        space, bundle, dim = str(manifest["space_id"]), str(manifest["bundle"]), manifest["dim"]
        precision = str(manifest["settings"]["precision"])
    except KeyError as error:
        raise MvmrError(f"the manifest of {source} lacks {error}; {_CURE}") from error
    if type(dim) is not int or not 1 <= dim <= WIDEST:
        raise MvmrError(f"the manifest of {source} says dim = {shorten(repr(dim))}; {_CURE}")
    return Stored(source, files, manifest["rows"], dim, space, bundle, precision)
