"""Nearest neighbours among embedded images: an index is one folder, built once and searched by cosine similarity."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from mvmr.errors import MvmrError, one_line, shorten, unknown
from mvmr.progress import is_wanted, track
from mvmr.serve.batch.manifest import failure_reason
from mvmr.serve.batch.parts import claim_folder
from mvmr.serve.batch.stored import Stored, open_embeddings
from mvmr.serve.engine import Floats
from mvmr.serve.index.faiss_kinds import FILES, KINDS, Kind, Options, Searcher, choose_numbers, read, recall, write
from mvmr.serve.index.folder import DESCRIPTION, PATHS, SCHEMA, Description, check_files, fingerprints, read_paths
from mvmr.serve.vectors import normalized_space, unit
from mvmr.storage import staging
from mvmr.storage.atomic import sync
from mvmr.storage.lock import LOCK

_OWN = {DESCRIPTION, PATHS, LOCK, *FILES.values()}  # what a build that was killed may have left


@dataclass(frozen=True)
class Hit:
    """A neighbour: the path of the image, the cosine in [-1, 1] and its row, from 0 in the order it was embedded."""

    path: str
    score: float
    row: int


@dataclass(frozen=True, eq=False)
class Index:
    """An index in memory, or memory-mapped where it is exact; make one with `build`, open one with `load`.

    space_id: only vectors of this embedding space may be searched for; dim: their width D
    kind: ``exact``, ``ivf`` or ``hnsw``; bundle, precision: what made the embeddings, "" where nobody knows
    recall: share of the true ten nearest that an approximate index found for 100 of its own vectors; 1 for an exact one
    """

    path: Path
    space_id: str
    dim: int
    kind: Kind
    bundle: str
    precision: str
    recall: float
    searcher: Searcher
    paths: pa.ChunkedArray

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Index:
        """Open an index.

        Raises: MvmrError for a folder that holds none, or one that is damaged or of a newer mvmr.
        """
        folder = Path(path)
        try:
            description = Description.read(folder)
            check_files(folder, description)
            searcher = read(description.kind, folder / FILES[description.kind], description.numbers)
            paths = read_paths(folder / PATHS)
        except FileNotFoundError as error:
            missing = Path(str(error.filename)).name
            raise MvmrError(f"no index at {folder}: it has no {missing}; make one with `mvmr index`") from error
        except (OSError, ValueError, RuntimeError, MemoryError, pa.ArrowException) as error:
            raise MvmrError(
                f"cannot read the index {folder} ({one_line(error)}); build it again with `mvmr index`"
            ) from error
        if not searcher.shape == (len(paths), description.dim) == (description.vectors, description.dim):
            raise MvmrError(f"the files of the index {folder} don't fit one another; build it again with `mvmr index`")
        return cls(
            path=folder,
            space_id=description.space_id,
            dim=description.dim,
            kind=description.kind,
            bundle=description.bundle,
            precision=description.precision,
            recall=description.recall,
            searcher=searcher,
            paths=paths,
        )

    def __len__(self) -> int:
        return len(self.paths)

    def search(
        self, vectors: Floats, k: int = 10, *, probes: int | None = None, ef_search: int | None = None
    ) -> list[list[Hit]]:
        """The k nearest images of each vector, best first, by cosine; fewer where the index is smaller.

        Shapes: vectors float32 [Q, D], of any length -> Q lists.
        probes, ef_search: more finds more and takes longer, of ivf and hnsw; None as it was built.

        Raises: MvmrError for vectors of another width, or that are not finite, or k below 1.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise MvmrError(f"the index {self.path} takes vectors [Q, {self.dim}], these are {list(vectors.shape)}")
        if min(k, *(value for value in (probes, ef_search) if value is not None), 1) < 1:
            raise MvmrError(f"k = {k}, probes = {probes} and ef_search = {ef_search} must be 1 or more")
        if not np.isfinite(vectors).all():
            raise MvmrError("a vector to search for holds NaN or infinity")
        if not len(vectors):
            return []
        scores, rows = self.searcher(unit(vectors), min(k, len(self)), probes, ef_search)
        scores = scores.clip(-1, 1)  # float32 makes 1.0000001 of some
        return [
            [Hit(self.paths[row].as_py(), score, row) for score, row in zip(*neighbours, strict=True) if row >= 0]
            for neighbours in zip(scores.tolist(), rows.tolist(), strict=True)
        ]

    def check_space(self, space_id: str, whose: object) -> None:
        """Refuse vectors of another embedding space, which are not to be mixed with these; raises MvmrError.

        Normalised vectors are of another space than raw ones: see `mvmr.serve.engine.Engine.space_of`.
        """
        if normalized_space(space_id) == self.space_id:
            reason = f"{whose} gives raw vectors and the index {self.path} holds normalised ones of the same student"
            raise MvmrError(f"{reason}; embed with normalize")
        if space_id == normalized_space(self.space_id):
            reason = f"{whose} gives normalised vectors and the index {self.path} holds raw ones of the same student"
            raise MvmrError(f"{reason}; embed without normalize")
        if space_id != self.space_id:
            raise MvmrError(
                f"{whose} gives vectors of another embedding space ({space_id[:12]}) than the index {self.path} holds "
                f"({self.space_id[:12]}); take the bundle that made it{f', {self.bundle}' if self.bundle else ''}"
            )


