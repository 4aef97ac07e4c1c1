"""Metrics of logits, of per-class scores and of two feature spaces; numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from mvmr.errors import MvmrError, unknown

Definition = Literal["area", "voc07"]


def top_k(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of the rows whose label is among the k highest logits, in percent, [0, 100].

    Ties do not flatter: a label counts only where fewer than k other classes have a logit at least as high, so that
    a classifier with constant logits scores 0 for k < C. k > C is taken as C, which scores 100.

    Shapes:
        logits: [N, C] floating, labels: [N] integers in [0, C).

    Raises:
        MvmrError: there are no rows, or a logit is NaN.
        ValueError: the shapes do not fit, a label is not a column, or k < 1.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"top-k takes logits [N, C] and labels [N]: got {logits.shape} and {labels.shape}")
    if k < 1:
        raise ValueError(f"top-k needs k of at least 1, got {k}")
    if len(logits) == 0:
        raise MvmrError("0 labelled images: top-k accuracy needs at least one")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} do not index {logits.shape[1]} columns")
    _refuse_nan(logits, "logits")
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    rivals = (logits >= own).sum(1) - 1  # the label itself is as high as itself
    return float(100 * (rivals < k).mean())


def average_precision(scores: np.ndarray, present: np.ndarray, *, definition: Definition) -> float:
    """Average precision of one class, in [0, 1].

    ``area`` is the area under the stepwise precision-recall curve with one threshold per distinct score, as
    scikit-learn's ``average_precision_score``. ``voc07`` is the mean, over the recalls 0, 0.1, ..., 1, of the highest
    precision at a recall at least that high. Images of equal score are ranked absent first; their last rank then has
    the highest precision among them, so that ranks one by one and one threshold per distinct score come to the same.
    (The VOC devkit leaves equal scores in the order of its image list.) Recalls are compared as exact fractions: 3
    of 10 found does reach recall 0.3, which the devkit's 3 * 0.1 in floating point misses by a rounding error.

    Source: Everingham et al., "The PASCAL visual object classes (VOC) challenge" (2010), on evaluation (``voc07``).

    Shapes:
        scores: [N] floating, higher for present.
        present: [N] integers in VOC's code: 1 present, -1 absent, 0 difficult. Difficult images are left out, as in
            VOC's classification task: neither hits nor false alarms.

    Raises:
        MvmrError: no image has the class; or none lacks it while some are difficult, as in a 0/1 coding; or a score
            is NaN; or the definition is unknown.
        ValueError: the shapes differ, or ``present`` has other values or is boolean.
    """
    if definition not in get_args(Definition):
        raise unknown("definition of average precision", definition, get_args(Definition))
    if scores.ndim != 1 or scores.shape != present.shape:
        raise ValueError(f"average precision takes scores [N] and present [N]: got {scores.shape} and {present.shape}")
    _refuse_nan(scores, "scores")
    _check_code(present)
    hits, seen = _thresholds(scores[present != 0], present[present != 0] == 1)
    precision, positives = hits / seen, hits[-1]
    if definition == "area":
        return float((np.diff(hits, prepend=0) * precision).sum() / positives)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
    return float(best[np.searchsorted(10 * hits, np.arange(11) * positives)].mean())


def mean_average_precision(
    scores: np.ndarray, present: np.ndarray, classes: Sequence[str], *, definition: Definition
) -> tuple[float, dict[str, float]]:
    """Mean over the classes of :func:`average_precision`, and each class by name, all in percent, [0, 100].

    Every class weighs the same however many images have it: this is the macro average, not the precision of all pairs
    of image and class flattened into one ranking.

    Shapes:
        scores: [N, C] floating, present: [N, C] integers 1, -1 or 0, classes: C different names.

    Raises:
        MvmrError: as :func:`average_precision`, with the name of the class.
        ValueError: as :func:`average_precision`; or there are no classes, or their names repeat or are not C.
    """
    if scores.ndim != 2 or scores.shape != present.shape or scores.shape[1] != len(classes):
        raise ValueError(
            f"mean average precision takes scores and present [N, C] and C names: "
            f"got {scores.shape}, {present.shape} and {len(classes)}"
        )
    if len(set(classes)) != len(classes) or not classes:
        raise ValueError(f"mean average precision needs classes of different names, got {list(classes)}")
    by_class = {}
    for column, name in enumerate(classes):
        try:
            by_class[name] = 100 * average_precision(scores[:, column], present[:, column], definition=definition)
        except MvmrError as error:
            raise MvmrError(f"class {name!r}: {error}") from error
    return float(np.mean(list(by_class.values()))), by_class


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of two paired batches, in [0, 1], computed in float64.

    1 for a scaled, rotated or shifted copy; 0 where either batch is constant, and for uncorrelated features in the
    limit of many rows. With N no larger than D even independent batches come near 1: it says something for N >> D.
    The largest matrix built, but for the batches, has min(N * N, D1 * D2) entries, or min(N, D)^2 of either.

    Source: Kornblith et al., "Similarity of neural network representations revisited" (2019), section 3, linear CKA
    in feature space: ||Y'X||^2 / (||X'X|| ||Y'Y||) of the centred batches, in Frobenius norms.

    Shapes:
        x: [N, D1], y: [N, D2].

    Raises:
        MvmrError: NaN or infinity in either batch.
        ValueError: the batches differ in length, have no rows, or are not matrices.
    """
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"linear CKA takes two matrices of features: got {x.shape} and {y.shape}")
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"linear CKA pairs rows: got {len(x)} and {len(y)} of them")
    a, b = _centre(x), _centre(y)
    if not a.any() or not b.any():
        return 0.0
    value = _alignment(a, b) / np.sqrt(_alignment(a, a) * _alignment(b, b))
    return float(np.clip(value, 0, 1))  # outside but for rounding never


