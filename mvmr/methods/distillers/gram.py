"""Gram: the cosines between the images of a batch are those that the teacher sees; nothing is mapped.

    L = mean over pairs of (cos(h_i, h_j) - cos(t_i, t_j))^2,   both batches centred

Source: the Gram matrix loss of "Knowledge distillation through geometry-aware representational alignment"
(arXiv 2509.25253, 2025), on rows of norm 1 as in Tung and Mori, "Similarity-preserving knowledge distillation" (2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.methods.distillers.distiller import DistillerConfig
from mvmr.methods.parts.relations import centre, off_diagonal
from mvmr.methods.parts.standardising import Bank


@dataclass(frozen=True, kw_only=True)
class GramConfig(DistillerConfig):
    """No settings beside those of every distiller."""

    name: Literal["gram"] = "gram"

    def loss(self, width: int, bank: Bank) -> nn.Module:
        return Gram()


class Gram(nn.Module):
    """0 for a scaled, turned or shifted copy; nothing in it is trained."""

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(_cosines(h), _cosines(target))


def _cosines(x: Tensor) -> Tensor:
    unit = F.normalize(centre(x), dim=1)
    return off_diagonal(unit @ unit.T)
