"""Statistics of a teacher's rows over all images, and embeddings in their units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Rows = npt.NDArray[np.floating[Any]]
How = Literal["dimension", "scale", "phi-s", "raw"]
_BLOCK = 4096  # rows that are read at once
_TINY = 1e-6  # of the largest deviation: a dimension that varies less is rounding, and becomes 0


class Standard(nn.Module):
    """Embeddings in the units of all of them, [B, K] -> [B, K].

    dimension: mean 0 and deviation 1 in every dimension
    scale: mean 0, and one number for all dimensions, so that their mean variance is 1: distances keep their ratios
    phi-s: as ``scale``, and turned so that every dimension has variance 1; Ranzinger et al., "PHI-S: distribution
        balancing for label-free multi-teacher distillation" (2024), whose Hadamard matrix, which not every width has,
        is a product of plane rotations here
    raw: as they are
    """

    mean: Tensor  # [K]
    factor: Tensor  # [K] or [1]: 1 over a deviation, 0 where there is none
    rotation: Tensor | None  # [K, K]

    def __init__(self, rows: Rows, how: How) -> None:
        super().__init__()
        mean, std = statistics(rows)
        one = torch.ones(1)
        rotation = None
        if how == "raw":
            mean, factor = torch.zeros_like(mean), one
        elif how == "dimension":
            factor = torch.where(std > _TINY * std.max(), 1 / std, 0)
        else:
            spread = std.double().square().mean().sqrt().float()
            factor = one * torch.where(spread > 0, 1 / spread, 0)
            rotation = torch.from_numpy(_balance(_covariance(rows))).float() if how == "phi-s" else None
        self.register_buffer("mean", mean)
        self.register_buffer("factor", factor)
        self.register_buffer("rotation", rotation)

    def forward(self, x: Tensor) -> Tensor:
        centred = (x - self.mean) * self.factor
        return centred if self.rotation is None else centred @ self.rotation


@dataclass(frozen=True)
class Bank:
    """The embeddings of all images by a teacher, in its units.

    rows: [N, K] as the teacher gave them
    """

    rows: Rows
    standard: Standard

    @property
    def width(self) -> int:
        return int(self.rows.shape[1])

    def sample(self, most: int) -> Tensor:
        """All of them, or `most` of them evenly spaced, [M, K] float32."""
        count = len(self.rows)
        chosen = np.arange(count) if count <= most else np.linspace(0, count - 1, most).round().astype(int)
        sampled: Tensor = self.standard(torch.from_numpy(np.asarray(self.rows[chosen], np.float32)))
        return sampled


def statistics(rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all rows, [N, K] -> [K] float32 each."""
    mean = rows.mean(0, dtype=np.float64)
    # not numpy's own, which makes a copy of all rows
    variance = sum(np.square(block - mean).sum(0) for block in _blocks(rows)) / len(rows)
    return torch.from_numpy(mean).float(), torch.from_numpy(np.sqrt(variance)).float()


def _covariance(rows: Rows) -> npt.NDArray[np.float64]:
    mean, total = rows.mean(0, dtype=np.float64), np.zeros((rows.shape[1], rows.shape[1]))
    for block in _blocks(rows):
        centred = block - mean
        total += centred.T @ centred
    return total / len(rows)


def _blocks(rows: Rows) -> Iterator[npt.NDArray[np.float64]]:
    return (rows[start : start + _BLOCK].astype(np.float64) for start in range(0, len(rows), _BLOCK))


def _balance(covariance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """An orthogonal matrix R for which every diagonal element of R' C R is the mean of them all.

    From the principal axes on, where there are no covariances, a plane rotation of a dimension above the mean with one
    below it brings one of the two to the mean, and leaves the other without covariance to those that are still to come.
    """
    variances, rotation = np.linalg.eigh(covariance)
    mean = variances.mean()
    low, high = 0, len(variances) - 1
    order = list(range(len(variances)))  # ascending, as eigh gives them
    while low < high:
        i, j = order[low], order[high]  # variances[i] <= mean <= variances[j]
        spread = variances[j] - variances[i]
        if spread <= np.finfo(float).eps * mean:
            break
        sine = np.sqrt(np.clip((mean - variances[i]) / spread, 0, 1))
        cosine = np.sqrt(1 - sine**2)
        a, b = rotation[:, i].copy(), rotation[:, j].copy()
        rotation[:, i], rotation[:, j] = cosine * a + sine * b, cosine * b - sine * a  # i gets the mean
        variances[j] = variances[i] + variances[j] - mean
        variances[i] = mean
        low += 1
        if low < high and variances[j] < mean:  # what is left of j is below the mean: it goes on as a low one
            order[low - 1] = j
            low, high = low - 1, high - 1
    return rotation
