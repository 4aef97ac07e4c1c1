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

from mvmr.errors import MvmrError
from mvmr.serve.engine import Floats
from mvmr.serve.onefile import manifest_file, paths_file
from mvmr.serve.run_manifest import MANIFEST, read_manifest

CHUNK = 4096
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
        for file in self.files:
            yield from self._of_npy(file, rows) if file.suffix == ".npy" else self._of_parquet(file, rows)

    def _of_parquet(self, file: Path, rows: int) -> Iterator[tuple[list[str], Floats]]:
        try:
            with parquet.ParquetFile(file) as opened:
                for batch in opened.iter_batches(rows, columns=["path", "embedding"]):
                    values = batch.column("embedding").flatten().to_numpy(zero_copy_only=False)
                    yield batch.column("path").to_pylist(), values.astype(np.float32).reshape(-1, self.dim)
        except (OSError, pa.ArrowException) as error:
            raise MvmrError(f"cannot read {file}: {' '.join(str(error).split())[:200]}; make it again") from error

    def _of_npy(self, file: Path, rows: int) -> Iterator[tuple[list[str], Floats]]:
        values = np.load(file, mmap_mode="r")
        with paths_file(file).open(encoding="utf-8", newline="\n") as lines:
            for start in range(0, len(values), rows):
                paths = [line.rstrip("\n") for line in islice(lines, rows)]
                stretch = np.array(values[start : start + rows], np.float32)
                if len(paths) != len(stretch):
                    raise MvmrError(f"{paths_file(file)} has fewer lines than {file} has rows; {_CURE}")
                yield paths, stretch


def open_embeddings(path: str | Path) -> Stored:
    """Open a folder of parts, a folder of shards, a ``.parquet`` or a ``.npy`` file.

    Raises: MvmrError for anything else, a run or a shard that has not finished, or shards of several spaces.
    """
    place = Path(path)
    if place.is_file() and place.suffix in (".parquet", ".npy"):
        return _one_file(place)
    if (place / MANIFEST).is_file():
        return _folder(place)
    shards = sorted(each for each in place.iterdir() if _SHARD.fullmatch(each.name)) if place.is_dir() else []
    if shards:
        return _shards(place, shards)
    if place.with_name(f"{place.name}.partial").is_dir():
        raise MvmrError(f"the run that makes {place} has not finished; go on with it by `mvmr embed --resume`")
    raise MvmrError(f"no embeddings at {place}; {_CURE}")


def _folder(folder: Path) -> Stored:
    says = read_manifest(folder / MANIFEST)
    if says["state"] != "finished":
        raise MvmrError(f"the run in {folder} has not finished; go on with it by `mvmr embed --resume`")
    files = tuple(folder / part["file"] for part in says["parts"])
    return _stored(folder, files, says)


def _shards(folder: Path, shards: Sequence[Path]) -> Stored:
    of = int(shards[0].name.rpartition("-")[2])
    wanted = [folder / f"shard-{number:05d}-of-{of:05d}" for number in range(of)]
    if missing := [each.name for each in wanted if not (each / MANIFEST).is_file()]:
        raise MvmrError(f"{folder} lacks {missing[0]}, {len(missing)} of {of} shards; run `mvmr embed` for them")
    if strange := sorted(set(shards) - set(wanted)):
        raise MvmrError(f"{folder} holds shards of two runs, {wanted[0].name} and {strange[0].name}; move one away")
    pieces = [_folder(each) for each in wanted]
    first = pieces[0]
    for each in pieces:
        if (each.space_id, each.dim) != (first.space_id, first.dim):
            told = f"{first.path.name} is of space {first.space_id[:12]}, {each.path.name} of {each.space_id[:12]}"
            raise MvmrError(f"{folder} mixes embedding spaces: {told}; embed all shards by one bundle")
    files = tuple(file for each in pieces for file in each.files)
    count = sum(each.count for each in pieces)
    return Stored(folder, files, count, first.dim, first.space_id, first.bundle, first.precision)


def _one_file(file: Path) -> Stored:
    beside = manifest_file(file)
    if beside.is_file():
        return _stored(file, (file,), read_manifest(beside))
    if file.suffix == ".npy":
        raise MvmrError(f"{file} has no {beside.name} beside it, which says of which space it is; {_CURE}")
    try:
        footer = parquet.ParquetFile(file)
        schema, count = footer.schema_arrow, footer.metadata.num_rows
        dim, said = schema.field("embedding").type.list_size, schema.metadata or {}
        space, precision = said[b"space_id"].decode(), said[b"precision"].decode()
    except (OSError, pa.ArrowException, KeyError, AttributeError) as error:
        raise MvmrError(f"{file} is no Parquet file of embeddings that names their space; {_CURE}") from error
    return Stored(file, (file,), count, dim, space, "", precision)


def _stored(place: Path, files: tuple[Path, ...], says: dict[str, Any]) -> Stored:
    try:
        told = str(says["space_id"]), str(says["bundle"]), str(says["settings"]["precision"])
        count, dim = int(says["rows"]), int(says["dim"])
    except (KeyError, TypeError, ValueError) as error:
        raise MvmrError(f"the manifest of {place} lacks {error}; {_CURE}") from error
    return Stored(place, files, count, dim, *told)
