"""SimSiam: from one view of an image, a predictor tells what the same network makes of the other, held still.

Source: Chen and He, "Exploring simple siamese representation learning" (2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.methods.method import PAIR, Method, MethodConfig, Setting, Step, ViewSpec
from mvmr.methods.parts.dependence import effective_rank
from mvmr.methods.parts.heads import build_projector, check_predictor


@dataclass(frozen=True, kw_only=True)
class SimsiamConfig(MethodConfig):
    """The paper's networks: a projector with a batch norm at its end, a predictor narrow in the middle."""

    name: Literal["simsiam"] = "simsiam"
    projector: tuple[int, ...] = (2048, 2048, 2048)  # widths of its layers [outputs, 1 or more each]
    predictor: tuple[int, ...] = (512, 2048)  # widths, the last as the projector's [outputs, 1 or more each]

    def __post_init__(self) -> None:
        check_predictor(self.projector, self.predictor)

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return PAIR


class Simsiam(Method):
    """Encoder, projector and predictor."""

    projector: nn.Module

    def __init__(self, config: SimsiamConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.projector = build_projector(setting.width, config.projector, last_norm=True)
        self.predictor = build_projector(config.projector[-1], config.predictor)

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        h = [self.features(views[name]) for name in ("first", "second")]
        z = [self.projector(features) for features in h]
        p = [self.predictor(projection) for projection in z]
        with torch.autocast(h[0].device.type, enabled=False):
            loss = (unlikeness(p[0], z[1]) + unlikeness(p[1], z[0])) / 2  # eq. 4
        return Step({"unlikeness": loss}, h[0], (h[0].detach().float(), z[0].detach().float()))

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
        """Effective ranks; and the spread of normalised projections, 1 / sqrt(D) when healthy and 0 in a collapse."""
        h, z = outputs
        spread = F.normalize(z, dim=1).std(0).mean()
        return {"rank_h": effective_rank(h), "rank_z": effective_rank(z), "std_z": float(spread)}


def unlikeness(prediction: Tensor, projection: Tensor) -> Tensor:
    """Minus the cosine of rows, of which the second get no gradient (eq. 1 and 3): [B, D] each -> scalar."""
    return -F.cosine_similarity(prediction.float(), projection.detach().float()).mean()
