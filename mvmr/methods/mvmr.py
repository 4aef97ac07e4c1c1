"""MV-MR: the projection of an augmented view is made to depend on the original view and on fixed representations.

Source: Kinakh, Drozdova, Voloshynovskiy, "MV-MR: multi-views and multi-representations for self-supervised learning and
knowledge distillation" (Entropy 2024). The loss is `mvmr.methods.objective`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mvmr.methods.method import AUGMENTED, ORIGINAL, Method, MethodConfig, Setting, Step, ViewSpec
from mvmr.methods.objective import Embeddings, Objective, ObjectiveConfig
from mvmr.methods.parts.gathering import gather
from mvmr.methods.parts.heads import build_projector
from mvmr.representations import AUGMENTED_PIXELS

SECOND = ViewSpec("second")  # another augmentation, whose pixels are a representation


@dataclass(frozen=True, kw_only=True)
class MvmrConfig(ObjectiveConfig, MethodConfig):
    """Weights of the objective's terms, and the projector."""

    smallest_batch: ClassVar[int] = 4  # the unbiased estimator is not defined below
    weighted: ClassVar[tuple[str, ...]] = ("representations",)

    name: Literal["mvmr"] = "mvmr"
    projector: tuple[int, ...] = ()  # widths of its layers; empty: z = h [outputs, 1 or more each]

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return (ORIGINAL, AUGMENTED, SECOND) if AUGMENTED_PIXELS in self.targets else (ORIGINAL, AUGMENTED)


class Mvmr(Method):
    """Encoder and projector."""

    projector: nn.Module

    def __init__(self, config: MvmrConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.projector = build_projector(setting.width, config.projector)
        self.objective = Objective(config)

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        original, augmented = views["original"], views["augmented"]
        h, ha = self.features(original), self.features(augmented)
        z, za = self.projector(h), self.projector(ha)
        with torch.autocast(original.device.type, enabled=False):
            embeddings = Embeddings(*(gather(t.float()) for t in (h, ha, z, za)))
            everyone = {name: gather(t.float()) for name, t in targets.items()}
            return Step(self.objective(embeddings, everyone), ha, (embeddings, everyone))

    @torch.no_grad()
    def diagnose(
        self, outputs: tuple[Embeddings, Mapping[str, Tensor]], generator: torch.Generator
    ) -> dict[str, float]:
        return self.objective.diagnose(*outputs, generator)
