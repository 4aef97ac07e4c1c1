"""Asymmetric relations: what the teacher sees as near must not be farther, and what it sees as far not nearer.

    L = mean over pairs of  max(0, d_ij - d*_ij)^2  where d*_ij is at most the median of all,
                            max(0, d*_ij - d_ij)^2  elsewhere

with d the distances of mapped features W h + b, d* those of embeddings, both over the mean of d*.

Source: Chaybouti et al., "SigLino: efficient multi-teacher distillation for agglomerative vision foundation models"
(2026), asymmetric relation-knowledge distillation, which stands beside a loss of its own for every image there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.methods.distillers.distiller import DistillerConfig
from mvmr.methods.parts.relations import distances, off_diagonal
from mvmr.methods.parts.standardising import Bank


@dataclass(frozen=True, kw_only=True)
class RelationalConfig(DistillerConfig):
    """No settings beside those of every distiller."""

    name: Literal["relational"] = "relational"

    def loss(self, width: int, bank: Bank) -> nn.Module:
        return Relational(width, bank.width)


class Relational(nn.Module):
    """0 where all that is near is nearer still, and all that is far farther."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, teacher_width)

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        theirs = off_diagonal(distances(target))
        mean = theirs.mean()
        scale = torch.where(mean == 0, torch.ones_like(mean), mean)
        mine, theirs = off_diagonal(distances(self.linear(h))) / scale, theirs / scale
        excess = torch.where(theirs <= theirs.median(), mine - theirs, theirs - mine)
        return F.relu(excess).square().mean()
