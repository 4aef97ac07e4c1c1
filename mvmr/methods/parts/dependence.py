"""Distance correlation between two batches: the dependence that MV-MR maximises.

Source: Szekely, Rizzo and Bakirov, "Measuring and testing dependence by correlation of distances" (2007), definitions
2 to 4 (``biased``); Szekely and Rizzo, "Partial distance correlation with methods for dissimilarities" (2014),
section 3 (``unbiased``).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["biased", "unbiased"]

# A squared distance below this many rounding errors of its Gram matrix is noise, and is taken to be exactly zero.
_NOISE = 32.0


def distance_correlation(x: Tensor, y: Tensor, *, estimator: Estimator = "biased") -> Tensor:
    """Sample distance correlation of two paired batches, differentiable in both.

    ``biased`` is the V-statistic dCor of 2007, in [0, 1]; in high dimension it nears 1 even for independent batches.
    ``unbiased`` is the bias-corrected (U-centred) *squared* dCor of 2014, in [-1, 1]; its mean is 0 under independence.
    Both are 1 for a scaled, rotated or shifted copy, and are defined as 0 when either batch is constant. NaN or
    infinity in either batch gives NaN.

    Shapes:
        x: [B, ...], y: [B, ...]: any floating dtype, flattened to rows; half precision is computed in float32.
        returns: scalar, in the wider of the two computing dtypes.

    Raises:
        ValueError: the batches differ in length, or hold fewer rows than the estimator needs (2, unbiased 4).
    """
    if len(x) != len(y):
        raise ValueError(f"distance correlation pairs rows: got {len(x)} and {len(y)} of them")
    return correlate(centred_distances(x, estimator), centred_distances(y, estimator), estimator)


def centred_distances(x: Tensor, estimator: Estimator) -> Tensor:
    """The doubly centred (``biased``) or U-centred (``unbiased``) matrix of distances between the rows of ``x``.

    Shapes:
        x: [B, ...] -> [B, B], float32 (float64 for float64 input), in units of the batch's root mean square radius.
    """
    n = len(x)
    if n < (least := 2 if estimator == "biased" else 4):
        raise ValueError(f"the {estimator} distance correlation needs at least {least} rows, got {n}")
    d = _distances(x)
    rows = d.sum(1, keepdim=True)
    if estimator == "biased":
        centred = d - rows / n - rows.T / n + rows.sum() / n**2
    else:
        centred = d - rows / (n - 2) - rows.T / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
        centred = centred * ~torch.eye(n, dtype=torch.bool, device=d.device)
    # what is left of a batch without variance (one outlier, U-centred) is rounding: make it exactly zero
    constant = centred.detach().norm() <= _NOISE * torch.finfo(d.dtype).eps * d.detach().norm()
    return torch.where(constant, torch.zeros_like(centred), centred)


def correlate(a: Tensor, b: Tensor, estimator: Estimator) -> Tensor:
    """Distance correlation from two matrices of :func:`centred_distances`, [B, B] each -> scalar."""
    # Sums in place of means: the sample size cancels in the ratio, for either estimator.
    variance_a, variance_b = (a * a).sum(), (b * b).sum()
    one = torch.ones((), dtype=variance_a.dtype, device=a.device)
    scale = torch.where(variance_a == 0, one, variance_a).sqrt() * torch.where(variance_b == 0, one, variance_b).sqrt()
    squared = (a * b).sum() / scale
    if estimator == "unbiased":
        return squared
    zero = squared <= 0  # the V-statistic is never negative but by rounding; sqrt has no gradient at 0
    return torch.where(zero, torch.zeros_like(squared), torch.where(zero, one, squared).sqrt())


def permutation_null(a: Tensor, b: Tensor, estimator: Estimator, generator: torch.Generator) -> Tensor:
    """The same statistic with the pairing of rows destroyed by one random permutation: what independence looks like.

    ``generator`` lives on the CPU, so that the permutation is the same on every device.
    """
    order = torch.randperm(len(b), generator=generator).to(b.device)
    return correlate(a, b[order][:, order], estimator)


def effective_rank(x: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of the centred batch, from 1 to min(B, D).

    Source: Roy and Vetterli, "The effective rank" (2007). A batch that fills one direction only has 1, whatever its
    standard deviations: this is the collapse that a hinge on the variance can't see. 0 for a constant batch.
    """
    x = x.detach().flatten(1).to(torch.float32)
    values = torch.linalg.svdvals(x - x.mean(0))
    if values.sum() == 0:
        return 0.0
    p = values / values.sum()
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def _distances(x: Tensor) -> Tensor:
    x = x.flatten(1)
    x = x if x.dtype == torch.float64 else x.float()
    # Distances know no origin. The first row goes first, so that a constant batch becomes exactly zero; dCor knows no
    # scale either, so both shifts and the radius are constants to the gradient.
    x = x - x[:1].detach()
    x = x - x.detach().mean(0)
    x = x / _unless_zero(x.detach().abs().amax())  # squares of what is left neither overflow nor vanish
    x = x / _unless_zero(x.detach().square().sum(1).mean().sqrt())
    gram = x @ x.T
    norms = gram.diagonal()
    squared = norms[:, None] + norms[None, :] - 2 * gram
    noise = _NOISE * torch.finfo(x.dtype).eps * (norms[:, None] + norms[None, :])
    same = squared <= noise.detach()  # compared so that NaN, which is neither, is passed on
    return torch.where(same, torch.zeros_like(squared), torch.where(same, torch.ones_like(squared), squared).sqrt())


def _unless_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
