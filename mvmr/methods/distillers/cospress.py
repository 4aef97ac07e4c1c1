"""CosPress: the teacher's space is pressed into the features' width with its cosines kept, and matched there.

    L = mean over temperatures of KL(softmax_j(cos(t_i, t_j) / T) || softmax_j(cos(A t_i, A t_j) / T)), j other than i,
      + 1 - mean cos(h, A t)

A is trained by the first term alone. Features, which a ReLU keeps positive, are centred in the batch.

Source: Mannix, Hodgkinson and Bondell, "Preserving angles improves feature distillation" (TMLR 2025), for whole images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.distillers.distiller import DistillerConfig
from mvmr.methods.parts.relations import centre, off_diagonal
from mvmr.methods.parts.standardising import Bank


@dataclass(frozen=True, kw_only=True)
class CospressConfig(DistillerConfig):
    """Temperatures beside what every distiller has."""

    name: Literal["cospress"] = "cospress"
    temperatures: tuple[float, ...] = (0.01, 0.1, 1.0)  # at which the cosines are compared [above 0 each]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperatures or min(self.temperatures) <= 0:
            raise MvmrError(f"[method] temperatures = {list(self.temperatures)}: give one or more, each above 0")

    def loss(self, width: int, bank: Bank) -> nn.Module:
        return Cospress(width, bank.width, self.temperatures)


class Cospress(nn.Module):
    """The press A, and both terms."""

    def __init__(self, width: int, teacher_width: int, temperatures: tuple[float, ...]) -> None:
        super().__init__()
        self.temperatures = temperatures
        self.press = nn.Linear(teacher_width, width, bias=False)

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        pressed = self.press(target)
        mine, theirs = _cosines(pressed), _cosines(target)
        kept = [
            F.kl_div((mine / t).log_softmax(1), (theirs / t).log_softmax(1), reduction="batchmean", log_target=True)
            for t in self.temperatures
        ]
        matched = 1 - F.cosine_similarity(centre(h), pressed.detach(), dim=1).mean()
        return torch.stack(kept).mean() + matched


def _cosines(x: Tensor) -> Tensor:
    unit = F.normalize(x, dim=1)
    return off_diagonal(unit @ unit.T)
