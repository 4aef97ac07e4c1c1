"""Maps of a gallery in two dimensions: the teacher's, and the student's laid over it as closely as it goes."""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from scipy.linalg import orthogonal_procrustes
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

from mvmr.errors import MvmrError
from mvmr.evaluation.neighbours import nearest
from mvmr.serve.engine import Floats
from mvmr.storage.atomic import atomic

Method = Literal["pca", "umap"]
Doubles = npt.NDArray[np.float64]

_VERSION = 1  # of what the maps are made by: a cached map of another one is made again
_LEAST = 4  # images UMAP takes; of fewer it sees no neighbourhoods
_ROUNDING = 1e-6  # spread of unit rows that differ by nothing but float32's rounding
_SMALL = 32  # rows and columns of a matrix that all eigenvectors are taken of
_DIGITS = 5  # of a coordinate that is sent, counted from the map's width
_SURROGATES = re.compile("[\ud800-\udfff]")  # of a file's name that is no UTF-8, which JSON can't hold


@dataclass(frozen=True, eq=False)
class Map:
    """Where every image stands for the teacher and for the student; float32 [N, 2] each, row i for image i.

    disparity: how far the two shapes differ, 0 (same) to 1 (nothing in common), as scipy.spatial.procrustes has it
    variance: percent of the embeddings' variance that teacher's and student's map show; None where that says nothing
    """

    method: Method
    teacher: Floats
    student: Floats
    disparity: float
    variance: tuple[float, float] | None = None


class Labelled(Protocol):
    """What a map's JSON takes from a gallery: names of its images, and their classes where it has any."""

    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def labels(self) -> npt.NDArray[np.int64] | None: ...
    @property
    def classes(self) -> tuple[str, ...] | None: ...


def pca_map(teacher: Floats, student: Floats) -> Map:
    """Map by the two directions of largest variance of the normalised embeddings.

    Shapes: teacher float32 [N, D1], student float32 [N, D2], not normalised; row i of both is of the same image.

    Raises:
        MvmrError: an embedding is not finite.
        ValueError: teacher and student differ in length.
    """
    rows = _unit(teacher, student)
    (left, left_share), (right, right_share) = _principal(rows[0]), _principal(rows[1])
    return _lay_over("pca", left, right, (left_share, right_share))


def umap_map(teacher: Floats, student: Floats, *, seed: int = 0, neighbours: int = 15) -> Map:
    """Map by UMAP, which keeps near what is near by cosine; the PCA is where it begins. Takes seconds to minutes.

    It holds Python's global lock for seconds at a time: a server runs it in another process. Fewer than four images
    keep the places of their PCA.

    Args:
        seed: the same one gives the same map, on one machine.
        neighbours: of each image, itself included, whose distances are kept; as many as there are if that is fewer.

    Shapes and Raises: as :func:`pca_map`.
    """
    left, right = (_umap(rows, seed, neighbours) for rows in _unit(teacher, student))
    return _lay_over("umap", left, right, None)


_MAKERS: Mapping[Method, Callable[[Floats, Floats], Map]] = {"pca": pca_map, "umap": umap_map}


def cached_map(method: Method, teacher: Floats, student: Floats, file: Path) -> Map:
    """Return the map that `file` holds, or make it and leave it there; a file of other embeddings is made again.

    Shapes: as :func:`pca_map`. Raises: also MvmrError where the file cannot be written.
    """
    if (stored := stored_map(method, teacher, student, file)) is not None:
        return stored
    result = _MAKERS[method](teacher, student)
    with atomic(file) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            key=np.array(_key(method, teacher, student)),
            teacher=result.teacher,
            student=result.student,
            disparity=np.float64(result.disparity),
            variance=np.array(result.variance or (), np.float64),
        )
    return result


def stored_map(method: Method, teacher: Floats, student: Floats, file: Path) -> Map | None:
    """Return the map that `file` holds of these embeddings; None where there is no such file, or none to be read."""
    try:
        with file.open("rb") as stream:  # numpy leaves open what it can't read
            stored = np.load(stream, allow_pickle=False)
            if str(stored["key"]) != _key(method, teacher, student):
                return None
            variance = stored["variance"].tolist()
            return Map(
                method,
                stored["teacher"],
                stored["student"],
                float(stored["disparity"]),
                (variance[0], variance[1]) if variance else None,
            )
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def map_json(
    layout: Map, gallery: Labelled, overlap: Floats | None, right: npt.NDArray[np.integer] | None, *, k: int = 10
) -> dict[str, Any]:
    """Return what map.js draws, as JSON values.

    Args:
        overlap: neighbour overlap of every image in percent, [N], of its k nearest.
        right: which side's classifier is right on an image, [N]: 0 neither, 1 teacher only, 2 student only, 3 both.
    """
    labels, classes = gallery.labels, gallery.classes or ()
    labelled = labels is not None and bool(classes)
    return {
        "method": layout.method,
        "n": len(layout.teacher),
        **_coordinates(layout),
        "keys": _encodable(gallery.keys),
        "classes": _encodable(classes) if labelled else None,
        "labels": np.asarray(labels).tolist() if labelled else None,
        "overlap": None if overlap is None else np.asarray(overlap, np.float64).tolist(),
        "right": None if right is None else np.asarray(right).tolist(),
        "k": k,
        "disparity": layout.disparity,
        "variance": None if layout.variance is None else list(layout.variance),
    }


