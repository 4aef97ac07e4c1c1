"""Small networks on the features that only training needs: projectors, predictors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

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