def _refuse_nan(values: np.ndarray, what: str) -> None:
    if np.isnan(values).any():
        count = np.isnan(values).sum()
        raise MvmrError(f"{count} of {values.size} {what} are NaN: look for NaN in the features or the weights")


def _check_code(present: np.ndarray) -> None:
    if present.dtype == bool or not np.isin(present, (1, -1, 0)).all():
        raise ValueError(
            f"present holds 1 (present), -1 (absent) and 0 (difficult): got {present.dtype} {np.unique(present)[:5]}"
        )
    absent, difficult, positive = (np.count_nonzero(present == code) for code in (-1, 0, 1))
    if not positive:
        raise MvmrError(
            f"none of {len(present)} images has this class ({absent} without, {difficult} difficult): there is no "
            "average precision without one; leave the class out, or take images that have it"
        )
    if difficult and not absent:
        raise MvmrError(
            f"all but the {difficult} images coded 0 have this class: 0 means difficult and is left out, absent is -1"
        )


def _thresholds(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many positives, and how many in all, score at least each distinct score, from the highest down: [T] each."""
    order = np.argsort(scores)[::-1]
    descending = scores[order]
    last = np.append(np.flatnonzero(descending[1:] != descending[:-1]), len(descending) - 1)  # of those of equal score
    return np.cumsum(positive[order])[last], last + 1


def _centre(x: np.ndarray) -> np.ndarray:
    """Columns without their mean, in units of the largest entry: [N, D] float64. A constant batch is exactly zero."""
    if not np.isfinite(x).all():
        raise MvmrError(f"NaN or infinity in {(~np.isfinite(x)).any(1).sum()} of {len(x)} rows of features")
    rows = x.astype(np.float64)
    rows = rows - rows[0]  # first, for the mean of equal numbers need not be that number
    rows = rows - rows.mean(0)
    largest = np.abs(rows).max(initial=0)
    return rows / largest if largest else rows  # fourth powers of what is left neither overflow nor vanish


def _alignment(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frobenius norm of a'b, through whichever is smaller: a'b [D1, D2] or the Gram matrices [N, N]."""
    if a.shape[1] * b.shape[1] <= len(a) ** 2:
        return float(np.square(a.T @ b).sum())
    gram = a @ a.T
    return float((gram * (gram if b is a else b @ b.T)).sum())
