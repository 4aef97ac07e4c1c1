"""How two networks compare an image with many others."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def similarity_loss(
    student: Tensor, teacher: Tensor, anchors: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """KL from the teacher's softmax over similarities to the anchors to the student's.

    Sources: Fang et al., "SEED: self-supervised distillation for visual representation" (2021), equations 2 to 5;
    Tejankar et al., "ISD: self-supervised learning by iterative similarity distillation" (2021), equations 1 to 3.

    Shapes: student [B, D], teacher [B, D] and anchors [K, D] of norm 1 -> scalar.
    """
    p = F.softmax(teacher @ anchors.T / teacher_temperature, dim=1)
    q = F.log_softmax(F.normalize(student, dim=1) @ anchors.T / student_temperature, dim=1)
    return F.kl_div(q, p, reduction="batchmean")
