"""The kinds of index FAISS searches, each made from a stream of unit vectors and read from one file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import numpy.typing as npt

from mvmr.errors import MvmrError
from mvmr.serve.engine import Floats
from mvmr.serve.index.faiss_files import read_hnsw, read_ivf
from mvmr.storage.row_store import open_rows

Kind = Literal["exact", "ivf", "hnsw"]
KINDS: tuple[Kind, ...] = ("exact", "ivf", "hnsw")
NUMBERS: dict[Kind, tuple[str, ...]] = {"exact": (), "ivf": ("lists", "probes"), "hnsw": ("links", "ef_search")}
FILES = {"exact": "vectors.npy", "ivf": "ivf.faiss", "hnsw": "hnsw.faiss"}
Chunks = Callable[[], Iterable[Floats]]  # float32 [n, D] of length 1, all vectors in order, each time it is called
Neighbours = tuple[Floats, npt.NDArray[np.int64]]  # scores and row numbers, [Q, k], best first; -1: no more

_FAISS: Any = faiss  # its own stubs lack the parameters of a search
_PER_LIST = 39  # vectors that k-means wants for each list it makes
_TRAINED_PER_LIST = 50
_EF_CONSTRUCTION = 200


@dataclass(frozen=True)
class Options:
    """How an approximate index is built and searched; None is chosen by the number of vectors.

    lists, probes: IVF cuts the space into so many cells, and looks into so many of them for a query
    links, ef_search: HNSW ties each vector to so many neighbours, and keeps so many candidates while it looks
    """

    lists: int | None = None
    probes: int | None = None
    links: int = 32
    ef_search: int = 128


def choose_numbers(kind: Kind, options: Options, count: int) -> dict[str, int]:
    """The numbers that matter to a kind, those left open chosen for `count` vectors.

    IVF: 4 * sqrt(count) lists, of which a sixteenth is looked into.

    Raises: MvmrError for too few vectors, or a number that makes no sense.
    """
    if count < 1:
        raise MvmrError("there are no embeddings to index: every image was unreadable")
    for name, value in vars(options).items():
        if value is not None and value < 1:
            raise MvmrError(f"{name} = {value} must be 1 or more")
    if kind == "hnsw":
        return {"links": options.links, "ef_search": options.ef_search}
    if kind == "exact":
        return {}
    lists = options.lists or max(1, round(4 * math.sqrt(count)))
    if count < _PER_LIST * lists:
        fewer = max(1, count // _PER_LIST)
        raise MvmrError(
            f"{count} embeddings are too few for an ivf index of {lists} lists, {_PER_LIST} to each; take --kind "
            f"exact, which is fast at this size, or --lists {fewer}"
        )
    return {"lists": lists, "probes": min(lists, options.probes or max(8, lists // 16))}


def write(kind: Kind, path: Path, chunks: Chunks, numbers: Mapping[str, int], count: int, dim: int) -> None:
    """Make the index file of a kind; in memory are a stretch of the vectors (exact), or the index once (ivf, hnsw)."""
    if kind == "exact":
        with path.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks():
                file.write(chunk.astype("<f4", copy=False).tobytes())
        return
    index: Any
    if kind == "ivf":
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, numbers["lists"], faiss.METRIC_INNER_PRODUCT)
        index.cp.spherical = True
        index.train(_sample(chunks(), count, _TRAINED_PER_LIST * numbers["lists"], dim))
    else:
        index = faiss.IndexHNSWFlat(dim, numbers["links"], faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _EF_CONSTRUCTION
    for chunk in chunks():
        index.add(chunk)
    faiss.write_index(index, str(path))


def read(kind: Kind, path: Path, numbers: Mapping[str, int]) -> Searcher:
    """Open an index file, an exact one without reading it into memory.

    Raises: MvmrError, OSError, RuntimeError, MemoryError or ValueError for one that is damaged.
    """
    if kind == "exact":
        rows = open_rows(path)
        if rows.dtype != np.float32:
            raise ValueError(f"{path.name} holds {rows.dtype} instead of float32")
        return Searcher(rows, None, dict(numbers))
    return Searcher(None, read_ivf(path, numbers["lists"]) if kind == "ivf" else read_hnsw(path), dict(numbers))


@dataclass(frozen=True, eq=False)
class Searcher:
    """An open index file: `vectors` of an exact index, else what FAISS has made. May be called by several threads."""

    vectors: npt.NDArray[np.float32] | None
    approximate: Any
    numbers: dict[str, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of vectors N and their width D."""
        if self.vectors is not None:
            return self.vectors.shape[0], self.vectors.shape[1]
        return int(self.approximate.ntotal), int(self.approximate.d)

    def __call__(self, queries: Floats, k: int, probes: int | None = None, ef_search: int | None = None) -> Neighbours:
        """The k nearest of each query by inner product, queries float32 [Q, D] of length 1."""
        if self.vectors is not None:
            scores, rows = faiss.knn(queries, self.vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        elif "lists" in self.numbers:
            parameters = _FAISS.SearchParametersIVF(nprobe=probes or self.numbers["probes"])
            scores, rows = self.approximate.search(queries, k, params=parameters)
        else:
            wide = max(k, min(ef_search or self.numbers["ef_search"], self.shape[0]))  # room is made for all of them
            scores, rows = self.approximate.search(queries, k, params=_FAISS.SearchParametersHNSW(efSearch=wide))
        return scores, rows


def recall(searcher: Searcher, chunks: Chunks, count: int, *, k: int = 10, queries: int = 100) -> float:
    """The share of the true k nearest that an index finds, for some of its own vectors (themselves not counted)."""
    dim = searcher.shape[1]
    sample = _sample(chunks(), count, queries, dim)
    neighbours = min(k + 1, count)
    scores = np.full((len(sample), 0), 0, np.float32)
    rows = np.zeros((len(sample), 0), np.int64)
    start = 0
    for chunk in chunks():
        near, where = faiss.knn(sample, chunk, min(neighbours, len(chunk)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, rows = np.hstack([scores, near]), np.hstack([rows, where + start])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :neighbours]
        scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
        start += len(chunk)
    approximate = searcher(sample, neighbours)[1]
    pairs = zip(rows.tolist(), approximate.tolist(), strict=True)
    hits = [len(set(exact_rows[1:]) & set(approximate_rows)) for exact_rows, approximate_rows in pairs]
    return sum(hits) / max(1, len(sample) * (neighbours - 1))


def _sample(chunks: Iterable[Floats], count: int, size: int, dim: int) -> Floats:
    """About `wanted` of `count` vectors, evenly spread."""
    numbers = np.unique(np.linspace(0, count - 1, min(count, size)).round().astype(np.int64))
    return np.concatenate([np.empty((0, dim), np.float32), *_pick(chunks, numbers)])


def _pick(chunks: Iterable[Floats], numbers: npt.NDArray[np.int64]) -> Iterator[Floats]:
    start = 0
    for chunk in chunks:
        low, high = np.searchsorted(numbers, [start, start + len(chunk)])
        yield chunk[numbers[low:high] - start]
        start += len(chunk)
