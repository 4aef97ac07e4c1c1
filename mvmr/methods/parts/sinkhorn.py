"""Assignments of rows that use all classes alike, by the algorithm of Sinkhorn and Knopp.

Source: Cuturi, "Sinkhorn distances" (2013), as in SwAV (Caron et al. 2020, section 3.1) and Self-Label (Asano et al.
2020, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 1000  # iterations
_TOLERANCE = 1e-3  # of what one of them still changes, relative
_LEAST = 1e-300


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Of all assignments with equal column sums, the one of the highest score plus `epsilon` times its entropy.

    Columns and rows are made to sum up in turn, in logarithms; rows last, so that columns are equal but for what the
    next iteration would change.

    Shapes: [B, K] float32, rows of all ranks -> [B, K]; each row sums up to 1, each column to about B / K.
    """
    log = scores / epsilon
    for _ in range(iterations):
        log = log - log.logsumexp(dim=0, keepdim=True)
        log = log - log.logsumexp(dim=1, keepdim=True)
    return log.exp()


@torch.no_grad()
def equal_partition(log_probabilities: Tensor, sharpness: float) -> Tensor:
    """Labels of rows, all used about equally often, that are likely together: of Q = diag(a) p^sharpness diag(b) with
    equal row and column sums, the largest column of each row.

    Q is never formed: an iteration is two products of the matrix with a vector, in double precision.

    Shapes: [N, K] float32 -> int64 [N].
    """
    count, classes = log_probabilities.shape
    log = log_probabilities.double()
    power = ((log - log.amax(1, keepdim=True)) * sharpness).exp()
    columns = torch.full((classes,), 1 / classes, dtype=power.dtype, device=power.device)
    for _ in range(_MOST):
        rows = 1 / (count * (power @ columns).clamp(min=_LEAST))
        before, columns = columns, 1 / (classes * (rows @ power).clamp(min=_LEAST))
        if (columns / before - 1).abs().max() < _TOLERANCE:
            break
    return (power * columns).argmax(1)
