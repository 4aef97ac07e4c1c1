"""ISD: a network compares an image with many others as its slowly moving copy does, which sees a weaker view.

Source: Tejankar et al., "ISD: self-supervised learning by iterative similarity distillation" (2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.method import Method, MethodConfig, Setting, Step, ViewSpec
from mvmr.methods.parts.dependence import effective_rank
from mvmr.methods.parts.gathering import gather
from mvmr.methods.parts.heads import build_projector, check_predictor
from mvmr.methods.parts.momentum import encode_in_halves, follow, make_follower
from mvmr.methods.parts.queue import Queue, check_queue
from mvmr.methods.parts.similarity import similarity_loss

WEAK, STRONG = ViewSpec("weak", "crop+flip"), ViewSpec("strong")


@dataclass(frozen=True, kw_only=True)
class IsdConfig(MethodConfig):
    """The paper's temperatures, momentum and networks for a ResNet50; its 128,000 anchors are for ImageNet."""

    name: Literal["isd"] = "isd"
    queue: int = 4096  # anchors: what the slow network made of images of past batches [rows, 2 or more]
    teacher_temperature: float = 0.01  # of the slow network's softmax [above 0]
    student_temperature: float = 0.1  # of the softmax: the lower, the sharper [above 0]
    momentum: float = 0.99  # of the slow network [0 to 1]
    weak: bool = True  # whether the slow network sees a weaker view, crops and flips alone; else both see the recipe's
    projector: tuple[int, ...] = (4096, 512)  # widths of its layers [outputs, 1 or more each]
    predictor: tuple[int, ...] = (4096, 512)  # widths, the last as the projector's [outputs, 1 or more each]

    def __post_init__(self) -> None:
        if self.queue < 2:
            raise MvmrError(f"[method] queue = {self.queue}: an image is compared with others; give 2 or more")
        for name in ("teacher_temperature", "student_temperature"):
            if not getattr(self, name) > 0:
                raise MvmrError(f"[method] {name} = {getattr(self, name)}: must be above 0")
        if not 0 <= self.momentum <= 1:
            raise MvmrError(f"[method] momentum = {self.momentum}: must lie between 0 and 1")
        check_predictor(self.projector, self.predictor)

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return (STRONG, WEAK if self.weak else ViewSpec("weak"))

    def check(self, batch_size: int, images: int) -> None:
        check_queue(self.queue, batch_size)


class Isd(Method):
    """Encoder, projector and predictor, the moving averages of the first two, and the anchors."""

    projector: nn.Module

    def __init__(self, config: IsdConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.config = config
        self.projector = build_projector(setting.width, config.projector)
        self.predictor = build_projector(config.projector[-1], config.predictor)
        self.slow_encoder, self.slow_projector = make_follower(encoder), make_follower(self.projector)
        self.queue = Queue(config.queue, config.projector[-1])

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        c = self.config
        h = self.features(views["strong"])
        student = self.predictor(self.projector(h))
        teacher = encode_in_halves(
            lambda images: self.slow_projector(self.slow_encoder(images)), self.normalise(views["weak"])
        )
        with torch.autocast(h.device.type, enabled=False):
            teacher, anchors = F.normalize(teacher.float(), dim=1), self.queue.entries.clone()  # they move on below
            loss = similarity_loss(student.float(), teacher, anchors, c.student_temperature, c.teacher_temperature)
        self.queue.push(gather(teacher))
        return Step({"similarity": loss}, h, h.detach().float())

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        follow(self.slow_encoder, self.encoder, self.config.momentum)
        follow(self.slow_projector, self.projector, self.config.momentum)

    @torch.no_grad()
    def diagnose(self, outputs: Tensor, generator: torch.Generator) -> dict[str, float]:
        """Effective rank of the features: 1 is a collapse."""
        return {"rank_h": effective_rank(outputs)}
