"""Cosine: a linear map of the features points where the teacher's embedding points.

    L = 1 - mean cos(W h + b, t)

Source: Sariyildiz et al., "UNIC: universal classification models via multi-teacher distillation" (2024), equation 2
without its smooth L1; Reimers and Gurevych, sentence-transformers' EmbedDistillLoss with its default metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.methods.distillers.distiller import DistillerConfig
from mvmr.methods.parts.standardising import Bank


@dataclass(frozen=True, kw_only=True)
class CosineConfig(DistillerConfig):
    """No settings beside those of every distiller."""

    name: Literal["cosine"] = "cosine"

    def loss(self, width: int, bank: Bank) -> nn.Module:
        return Cosine(width, bank.width)


class Cosine(nn.Module):
    """From 0 to 2; 1 is what a map that knows nothing would score."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, teacher_width)

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(self.linear(h), target, dim=1).mean()
