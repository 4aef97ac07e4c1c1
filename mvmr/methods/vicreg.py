"""VICReg: two views agree, each dimension varies over the batch, and no two vary together.

Source: Bardes et al., "VICReg: variance-invariance-covariance regularization for self-supervised learning" (2022).
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
from mvmr.methods.parts.gathering import gather
from mvmr.methods.parts.heads import build_projector
from mvmr.methods.parts.moments import covariance_penalty, hinge


@dataclass(frozen=True, kw_only=True)
class VicregConfig(MethodConfig):
    """The paper's projector and weights; `variance` weighs the mean over both views, as its code does."""

    name: Literal["vicreg"] = "vicreg"
    invariance: float = 25.0  # lambda: weight of the views' distance [0 or more]
    variance: float = 25.0  # mu: weight of the standard deviations' hinge [0 or more]
    covariance: float = 1.0  # nu: weight of the covariances between dimensions [0 or more]
    gamma: float = 1.0  # the standard deviation that each dimension must reach [above 0]
    eps: float = 1e-4  # inside the square root of the standard deviation [above 0]
    projector: tuple[int, ...] = (8192, 8192, 8192)  # widths of its layers [outputs, 1 or more each]

    def __post_init__(self) -> None:
        for name in ("invariance", "variance", "covariance"):
            if not getattr(self, name) >= 0:
                raise MvmrError(f"[method] {name} = {getattr(self, name)}: a weight must be 0 or more")

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return PAIR


class Vicreg(Method):
    """Encoder and projector."""

    projector: nn.Module

    def __init__(self, config: VicregConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.config = config
        self.projector = build_projector(setting.width, config.projector)

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        c = self.config
        h = [self.features(views[name]) for name in ("first", "second")]
        z = [self.projector(features) for features in h]
        with torch.autocast(h[0].device.type, enabled=False):
            first, second = (gather(projection.float()) for projection in z)
            losses = {
                "invariance": c.invariance * F.mse_loss(first, second),  # s, eq. 5
                "variance": c.variance * (hinge(first, c.gamma, c.eps) + hinge(second, c.gamma, c.eps)) / 2,  # v, eq. 1
                "covariance": c.covariance * (covariance_penalty(first) + covariance_penalty(second)),  # c, eq. 4
            }
        return Step(losses, h[0], (h[0].detach().float(), first.detach()))

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
        """Effective ranks of features and projections, and the mean spread of the latter: 1 and 0 are a collapse."""
        h, z = outputs
        return {"rank_h": effective_rank(h), "rank_z": effective_rank(z), "std_z": float(z.std(0).mean())}
