"""How faithful a student is to its teacher, and how far either is from chance: figures of features alone.

There are two kinds of chance. A permutation of the images shows what is left when nothing is shared. An untrained
encoder shows what is shared for no better reason than that both saw the same images; a student has to be above both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from sklearn.metrics import confusion_matrix
from torch import Tensor

from mvmr.evaluation.neighbours import find_neighbours, neighbour_overlap
from mvmr.evaluation.scores import linear_cka
from mvmr.methods.parts.dependence import centred_distances, correlate, effective_rank
from mvmr.progress import track

Figures = dict[str, Any]  # JSON values
_RESAMPLES = 2000
_AT_ONCE = 10**7  # row numbers that the bootstrap draws at a time
_COLUMNS = 8192  # of long rows, read at a time
_WORST, _WORST_OF_A_CLASS = 12, 2
_VALUES = 512


def interval(values: np.ndarray, *, seed: int = 0) -> Figures:
    """Mean of ``values`` [N] and its 95 % percentile bootstrap interval, in their unit: mean, low and high.

    Of one value, or of equal ones, all three are the same.

    Source: Efron and Tibshirani, "An introduction to the bootstrap" (1993), chapter 13.
    """
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return {"mean": mean, "low": mean, "high": mean}
    bounds = bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, batch=max(1, _AT_ONCE // len(values)), method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return {"mean": mean, "low": float(bounds.low), "high": float(bounds.high)}


def dependence(
    rows: Mapping[str, np.ndarray],
    columns: Mapping[str, np.ndarray],
    *,
    permutations: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> list[Figures]:
    """Distance correlation (unbiased) and linear CKA of every row with every column of a table of representations.

    All cells share the permutations. p is one-sided: the share of the permutations, with the true pairing as one of
    them, whose distance correlation is at least as high.

    Shapes:
        rows, columns: name -> [N, D] float, row i of all of them is of the same image; what is under the same name in
        both is the same.

    Returns:
        A cell each: row, column, dcor, null_mean, null_low and null_high (2.5 and 97.5 % of the permutations), p, cka.

    Source: Szekely and Rizzo (2014), as :mod:`mvmr.methods.parts.dependence`; Phipson and Smyth, "Permutation p-values
    should never be zero" (2010); Kornblith et al. (2019), as :func:`mvmr.evaluation.scores.linear_cka`.
    """
    tables = {name: _short(values) for name, values in {**columns, **rows}.items()}
    centred = {name: centred_distances(torch.from_numpy(values), "unbiased") for name, values in tables.items()}
    by_chance = _permute(
        [centred[name] for name in rows], [centred[name] for name in columns], permutations, seed, progress
    )
    cells = []
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            value, null = float(correlate(centred[row], centred[column], "unbiased")), by_chance[:, i, j]
            low, high = np.percentile(null, [2.5, 97.5])
            p = (1 + np.count_nonzero(null >= value)) / (1 + permutations)
            cells.append({
                "row": row, "column": column, "dcor": value, "null_mean": float(null.mean()), "null_low": float(low),
                "null_high": float(high), "p": float(p), "cka": linear_cka(tables[row], tables[column]),
            })  # fmt: skip
    return cells


def neighbours(
    teacher: np.ndarray,
    student: np.ndarray,
    untrained: np.ndarray,
    k: int,
    *,
    labels: np.ndarray | None = None,
    classes: Sequence[str] = (),
    seed: int = 0,
) -> Figures:
    """How many of an image's k nearest under the teacher are among its k nearest under the student, in percent.

    Args:
        untrained: features of an encoder that never learned anything, to compare with.
        labels: int64 [N], numbers into ``classes``; without them nothing is told by class.

    Returns:
        k, chance (a share, not percent), overlap, untrained, classes (the worst first) and worst: images of the worst
        classes, or the worst images where there are no labels, with the numbers of their neighbours.
    """
    overlap = 100 * neighbour_overlap(teacher, student, k)
    by_class = None if labels is None else _by_class(overlap, labels, classes, seed)
    lists = {"teacher": find_neighbours(teacher, k), "student": find_neighbours(student, k)}
    worst: list[tuple[int, str | None]] = [(int(i), None) for i in np.argsort(overlap, kind="stable")[:_WORST]]
    if by_class is not None and labels is not None:
        worst = []
        for name in (entry["name"] for entry in by_class):
            own = np.flatnonzero(labels == classes.index(name))
            lowest = own[np.argsort(overlap[own], kind="stable")[:_WORST_OF_A_CLASS]]
            worst += [(int(i), name) for i in lowest]
    return {
        "k": k,
        "chance": k / (len(teacher) - 1),
        "overlap": interval(overlap, seed=seed),
        "untrained": interval(100 * neighbour_overlap(teacher, untrained, k), seed=seed),
        "classes": by_class,
        "worst": [
            {"image": i, "class": name, "overlap": float(overlap[i])}
            | {side: nearest[i].tolist() for side, nearest in lists.items()}
            for i, name in worst[:_WORST]
        ],
    }


def predictions(
    labels: np.ndarray, classes: Sequence[str], student: np.ndarray, teacher: np.ndarray | None, *, seed: int = 0
) -> Figures:
    """Where the classes predicted from the student's features and from the teacher's differ.

    Shapes:
        labels, student, teacher: int64 [N], numbers into ``classes``: true, and predicted on the same images.

    Returns:
        agreement in percent, confusion (counts; row: true class, column: predicted) and classes, the worst first:
        percent right for both, their difference (student minus teacher) and its 95 % paired bootstrap interval. What
        takes a teacher is None without.
    """
    right = 100.0 * (student == labels)
    theirs = None if teacher is None else 100.0 * (teacher == labels)
    rows = []
    for number, name in enumerate(classes):
        own = labels == number
        if not own.any():
            continue
        row = {"name": name, "images": int(own.sum()), "student": float(right[own].mean())}
        if theirs is None:
            row |= dict.fromkeys(("teacher", "difference", "low", "high"))
        else:
            difference = interval(right[own] - theirs[own], seed=seed)
            row |= {"teacher": float(theirs[own].mean()), "difference": difference["mean"]}
            row |= {end: difference[end] for end in ("low", "high")}
        rows.append(row)
    numbers = np.arange(len(classes))
    return {
        "agreement": None if teacher is None else float(100 * (student == teacher).mean()),
        "confusion": {
            side: None if predicted is None else confusion_matrix(labels, predicted, labels=numbers).tolist()
            for side, predicted in (("student", student), ("teacher", teacher))
        },
        "classes": sorted(rows, key=lambda row: row["student"] if theirs is None else row["difference"]),
    }


def spectrum(features: np.ndarray) -> Figures:
    """How many directions features [N, D] use: effective_rank, dim and values.

    values: singular values of the centred features in units of the largest, descending, at most 512 of them; all 0
    for constant features.
    """
    rows = features.astype(np.float64) - features[0]  # constant features are exactly zero
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    relative = values / values[0] if values[0] > 0 else values
    return {
        "effective_rank": effective_rank(torch.tensor(features)),
        "dim": features.shape[1],
        "values": relative[:_VALUES].tolist(),
    }


def _by_class(values: np.ndarray, labels: np.ndarray, classes: Sequence[str], seed: int) -> list[Figures]:
    present = [(number, name) for number, name in enumerate(classes) if (labels == number).any()]
    rows = [
        {"name": name, "images": int((labels == number).sum())} | interval(values[labels == number], seed=seed)
        for number, name in present
    ]
    return sorted(rows, key=lambda row: row["mean"])


def _short(rows: np.ndarray) -> np.ndarray:
    """Rows as they are, or, of more columns than rows, their coordinates in the space they span: float64 [N, <= N].

    Distances and inner products of the centred rows stay the same. Scattering features of 1000 large images take
    gigabytes: they are read in pieces, once.
    """
    count, width = rows.shape
    if width <= count:
        return np.asarray(rows, np.float64)
    gram = np.zeros((count, count))
    for start in range(0, width, _COLUMNS):
        piece = rows[:, start : start + _COLUMNS].astype(np.float64)
        piece -= piece[0].copy()  # first, for the mean of equal numbers need not be that number
        piece -= piece.mean(0)
        gram += piece @ piece.T
    values, vectors = np.linalg.eigh(gram)
    return vectors * np.sqrt(values.clip(min=0))


def _permute(
    rows: Sequence[Tensor], columns: Sequence[Tensor], permutations: int, seed: int, progress: bool
) -> np.ndarray:
    """Distance correlations with the images of the columns permuted: [permutations, rows, columns].

    In float32, for most of the time goes into moving matrices; what is lost is far below the spread of the null.
    """
    generator = torch.Generator().manual_seed(seed)
    left = torch.stack([_unit(matrix).flatten() for matrix in rows])
    right = [_unit(matrix) for matrix in columns]
    null = np.empty((permutations, len(rows), len(columns)))
    with track("permutations", 0, permutations, unit="permutations", shown=progress) as advance:
        for number in range(permutations):
            order = torch.randperm(len(right[0]), generator=generator)
            for column, matrix in enumerate(right):
                null[number, :, column] = left @ matrix[order][:, order].flatten()
            advance(number + 1, "")
    return null


def _unit(centred: Tensor) -> Tensor:
    """Centred distances scaled so that a sum of products is a correlation; zero stays zero."""
    return (centred / (centred.norm() or 1.0)).float()
