"""SimCLR: two augmented views of an image are told from all other views of the batch.

Source: Chen et al., "A simple framework for contrastive learning of visual representations" (2020).
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


@dataclass(frozen=True, kw_only=True)
class SimclrConfig(MethodConfig):
    """The paper's projector; its temperature for small images (appendix B.9), 0.1 with thousands to a batch."""

    name: Literal["simclr"] = "simclr"
    temperature: float = 0.5  # of the softmax: the lower, the sharper [above 0]
    projector: tuple[int, ...] = (2048, 128)  # widths of its layers [outputs, 1 or more each]

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise MvmrError(f"[method] temperature = {self.temperature}: must be above 0")

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return PAIR


class Simclr(Method):
    """Encoder and projector."""

    projector: nn.Module

    def __init__(self, config: SimclrConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.projector = build_projector(setting.width, config.projector)
        self.temperature = config.temperature

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        h = [self.features(views[name]) for name in ("first", "second")]
        z = [self.projector(features) for features in h]
        with torch.autocast(h[0].device.type, enabled=False):
            first, second = (gather(projection.float()) for projection in z)
            loss = nt_xent(first, second, self.temperature)
        return Step({"nt_xent": loss}, h[0], (h[0].detach().float(), first.detach()))

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
        """Effective ranks of features and projections: 1 is a collapse."""
        h, z = outputs
        return {"rank_h": effective_rank(h), "rank_z": effective_rank(z)}


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The normalised, temperature-scaled cross-entropy of 2B views, each to be matched with its other view (eq. 1).

    Shapes: [B, D] float32 each, not normalised -> scalar.
    """
    z = F.normalize(torch.cat([first, second]), dim=1)
    logits = z @ z.T / temperature  # [2B, 2B]
    logits.fill_diagonal_(-torch.inf)  # a view is not compared with itself
    count = len(first)
    partner = torch.arange(2 * count, device=z.device).roll(count)
    return F.cross_entropy(logits, partner)
