"""Small networks on the features that only training needs: projectors, predictors, prototypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.errors import MvmrError


def build_projector(in_dim: int, sizes: Sequence[int], *, last_norm: bool = False) -> nn.Sequential:
    """Build the projector h -> z: linear, batch norm, ReLU for each size; the last layer is linear alone.

    No linear layer has a bias (batch norm would cancel it). No sizes: the identity, z = h.

    last_norm: whether the last layer, too, has a batch norm, without scale and shift of its own

    Shapes: features [B, in_dim] float32 -> projection [B, sizes[-1]] float32, not normalised.
    Raises: MvmrError for a size below 1.
    """
    if any(size < 1 for size in sizes):
        raise MvmrError(f"projector sizes {tuple(sizes)} hold a size below 1; give widths such as 8192,8192,8192")
    layers: list[nn.Module] = []
    width = in_dim
    for size in sizes[:-1]:
        layers += [nn.Linear(width, size, bias=False), nn.BatchNorm1d(size), nn.ReLU(inplace=True)]
        width = size
    if sizes:
        layers.append(nn.Linear(width, sizes[-1], bias=False))
        if last_norm:
            layers.append(nn.BatchNorm1d(sizes[-1], affine=False))
    return nn.Sequential(*layers)  # an empty Sequential is the identity and has no keys


def check_predictor(projector: Sequence[int], predictor: Sequence[int]) -> None:
    """Refuse widths of a predictor that can't tell what the projector gives.

    Raises: MvmrError, with both.
    """
    if not (projector and predictor) or predictor[-1] != projector[-1]:
        raise MvmrError(
            f"[method] projector = {list(projector)} and predictor = {list(predictor)}: the predictor tells "
            "projections, so the last widths of both must be there, and the same"
        )


def build_plain_head(in_dim: int, sizes: Sequence[int]) -> nn.Sequential:
    """Build h -> z without batch norm: linear layers with GELU between them (DINO's, Caron et al. 2021, appendix C).

    Shapes: features [B, in_dim] float32 -> [B, sizes[-1]] float32, not normalised.
    Raises: MvmrError for a size below 1.
    """
    if any(size < 1 for size in sizes):
        raise MvmrError(f"head sizes {tuple(sizes)} hold a size below 1; give widths such as 2048,2048,256")
    widths, layers = (in_dim, *sizes), []
    for number in range(len(sizes)):
        layers += [nn.Linear(widths[number], widths[number + 1]), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class Prototypes(nn.Module):
    """Cosines of rows with `count` learnt directions, their logits before a temperature."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, width), dim=1))

    def forward(self, z: Tensor, *, frozen: bool = False) -> Tensor:
        """[B, width] -> [B, count] in [-1, 1]; frozen: the directions get a gradient of 0."""
        weight = self.weight.detach() + 0 * self.weight if frozen else self.weight
        return F.normalize(z, dim=1) @ F.normalize(weight, dim=1).T
