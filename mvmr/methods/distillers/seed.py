"""SEED: mapped features are as similar to many images as the teacher's embedding is.

    L = KL(softmax_j(cos(t, a_j) / teacher_temperature) || softmax_j(cos(W h + b, a_j) / student_temperature))

The paper takes the images a_j from a queue of past batches. The teacher's rows are all there from the start, so these
are the whole bank of them, or where that is too large an even sample of it.

Source: Fang et al., "SEED: self-supervised distillation for visual representation" (2021), equations 2 to 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.distillers.distiller import DistillerConfig
from mvmr.methods.parts.similarity import similarity_loss
from mvmr.methods.parts.standardising import Bank


@dataclass(frozen=True, kw_only=True)
class SeedConfig(DistillerConfig):
    """An even sample of the images stands for the paper's queue where there are more than `bank`."""

    name: Literal["seed"] = "seed"
    bank: int = 16384  # that an image is compared with, at most [images, 2 or more]
    teacher_temperature: float = 0.05  # of the teacher's softmax: the lower, the sharper [above 0]
    student_temperature: float = 0.1  # of the student's [above 0]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bank < 2:
            raise MvmrError(f"[method] bank = {self.bank}: an image is compared with others; give 2 or more")
        for name in ("teacher_temperature", "student_temperature"):
            if not getattr(self, name) > 0:
                raise MvmrError(f"[method] {name} = {getattr(self, name)}: must be above 0")

    def loss(self, width: int, bank: Bank) -> nn.Module:
        return Seed(self, width, bank)


class Seed(nn.Module):
    """The linear map to the teacher's space, and the embeddings there that others are compared with."""

    anchors: Tensor  # [M, K], of norm 1

    def __init__(self, config: SeedConfig, width: int, bank: Bank) -> None:
        super().__init__()
        self.temperatures = config.student_temperature, config.teacher_temperature
        self.linear = nn.Linear(width, bank.width)
        self.register_buffer("anchors", F.normalize(bank.sample(config.bank), dim=1))

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        return similarity_loss(self.linear(h), F.normalize(target, dim=1), self.anchors, *self.temperatures)
