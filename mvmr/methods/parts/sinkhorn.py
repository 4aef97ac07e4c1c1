"""Soft assignments of a batch that use all classes alike, by the algorithm of Sinkhorn and Knopp.

Source: Cuturi, "Sinkhorn distances" (2013), as in SwAV (Caron et al. 2020, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor


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
