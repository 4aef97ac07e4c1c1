"""Linear classifiers on frozen features."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from mvmr.errors import MvmrError
from mvmr.evaluation.scores import average_precision
from mvmr.progress import track

_STRENGTHS = (1.0, 10.0, 100.0)  # of C, the inverse regularisation, for features of a mean square norm of 1
_ITERATIONS = 200  # a fit that has not converged by then is as good a classifier, and is taken as it is
_FEWEST = 5  # images of a class of which a fifth can be held out
_LARGE = 5e7  # values in a feature matrix; above, L-BFGS takes minutes and several copies of it
_CHUNK = 8192  # rows
_SMALL = 1e9  # multiply-adds in a pass over the rows; below, threads wait for each other longer than they work
_NEVER = -1e9


@dataclass(frozen=True)
class LinearHead:
    """logits = features @ weight.T + bias.

    weight: [C, D] float32, bias: [C] float32, for raw features: the probe's standardisation is folded in.
    """

    weight: np.ndarray
    bias: np.ndarray
    chosen: Mapping[str, float]  # what was chosen on a part of the training split: C of logistic regression, or lr

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[N, D] -> [N, C] float32."""
        return features @ self.weight.T + self.bias

    def predict(self, features: np.ndarray) -> np.ndarray:
        """[N, D] -> class indices [N] int64."""
        return self.logits(features).argmax(1)


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    balanced: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> LinearHead:
    """Fit a linear classifier on frozen features of the training split.

    Small sets: logistic regression by L-BFGS. Large ones (above 5e7 values): :func:`adam_probe`. The regularisation,
    or the learning rate, is chosen on a fifth of them, held out by class (of a class with fewer than 5 images, none
    is), then the probe is fitted on all. Where nothing can be held out it is the most cautious.

    Shapes:
        features: [N, D] float32, labels: [N] integers below ``classes``.

    Args:
        balanced: whether every class weighs the same, in the fit and in that choice, however many images it has.

    Raises:
        MvmrError: all labels are the same.
    """
    if features.size > _LARGE:
        return adam_probe(features, labels, classes, LARGE, balanced=balanced, seed=seed, progress=progress)
    seen, weights = _find_classes(labels, classes), class_weights(labels, classes) if balanced else None
    scaler = StandardScaler().fit(features)
    space = _RowSpace((scaler.transform(features) / np.sqrt(features.shape[1])).astype(np.float32))

    def right(strength: float, fit: np.ndarray, validation: np.ndarray) -> float:
        solver = _solve(space.rows[fit], labels[fit], strength, weights)
        return _right(solver.predict(space.rows[validation]), labels[validation], weights)

    strength = _choose(_STRENGTHS, right, hold_out(labels, seed))
    solver = _solve(space.rows, labels, strength, weights)
    coefficients, intercept = space.back(solver.coef_), solver.intercept_
    if len(solver.classes_) == 2:  # scikit-learn keeps one row for two classes
        coefficients, intercept = np.vstack([-coefficients, coefficients]) / 2, np.hstack([-intercept, intercept]) / 2
    weight, bias = np.zeros((classes, features.shape[1])), np.full(classes, _NEVER)  # of a class that was never seen
    weight[seen] = coefficients / (scaler.scale_ * np.sqrt(features.shape[1]))
    bias[seen] = intercept - weight[seen] @ scaler.mean_
    return LinearHead(weight.astype(np.float32), bias.astype(np.float32), {"C": strength})


