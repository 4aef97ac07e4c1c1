"""DINO: from each view of an image, what a slow copy of the network says of a global view, centred and sharpened.

Source: Caron et al., "Emerging properties in self-supervised vision transformers" (2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.method import Method, Setting, Step
from mvmr.methods.parts.crops import CropsConfig
from mvmr.methods.parts.dependence import effective_rank
from mvmr.methods.parts.gathering import gather
from mvmr.methods.parts.heads import Prototypes, build_plain_head
from mvmr.methods.parts.momentum import cosine_momentum, follow, make_follower


@dataclass(frozen=True, kw_only=True)
class DinoConfig(CropsConfig):
    """The paper's head, temperatures, momenta and crops; its 65,536 outputs are for ImageNet."""

    name: Literal["dino"] = "dino"
    outputs: int = 4096  # scores that the head gives [2 or more]
    student_temperature: float = 0.1  # of the softmax: the lower, the sharper [above 0]
    teacher_temperature: float = 0.07  # of the slow network's softmax, after the warm-up [above 0]
    first_temperature: float = 0.04  # of the slow network's softmax at first [above 0]
    warmup: float = 0.1  # at first, in which the slow network's temperature rises [share of all steps, 0 to 1]
    momentum: float = 0.996  # of the slow network at first; it grows to 1 [0 to 1]
    centre_momentum: float = 0.9  # of the mean that is taken off the slow network's outputs [0 to 1]
    frozen: float = 0.01  # at first, in which the last layer stays as it is [share of all steps, 0 to 1]
    head: tuple[int, ...] = (2048, 2048, 256)  # widths before the last layer [outputs, 1 or more each]
    local: int = 8
    global_area: tuple[float, float] | None = (0.25, 1.0)
    local_area: tuple[float, float] = (0.05, 0.25)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outputs < 2:
            raise MvmrError(f"[method] outputs = {self.outputs}: give 2 or more")
        for name in ("student_temperature", "teacher_temperature", "first_temperature"):
            if not getattr(self, name) > 0:
                raise MvmrError(f"[method] {name} = {getattr(self, name)}: must be above 0")
        for name in ("momentum", "centre_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise MvmrError(f"[method] {name} = {getattr(self, name)}: must lie between 0 and 1")
        if not self.head:
            raise MvmrError("[method] head = []: give its widths, such as 2048,2048,256")

    def temperature(self, progress: float) -> float:
        """The teacher's, at a share of all steps: it rises in a line, then stays."""
        share = min(1.0, progress / self.warmup) if self.warmup else 1.0
        return self.first_temperature + share * (self.teacher_temperature - self.first_temperature)


class Dino(Method):
    """Encoder and head with its last layer, and the moving averages of all three; and the teacher's centre."""

    projector: nn.Module
    centre: Tensor  # [1, outputs]
    progress: Tensor  # share of the steps that are done

    def __init__(self, config: DinoConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.config = config
        self.projector = build_plain_head(setting.width, config.head)
        self.last = Prototypes(config.head[-1], config.outputs)
        self.slow_encoder, self.slow_projector = make_follower(encoder), make_follower(self.projector)
        self.slow_last = make_follower(self.last)
        self.register_buffer("centre", torch.zeros(1, config.outputs))
        self.register_buffer("progress", torch.zeros(()))

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        c, progress = self.config, float(self.progress)
        images = [self.normalise(views[spec.name]) for spec in c.views]
        h = [self.encoder(view) for view in images]
        student = [self.last(self.projector(features), frozen=progress < c.frozen) for features in h]
        with torch.no_grad():
            teacher = [self.slow_last(self.slow_projector(self.slow_encoder(view))) for view in images[: c.crops]]
        with torch.autocast(h[0].device.type, enabled=False):
            temperature = c.temperature(progress)
            loss = self_distillation(student, teacher, self.centre, c.student_temperature, temperature)
        mean = torch.stack([gather(output.float()) for output in teacher]).mean((0, 1))
        self.centre.lerp_(mean[None], 1 - c.centre_momentum)  # eq. 4
        return Step({"cross_entropy": loss}, h[0], (h[0].detach().float(), teacher[0].float()))

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        self.progress.fill_(step / steps)
        momentum = cosine_momentum(self.config.momentum, step, steps)
        follow(self.slow_encoder, self.encoder, momentum)
        follow(self.slow_projector, self.projector, momentum)
        follow(self.slow_last, self.last, momentum)

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
        """Effective ranks of features and of the teacher's outputs: 1 is a collapse."""
        h, teacher = outputs
        return {"rank_h": effective_rank(h), "rank_teacher": effective_rank(teacher)}


def self_distillation(
    student: list[Tensor],
    teacher: list[Tensor],
    centre: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Cross-entropy of each student view with the teacher's of each global view but itself, their mean (eq. 3).

    The teacher's outputs are centred, by subtraction, and sharpened, by a lower temperature.

    Shapes: outputs [B, K] of each view, global ones first; centre [1, K] -> scalar.
    """
    logs = [F.log_softmax(output.float() / student_temperature, dim=1) for output in student]
    p = [F.softmax((output.float() - centre) / teacher_temperature, dim=1) for output in teacher]
    terms = [
        -(p[number] * log).sum(1).mean()
        for number in range(len(p))
        for other, log in enumerate(logs)
        if other != number
    ]
    return torch.stack(terms).mean()
