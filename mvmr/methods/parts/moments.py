"""Penalties on the moments of a batch of projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge(z: Tensor, gamma: float, eps: float) -> Tensor:
    """How far standard deviations stay below `gamma`, v(z) = mean_j max(0, gamma - sqrt(Var(z_j) + eps)).

    Source: VICReg, equation 1 (Bardes et al. 2022). Shapes: [B, D] float32 -> scalar.
    """
    return F.relu(gamma - torch.sqrt(z.var(0) + eps)).mean()


def covariance_penalty(z: Tensor) -> Tensor:
    """Squared covariances of different dimensions, c(z) = sum_{i != j} Cov(z)_ij^2 / D.

    Source: VICReg, equation 4. Shapes: [B, D] float32 -> scalar.
    """
    n, width = z.shape
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (n - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / width
