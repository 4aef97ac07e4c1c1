"""BYOL: from one view of an image, a predictor tells what a slowly moving copy of the network makes of another.

Source: Grill et al., "Bootstrap your own latent" (2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.method import PAIR, Method, MethodConfig, Setting, Step, ViewSpec
from mvmr.methods.parts.dependence import effective_rank
from mvmr.methods.parts.heads import build_projector, check_predictor
from mvmr.methods.parts.momentum import cosine_momentum, follow, make_follower


@dataclass(frozen=True, kw_only=True)
class ByolConfig(MethodConfig):
    """The paper's networks; its momentum for 300 epochs (appendix), 0.996 for 1000."""

    name: Literal["byol"] = "byol"
    momentum: float = 0.99  # of the slow network at first; it grows to 1 [0 to 1]
    projector: tuple[int, ...] = (4096, 256)  # widths of its layers [outputs, 1 or more each]
    predictor: tuple[int, ...] = (4096, 256)  # widths, the last as the projector's [outputs, 1 or more each]

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise MvmrError(f"[method] momentum = {self.momentum}: must lie between 0 and 1")
        check_predictor(self.projector, self.predictor)

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return PAIR


class Byol(Method):
    """Encoder, projector and predictor, and the moving averages of the first two."""

    projector: nn.Module

    def __init__(self, config: ByolConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.momentum = config.momentum
        self.projector = build_projector(setting.width, config.projector)
        self.predictor = build_projector(config.projector[-1], config.predictor)
        self.slow_encoder, self.slow_projector = make_follower(encoder), make_follower(self.projector)

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        images = [self.normalise(views[name]) for name in ("first", "second")]
        h = [self.encoder(view) for view in images]
        predictions = [self.predictor(self.projector(features)) for features in h]
        with torch.no_grad():
            slow = [self.slow_projector(self.slow_encoder(view)) for view in images]
        with torch.autocast(h[0].device.type, enabled=False):
            loss = regression_loss(predictions[0], slow[1]) + regression_loss(predictions[1], slow[0])
        return Step({"regression": loss}, h[0], (h[0].detach().float(), slow[0].float()))

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        momentum = cosine_momentum(self.momentum, step, steps)
        follow(self.slow_encoder, self.encoder, momentum)
        follow(self.slow_projector, self.projector, momentum)

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
        """Effective ranks of features and of the slow projections: 1 is a collapse."""
        h, z = outputs
        return {"rank_h": effective_rank(h), "rank_z": effective_rank(z)}


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of normalised rows, 2 - 2 cos (eq. 2): [B, D] each -> scalar."""
    return (2 - 2 * F.cosine_similarity(prediction.float(), target.float())).mean()
