"""dCor: the features depend on the teacher's embedding in the sense of distance correlation; nothing is mapped.

    L = 1 - dCor(h, t)

Source: Kinakh, Drozdova, Voloshynovskiy, "MV-MR: multi-views and multi-representations for self-supervised learning and
knowledge distillation" (Entropy 2024), equation 8, in the space of the features and without its other terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mvmr.methods.distillers.distiller import DistillerConfig
from mvmr.methods.parts.dependence import Estimator, distance_correlation
from mvmr.methods.parts.standardising import Bank


@dataclass(frozen=True, kw_only=True)
class DcorConfig(DistillerConfig):
    """The estimator of distance correlation, see `mvmr.methods.parts.dependence`."""

    name: Literal["dcor"] = "dcor"
    estimator: Estimator = "unbiased"  # of dCor: biased as in the paper, or unbiased, of its square

    def loss(self, width: int, bank: Bank) -> nn.Module:
        return Dcor(self.estimator)


class Dcor(nn.Module):
    """0 for a scaled, turned or shifted copy; nothing in it is trained."""

    def __init__(self, estimator: Estimator) -> None:
        super().__init__()
        self.estimator = estimator

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        return 1 - distance_correlation(h, target, estimator=self.estimator)
