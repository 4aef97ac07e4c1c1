"""What the rows of a batch are to each other: distances, cosines, Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def distances(x: Tensor) -> Tensor:
    """Euclidean distances of all pairs, [B, D] -> [B, B]; equal rows have no gradient."""
    # not by the Gram matrix: its rounding would make small distances noise
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def off_diagonal(matrix: Tensor) -> Tensor:
    """[B, B] -> [B, B - 1], without the diagonal."""
    n = len(matrix)
    return matrix.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def centre(x: Tensor) -> Tensor:
    """Rows less their mean, [B, D]."""
    return x - x.mean(0)