def build(
    embeddings: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: str = "exact",
    lists: int | None = None,
    probes: int | None = None,
    links: int = 32,
    ef_search: int = 128,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Index:
    """Index embeddings by their direction.

    Args:
        embeddings: what `mvmr embed` has written: folder, folder of shards, ``.parquet`` or ``.npy``.
        out: the folder of the index; it is there whole or not at all.
        kind: ``exact`` compares with every vector, ``ivf`` with those of the nearest cells, ``hnsw`` walks a graph.
        lists, probes, links, ef_search: see `mvmr.serve.index.faiss_kinds.Options`.
        overwrite: replaces an index that stands at `out`.

    Raises: MvmrError for embeddings that are unfinished, damaged or too few, or an `out` that is taken.
    """
    progress = is_wanted(progress)
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    index_kind: Kind = next(name for name in KINDS if name == kind)
    stored, target = open_embeddings(Path(embeddings)), Path(out)
    numbers = choose_numbers(index_kind, Options(lists, probes, links, ef_search), stored.count)
    if os.path.lexists(target):
        if not (target / DESCRIPTION).is_file():
            raise MvmrError(f"{target} exists and is no index; it stays untouched: give another --out")
        if not overwrite:
            raise MvmrError(f"{target} holds an index; give another --out, or --overwrite to replace it")
    partial = target.with_name(f"{target.name}.partial")
    if partial.is_dir() and (strange := {file.name for file in partial.iterdir()} - _OWN):
        raise MvmrError(f"{partial}, where the index would be made, holds {min(strange)!r}; give another --out")
    with claim_folder(partial):
        try:
            _write(partial, stored, index_kind, numbers, progress)
            _publish(partial, target)
        except OSError as error:
            reason = failure_reason(error)
            raise MvmrError(f"cannot write the index {target}: {reason}; mend this and run again") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Index.load(target)


def _write(folder: Path, stored: Stored, kind: Kind, numbers: dict[str, int], progress: bool) -> None:
    file = folder / FILES[kind]

    def chunks() -> Iterator[Floats]:
        for _, vectors in stored.chunks():
            yield unit(vectors)

    done, broken, first = 0, 0, ""
    with (
        track("paths", 0, stored.count, unit="rows", shown=progress) as advance,
        pa.OSFile(str(folder / PATHS), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as paths,
    ):
        for names, vectors in stored.chunks():
            paths.write_batch(pa.record_batch([pa.array(names, pa.string())], schema=SCHEMA))
            if not (finite := np.isfinite(vectors).all(axis=1)).all():
                first = first or names[int(np.argmin(finite))]
                broken += int(np.sum(~finite))
            done += len(names)
            advance(done, "")
    if done != stored.count:
        raise MvmrError(f"{stored.path} holds {done} rows and its manifest says {stored.count}; embed the images again")
    if broken:
        raise MvmrError(
            f"{broken} of the {done} embeddings of {stored.path} hold NaN or infinity, the first is that of "
            f"{shorten(first)}; embed the images again, by another --precision"
        )
    write(kind, file, chunks, numbers, stored.count, stored.dim)
    share = 1.0 if kind == "exact" else recall(read(kind, file, numbers), chunks, stored.count)
    for path in (file, folder / PATHS):
        sync(path)
    description = Description(
        kind=kind,
        numbers=numbers,
        vectors=stored.count,
        dim=stored.dim,
        space_id=stored.space_id,
        bundle=stored.bundle,
        precision=stored.precision,
        recall=round(share, 4),
        **fingerprints([file, folder / PATHS]),
    )
    description.write(folder)


def _publish(partial: Path, target: Path) -> None:
    (partial / LOCK).unlink(missing_ok=True)
    staging.exchange(partial, target, DESCRIPTION)
