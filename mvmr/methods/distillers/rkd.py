"""RKD: distances and angles between the images of a batch are those that the teacher sees; nothing is mapped.

    L = distance * mean huber(d_ij / mean d - d*_ij / mean d*) + angle * mean huber(cos_ijk - cos*_ijk)

with d the distances of features, d* those of embeddings, cos_ijk the cosine of the angle at image j between i and k.

Source: Park et al., "Relational knowledge distillation" (2019), equations 4 to 9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.distillers.distiller import DistillerConfig
from mvmr.methods.parts.relations import distances
from mvmr.methods.parts.standardising import Bank

_NEAR = 1e-3  # of the mean distance: between images nearer than that there is no direction, only rounding
_GROUP = 64  # images between which angles are taken: their number grows with the third power


@dataclass(frozen=True, kw_only=True)
class RkdConfig(DistillerConfig):
    """The paper's ratio of the weights."""

    name: Literal["rkd"] = "rkd"
    distance: float = 1.0  # weight of the distances [0 or more]
    angle: float = 2.0  # weight of the angles, in the paper's ratio [0 or more]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.distance >= 0 and self.angle >= 0 and self.distance + self.angle > 0):
            raise MvmrError(f"[method] distance = {self.distance}, angle = {self.angle}: 0 or more, not both 0")

    def loss(self, width: int, bank: Bank) -> nn.Module:
        return Rkd(self.distance, self.angle)


class Rkd(nn.Module):
    """0 for a scaled, turned or shifted copy; nothing in it is trained."""

    def __init__(self, distance: float, angle: float) -> None:
        super().__init__()
        self.distance, self.angle = distance, angle

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        loss = self.distance * F.smooth_l1_loss(_relative_distances(h), _relative_distances(target))
        if self.angle:
            groups = zip(h.split(_GROUP), target.split(_GROUP), strict=True)
            parts = [len(mine) / len(h) * F.smooth_l1_loss(_cosines(mine), _cosines(theirs)) for mine, theirs in groups]
            loss = loss + self.angle * torch.stack(parts).sum()
        return loss


def _relative_distances(x: Tensor) -> Tensor:
    d = distances(x)
    mean = d.sum() / (d > 0).sum().clamp(min=1)
    return d / torch.where(mean == 0, torch.ones_like(mean), mean)


def _cosines(x: Tensor) -> Tensor:
    """Of the angles at every image between all pairs of others, [B, D] -> [B, B, B]; 0 where two are the same."""
    differences = x[None, :] - x[:, None]
    lengths = torch.linalg.vector_norm(differences, dim=2, keepdim=True)
    same = lengths <= _NEAR * lengths.detach().mean()
    # filled before the division, for a gradient of 0 times infinity is none
    directions = (differences / lengths.masked_fill(same, 1)).masked_fill(same, 0)
    return directions @ directions.transpose(1, 2)