def one_vs_all(features: np.ndarray, present: np.ndarray, *, seed: int = 0) -> LinearHead:
    """Fit one logistic regression to a class, for images of several classes each.

    The regularisation, the same for all classes, is chosen by mean average precision on a fifth of the rows.

    Shapes:
        features: [N, D] float32; present: [N, C] integers, 1 present, -1 absent, 0 left out of that class's fit.

    Raises:
        MvmrError: a class is present nowhere, or everywhere.
    """
    _tell_apart(present)
    scaler = StandardScaler().fit(features)
    space = _RowSpace((scaler.transform(features) / np.sqrt(features.shape[1])).astype(np.float32))

    def fit_class(column: np.ndarray, rows: np.ndarray, strength: float) -> LogisticRegression:
        fit_rows = rows[column[rows] != 0]
        return _solve(space.rows[fit_rows], (column[fit_rows] > 0).astype(np.int64), strength)

    def precision(strength: float, fit: np.ndarray, validation: np.ndarray) -> float:
        precisions = []
        for column in present.T:
            if all(len(np.unique(column[part][column[part] != 0])) == 2 for part in (fit, validation)):
                logits = fit_class(column, fit, strength).decision_function(space.rows[validation])
                precisions.append(average_precision(logits, column[validation], definition="area"))
        return float(np.mean(precisions)) if precisions else 0.0

    rows = np.arange(len(features))
    parts = train_test_split(rows, test_size=0.2, random_state=seed) if len(rows) >= _FEWEST else None
    strength = _choose(_STRENGTHS, precision, parts)
    solvers = [fit_class(column, rows, strength) for column in present.T]
    coefficients = space.back(np.vstack([solver.coef_ for solver in solvers]))
    weight = coefficients / (scaler.scale_ * np.sqrt(features.shape[1]))
    bias = np.hstack([solver.intercept_ for solver in solvers]) - weight @ scaler.mean_
    return LinearHead(weight.astype(np.float32), bias.astype(np.float32), {"C": strength})


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """How :func:`adam_probe` trains: Adam on standardised features, the learning rate falling by a cosine to 0."""

    epochs: int
    batch_size: int
    lrs: tuple[float, ...]  # one is chosen; the first is the most cautious
    weight_decay: float = 0.0


LARGE = AdamConfig(epochs=20, batch_size=1024, lrs=(3e-4, 1e-3, 3e-3))
PAPER = AdamConfig(epochs=100, batch_size=256, lrs=(1e-3,))
PAPER_VOC = AdamConfig(epochs=1000, batch_size=32, lrs=(1e-4,), weight_decay=1e-6)


