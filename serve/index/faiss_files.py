"""FAISS's own files, opened so that a damaged one is refused instead of searched.

FAISS checks some of what it reads, by its version more or less, and trusts the rest: a neighbour or a list beyond the
end is a read outside of its memory. Here everything is checked that a search follows. What no check here can see are
faults of FAISS's own reader: an ivf or hnsw file of a stranger's is to be trusted like a program.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]

_FAISS: Any = faiss  # its own stubs lack its newer functions
_limit_lock = Lock()  # the limit is one for the whole process


def read_ivf(path: Path, lists: int) -> faiss.IndexIVFFlat:
    """Open an ivf index of so many lists; raises OSError, RuntimeError, MemoryError or ValueError."""
    index = _read(path, b"IwFl", faiss.IndexIVFFlat)
    cells, stored = faiss.downcast_index(index.quantizer), faiss.downcast_InvertedLists(index.invlists)
    _check(isinstance(cells, faiss.IndexFlat) and (cells.ntotal, cells.d) == (lists, index.d), "its cells")
    _check(_size(cells) == cells.ntotal * cells.d * 4, "its cells")
    _check(index.nlist == lists and index.code_size == index.d * 4 and not index.by_residual, "its lists")
    _check(isinstance(stored, faiss.ArrayInvertedLists), "the kind of its lists")
    _check((stored.nlist, stored.code_size) == (lists, index.code_size), "its lists")
    rows = [_ids(stored, number) for number in range(lists)]
    _check(sum(map(len, rows)) == index.ntotal, "the length of its lists")
    numbers = np.concatenate([np.empty(0, np.int64), *rows])
    numbers.sort()
    _check(np.array_equal(numbers, np.arange(index.ntotal)), "its row numbers")
    return index


def read_hnsw(path: Path) -> faiss.IndexHNSWFlat:
    """Open an hnsw index; raises OSError, RuntimeError, MemoryError or ValueError."""
    index = _read(path, b"IHNf", faiss.IndexHNSWFlat)
    stored, graph, count = faiss.downcast_index(index.storage), index.hnsw, index.ntotal
    _check(isinstance(stored, faiss.IndexFlat) and (stored.ntotal, stored.d) == (count, index.d), "its vectors")
    _check(_size(stored) == count * index.d * 4, "its vectors")
    levels, starts, links, widths = (
        faiss.vector_to_array(vector)
        for vector in (graph.levels, graph.offsets, graph.neighbors, graph.cum_nneighbor_per_level)
    )
    tallest = int(levels.max(initial=0))
    _check(count > 0 and levels.shape == (count,) and levels.min() >= 1 and tallest < len(widths), "its levels")
    _check(widths[0] == 0 and bool((np.diff(widths) >= 0).all()), "its levels")
    _check(0 <= graph.entry_point < count and graph.max_level == levels[graph.entry_point] - 1, "its entry point")
    _check(starts.shape == (count + 1,) and starts[0] == 0 and starts[-1] == len(links), "its links")
    _check(np.array_equal(np.diff(starts.astype(np.int64)), widths[levels]), "its links")
    _check(len(links) == 0 or (links.min() >= -1 and links.max() < count), "its links")
    for level in range(1, tallest):
        # A walk looks up a neighbour's links of the level that it came by, so the neighbour must reach up to it.
        places = _link_places(starts, widths, np.flatnonzero(levels > level), level)
        near = links[places]
        _check(bool((levels[near[near >= 0]] > level).all()), "the links between its levels")
    return index


def _read(path: Path, kind: bytes, index_type: type) -> Any:
    with path.open("rb") as file:
        _check(file.read(len(kind)) == kind, "its kind")  # FAISS would read any of its hundred kinds
    with _no_larger_than(path.stat().st_size):
        index = faiss.read_index(str(path))
    _check(type(index) is index_type and index.is_trained, "its kind")
    _check(index.metric_type == faiss.METRIC_INNER_PRODUCT, "its kind")
    return index


@contextmanager
def _no_larger_than(size: int) -> Iterator[None]:
    """Have FAISS make no room for a list of more bytes than the file has; an older FAISS can't be told to."""
    if not hasattr(_FAISS, "set_deserialization_vector_byte_limit"):
        yield
        return
    with _limit_lock:
        before = _FAISS.get_deserialization_vector_byte_limit()
        _FAISS.set_deserialization_vector_byte_limit(size)
        try:
            yield
        finally:
            _FAISS.set_deserialization_vector_byte_limit(before)


def _ids(stored: Any, number: int) -> Ints:
    size = stored.list_size(number)
    return faiss.rev_swig_ptr(stored.get_ids(number), size) if size else np.empty(0, np.int64)


def _size(flat: Any) -> int:
    return int(flat.codes.size())


def _link_places(starts: Ints, widths: Ints, nodes: Ints, level: int) -> Ints:
    """Places of the links of `nodes` at `level`."""
    first = starts[nodes].astype(np.int64) + widths[level]
    return (first[:, None] + np.arange(widths[level + 1] - widths[level])).reshape(-1)


def _check(holds: bool, part: str) -> None:
    if not holds:
        raise ValueError(f"{part} is not as FAISS writes it" if part == "its kind" else f"{part} don't fit one another")
