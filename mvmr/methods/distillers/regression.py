"""Regression: a linear map of the features gives the teacher's embedding, whatever both widths are.

    L = mean (W h + b - t)^2,   t the embedding with mean 0 and deviation 1 in every dimension

Source: Romero et al., "FitNets: hints for thin deep nets" (2015), equation 3, on the last layer, with a linear map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.methods.distillers.distiller import DistillerConfig
from mvmr.methods.parts.standardising import Bank, How


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(DistillerConfig):
    """No settings beside those of every distiller."""

    units: ClassVar[How] = "dimension"

    name: Literal["regression"] = "regression"

    def loss(self, width: int, bank: Bank) -> nn.Module:
        return Regression(width, bank.width)


class Regression(nn.Module):
    """Mean squared error of a linear map; 1 is what the mean of a standardised teacher would score."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, teacher_width)

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.linear(h), target)
