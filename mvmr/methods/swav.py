"""SwAV: from each view of an image, to which prototypes another view has been assigned, all being used alike.

Source: Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments" (2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.method import Method, Setting, Step
from mvmr.methods.parts.classes import check_classes, count_classes
from mvmr.methods.parts.crops import CropsConfig
from mvmr.methods.parts.dependence import effective_rank
from mvmr.methods.parts.gathering import first_row, gather
from mvmr.methods.parts.heads import Prototypes, build_projector
from mvmr.methods.parts.queue import Queue, check_queue
from mvmr.methods.parts.sinkhorn import sinkhorn

_PROTOTYPES = 3000  # of the paper, for ImageNet


@dataclass(frozen=True, kw_only=True)
class SwavConfig(CropsConfig):
    """The paper's temperatures, projector and crops."""

    name: Literal["swav"] = "swav"
    prototypes: int = 0  # how many; 0: 3,000, or one to ten images where that is less [0, or 2 or more]
    temperature: float = 0.1  # of the softmax: the lower, the sharper [above 0]
    epsilon: float = 0.05  # of the assignments: the higher, the more even they are [above 0]
    iterations: int = 3  # passes of Sinkhorn and Knopp over the assignments [1 or more]
    frozen: float = 0.01  # at first, in which prototypes stay as they are [share of all steps, 0 to 1]
    queue: int = 0  # of past batches that assignments take in, once it is full; for small batches [rows, 0 or more]
    projector: tuple[int, ...] = (2048, 128)  # widths of its layers [outputs, 1 or more each]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_classes("prototypes", self.prototypes)
        for name in ("temperature", "epsilon"):
            if not getattr(self, name) > 0:
                raise MvmrError(f"[method] {name} = {getattr(self, name)}: must be above 0")
        if self.iterations < 1:
            raise MvmrError(f"[method] iterations = {self.iterations}: must be 1 or more")
        if self.queue < 0:
            raise MvmrError(f"[method] queue = {self.queue}: give a number of rows, or 0 for none")
        if not self.projector:
            raise MvmrError("[method] projector = []: give its widths, such as 2048,128")

    def settle(self, images: int) -> Self:
        return replace(self, prototypes=self.prototypes or count_classes(_PROTOTYPES, images))

    def check(self, batch_size: int, images: int) -> None:
        check_classes("prototypes", self.prototypes, images)
        if self.queue:
            check_queue(self.queue, batch_size)


class Swav(Method):
    """Encoder, projector and prototypes; and what the projector made of past batches, a queue for each global crop."""

    projector: nn.Module
    progress: Tensor  # share of the steps that are done
    pushed: Tensor  # rows that have gone into each queue

    def __init__(self, config: SwavConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.config = config
        self.projector = build_projector(setting.width, config.projector)
        self.prototypes = Prototypes(config.projector[-1], config.prototypes)
        self.queues = nn.ModuleList(
            Queue(config.queue, config.projector[-1]) for _ in range(config.crops if config.queue else 0)
        )
        self.register_buffer("progress", torch.zeros(()))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        c = self.config
        h = [self.features(views[spec.name]) for spec in c.views]
        with torch.autocast(h[0].device.type, enabled=False):
            z = [self.projector(features.float()) for features in h]
            frozen = bool(self.progress < c.frozen)
            scores = [self.prototypes(projection, frozen=frozen) for projection in z]
            assignments = [self._assign(number, z[number], scores[number]) for number in range(c.crops)]
            loss = swapped_loss(scores, assignments, c.temperature)
        return Step({"swapped": loss}, h[0], (h[0].detach().float(), assignments[0]))

    @torch.no_grad()
    def _assign(self, number: int, z: Tensor, scores: Tensor) -> Tensor:
        """Assignments of this rank's rows, made with those of all ranks and of the queue."""
        everyone = gather(scores.detach())
        if self.queues:
            rows = gather(F.normalize(z.detach(), dim=1))
            queue: Queue = self.queues[number]  # type: ignore[assignment]
            if self.pushed >= self.config.queue:
                everyone = torch.cat([everyone, self.prototypes(queue.entries)])
            queue.push(rows)
            if number == len(self.queues) - 1:
                self.pushed += len(rows)
        start = first_row(len(z))
        return sinkhorn(everyone, self.config.epsilon, self.config.iterations)[start : start + len(z)]

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        self.progress.fill_(step / steps)

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
        """Effective rank of the features, and how many prototypes the batch takes: 1 of either is a collapse."""
        h, assignments = outputs
        return {"rank_h": effective_rank(h), "prototypes": float(len(assignments.argmax(1).unique()))}


def swapped_loss(scores: list[Tensor], assignments: list[Tensor], temperature: float) -> Tensor:
    """Cross-entropy of each view's softmax with the assignment of each global view but itself, their mean (eq. 2).

    Shapes: scores [B, K] of each view, global ones first; assignments [B, K] of the global ones -> scalar.
    """
    logs = [F.log_softmax(score / temperature, dim=1) for score in scores]
    terms = [
        -(assignment * log).sum(1).mean()
        for number, assignment in enumerate(assignments)
        for other, log in enumerate(logs)
        if other != number
    ]
    return torch.stack(terms).mean()