def _coordinates(layout: Map) -> dict[str, list[list[float]]]:
    """Both maps as [[x..], [y..]], with the digits that can be seen."""
    both = {"teacher": np.asarray(layout.teacher, np.float64), "student": np.asarray(layout.student, np.float64)}
    width = max(float(np.abs(points).max(initial=0)) for points in both.values())
    digits = _DIGITS - 1 - floor(log10(width)) if width > 0 else 0
    return {side: points.round(digits).T.tolist() for side, points in both.items()}


def _encodable(names: Sequence[str]) -> list[str]:
    return [_SURROGATES.sub("\N{REPLACEMENT CHARACTER}", name) for name in names]


def _unit(teacher: Floats, student: Floats) -> tuple[Floats, Floats]:
    if len(teacher) != len(student):
        raise ValueError(f"a map is of the same images on both sides: got {len(teacher)} and {len(student)} of them")
    for side, rows in (("teacher", teacher), ("student", student)):
        if not np.isfinite(rows).all():
            first = int(np.argmin(np.isfinite(rows).all(1)))
            raise MvmrError(f"the {side}'s embedding of image {first} holds NaN or infinity, which no map can show")

    def unit(rows: Floats) -> Floats:
        length = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        return (rows / np.where(length > 0, length, 1)).astype(np.float32)

    return unit(teacher), unit(student)


def _principal(rows: Floats) -> tuple[Doubles, float]:
    """Scores [N, 2] on the two first principal components, and the percent of the variance in them.

    Exact, by the smaller of the two Gram matrices; of each component the score that is largest in size is positive.
    """
    centred = rows.astype(np.float64)
    centred -= centred.mean(0)
    tall = len(centred) > centred.shape[1]
    gram = centred.T @ centred if tall else centred @ centred.T
    total = float(np.trace(gram))
    values, vectors = _leading(gram) if total > len(rows) * _ROUNDING**2 else (np.zeros(2), np.zeros((len(gram), 2)))
    scores = centred @ vectors if tall else vectors * np.sqrt(values)
    scores[:, values <= len(rows) * _ROUNDING**2] = 0
    scores *= np.where(scores[np.abs(scores).argmax(0), [0, 1]] < 0, -1, 1)
    return scores, min(100 * float(values.sum()) / total, 100.0) if scores.any() else 100.0


def _leading(gram: Doubles) -> tuple[Doubles, Doubles]:
    """The two largest eigenvalues, [2], and their eigenvectors, [M, 2]; zeros for a second one that is not there."""
    solution = None
    if len(gram) > _SMALL:
        with suppress(ArpackNoConvergence):
            solution = eigsh(gram, 2, v0=np.random.default_rng(0).normal(size=len(gram)))
    values, vectors = solution or np.linalg.eigh(gram)
    order = np.argsort(-values)[:2]
    missing = 2 - len(order)
    return np.pad(np.maximum(values[order], 0), (0, missing)), np.pad(vectors[:, order], ((0, 0), (0, missing)))


def _umap(rows: Floats, seed: int, neighbours: int) -> Doubles:
    scores, _ = _principal(rows)
    if len(rows) < _LEAST or not scores.any():
        return scores
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)
        from umap import UMAP  # numba, which it brings, takes seconds

    count = max(2, min(neighbours, len(rows) - 1))
    cosines, indices = nearest(rows, rows, count)
    distances = np.sqrt(np.maximum(2 - 2 * cosines, 0))
    # UMAP divides by the spread of where it begins, on both axes.
    noise = np.random.default_rng(seed).normal(scale=1e-4, size=scores.shape)
    begin = (10 * (scores / np.abs(scores).max() + noise)).astype(np.float32)
    maker = UMAP(
        n_neighbors=count,
        init=begin,
        random_state=seed,
        n_jobs=1,
        precomputed_knn=(indices, distances, None),
        force_approximation_algorithm=True,  # else it has its own way with few images, whose neighbours are the same
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"precomputed_knn\[2\]", UserWarning)
        return np.asarray(maker.fit_transform(rows), np.float64)


def _lay_over(method: Method, teacher: Doubles, student: Doubles, variance: tuple[float, float] | None) -> Map:
    """Move, turn and mirror the student's map to where its points are nearest to the teacher's, in the teacher's size.

    The scale of least squares would make a student smaller the less it agrees, which looks like a collapse and is none.
    """
    centre = teacher.mean(0)
    fixed, moved = teacher - centre, student - student.mean(0)
    spread = bool(np.ptp(teacher, axis=0).any()), bool(np.ptp(student, axis=0).any())
    if all(spread):
        size, own = np.linalg.norm(fixed), np.linalg.norm(moved)
        rotation, agreement = orthogonal_procrustes(moved / own, fixed / size)
        moved = moved @ rotation * (size / own)
        disparity = max(0.0, 1 - float(agreement) ** 2)
    else:  # at least one of them is a single place
        disparity = float(any(spread))
    return Map(method, teacher.astype(np.float32), (moved + centre).astype(np.float32), disparity, variance)


def _key(method: Method, teacher: Floats, student: Floats) -> str:
    digest = hashlib.sha256(f"{_VERSION} {method} {teacher.shape} {student.shape}".encode())
    for rows in (teacher, student):
        digest.update(np.ascontiguousarray(rows, "<f4").data)
    return digest.hexdigest()