def adam_probe(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    config: AdamConfig,
    *,
    balanced: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> LinearHead:
    """Fit softmax regression by mini-batches: features may lie in a memory-mapped file, and are never copied whole.

    Of several learning rates one is chosen as in :func:`linear_probe`; all are tried in the same passes.

    Shapes:
        features: [N, D] float32, labels: [N] integers below ``classes``.

    Raises:
        MvmrError: all labels are the same.
    """
    seen, weights = _find_classes(labels, classes), class_weights(labels, classes) if balanced else None
    loss = partial(F.cross_entropy, weight=None if weights is None else torch.from_numpy(weights))
    mean, std = _statistics(features)
    lrs, parts = config.lrs, hold_out(labels, seed)

    def fit_heads(rows: np.ndarray, lrs: tuple[float, ...]) -> list[LinearHead]:
        task = replace(config, lrs=lrs)
        return _train_heads(features, labels, classes, loss, rows, task, (mean, std), seed, progress)

    if len(lrs) > 1 and parts is not None:
        fit, validation = parts
        right = [
            _right(head.predict(features[validation]), labels[validation], weights) for head in fit_heads(fit, lrs)
        ]
        lrs = (lrs[int(np.argmax(right))],)
    (head,) = fit_heads(np.arange(len(features)), lrs[:1])
    head.bias[np.setdiff1d(np.arange(classes), seen)] = _NEVER
    return head


def adam_one_vs_all(
    features: np.ndarray, present: np.ndarray, config: AdamConfig, *, seed: int = 0, progress: bool = False
) -> LinearHead:
    """Fit one logistic regression to a class by mini-batches, as :func:`one_vs_all`; the one learning rate is given.

    Shapes:
        features: [N, D] float32; present: [N, C] integers, 1 present, -1 absent, 0 left out of that class's fit.

    Raises:
        MvmrError: a class is present nowhere, or everywhere.
    """
    _tell_apart(present)
    rows, classes = np.arange(len(features)), present.shape[1]
    statistics = _statistics(features)
    (head,) = _train_heads(features, present, classes, _binary_loss, rows, config, statistics, seed, progress)
    return head


def _binary_loss(logits: Tensor, present: Tensor) -> Tensor:
    mask = present != 0
    losses = F.binary_cross_entropy_with_logits(logits, (present > 0).float(), reduction="none")
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def _train_heads(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    rows: np.ndarray,
    config: AdamConfig,
    statistics: tuple[np.ndarray, np.ndarray],
    seed: int,
    progress: bool,
) -> list[LinearHead]:
    """A head for each learning rate, trained side by side."""
    mean, std = statistics
    shift, scale = torch.from_numpy(mean), torch.from_numpy(1 / std)
    heads = [torch.zeros(classes, features.shape[1] + 1, requires_grad=True) for _ in config.lrs]
    groups = [{"params": [head], "lr": lr} for head, lr in zip(heads, config.lrs, strict=True)]
    optimizer = torch.optim.Adam(groups, weight_decay=config.weight_decay)
    random = np.random.default_rng(seed)
    steps = config.epochs * math.ceil(len(rows) / config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    label = "linear probe" if len(heads) == 1 else f"linear probe, {len(heads)} learning rates"
    with track(label, 0, config.epochs, unit="rows", per_step=len(rows), shown=progress) as advance:
        for epoch in range(config.epochs):
            order = random.permutation(rows)
            for start in range(0, len(order), config.batch_size):
                batch = np.sort(order[start : start + config.batch_size])  # in the order in which they lie on the disk
                x = (torch.from_numpy(features[batch]) - shift) * scale
                y = torch.from_numpy(labels[batch])
                loss = torch.stack([loss_of(F.linear(x, w[:, :-1], w[:, -1]), y) for w in heads]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            advance(epoch + 1, "")
    results = []
    for head, lr in zip(heads, config.lrs, strict=True):
        weight = head.detach()[:, :-1].numpy() / std
        results.append(LinearHead(weight, head.detach()[:, -1].numpy() - weight @ mean, {"lr": lr}))
    return results


def _statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (1 where there is none) of each column, float32 [D], in a pass over the rows."""
    scaler = StandardScaler()
    for start in range(0, len(features), _CHUNK):
        scaler.partial_fit(features[start : start + _CHUNK])
    return scaler.mean_.astype(np.float32), scaler.scale_.astype(np.float32)


def _find_classes(labels: np.ndarray, classes: int) -> np.ndarray:
    seen = np.flatnonzero(np.bincount(labels, minlength=classes))
    if len(seen) < 2:
        raise MvmrError("all training images are of one class: a linear probe needs images of two or more")
    return seen


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Weights under which classes with images weigh the same, float32 [C]: N / (such classes · images of the class)."""
    counts = np.bincount(labels, minlength=classes)
    return (len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))).astype(np.float32)


def _right(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> float:
    """How many are right, or what these weigh."""
    right = labels[predicted == labels]
    return float(len(right) if weights is None else weights[right].sum())


def _tell_apart(present: np.ndarray) -> None:
    if lacking := [c for c in range(present.shape[1]) if len(np.unique(present[:, c][present[:, c] != 0])) < 2]:
        raise MvmrError(f"class number {lacking[0]} is in none or in all of the training images: nothing to tell apart")


def hold_out(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(rows to fit on, rows to choose by): a fifth of each class with 5 images or more; None where there is none."""
    counts = np.bincount(labels)[labels]
    splittable = np.flatnonzero(counts >= _FEWEST)
    if len(splittable) == 0:
        return None
    fit, validation = train_test_split(splittable, test_size=0.2, random_state=seed, stratify=labels[splittable])
    return np.concatenate([fit, np.flatnonzero(counts < _FEWEST)]), validation


def _choose(
    candidates: tuple[float, ...],
    merit: Callable[[float, np.ndarray, np.ndarray], float],
    parts: tuple[np.ndarray, np.ndarray] | None,
) -> float:
    """The best candidate, of equals the first; without rows to choose by, the first."""
    if parts is None:
        return candidates[0]
    merits = {candidate: merit(candidate, *parts) for candidate in candidates}
    return max(candidates, key=lambda candidate: merits[candidate])


def _solve(x: np.ndarray, labels: np.ndarray, strength: float, weights: np.ndarray | None = None) -> LogisticRegression:
    solver = LogisticRegression(C=strength, max_iter=_ITERATIONS)
    threads = 1 if x.size * (labels.max() + 1) < _SMALL else None
    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return solver.fit(x, labels, None if weights is None else weights[labels])


class _RowSpace:
    """Coordinates of rows in the space they span: with more columns than rows an exact rotation, and far less work.

    The solution of a regularised linear classifier lies in that space.

    rows: [N, min(N, D)] float32.
    """

    def __init__(self, x: np.ndarray):
        self.basis: np.ndarray | None = None  # [D, N]
        self.rows = x
        if x.shape[1] > x.shape[0] and x.any():  # a collapsed encoder's features span nothing
            values, vectors = np.linalg.eigh((x @ x.T).astype(np.float64))
            mask = values > values[-1] * 1e-6
            self.rows = (vectors[:, mask] * np.sqrt(values[mask])).astype(np.float32)
            self.basis = x.T @ (vectors[:, mask] / np.sqrt(values[mask])).astype(np.float32)

    def back(self, coefficients: np.ndarray) -> np.ndarray:
        """[C, K] on ``rows`` -> [C, D] on the rows as they were given."""
        return coefficients if self.basis is None else coefficients @ self.basis.T
