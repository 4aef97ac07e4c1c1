"""LeJEPA: views of an image are where the mean of its global ones is, and embeddings are spread like a Gaussian.

Source: Balestriero and LeCun, "LeJEPA: provable and scalable self-supervised learning without the heuristics" (2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.method import Method, Setting, Step
from mvmr.methods.parts.crops import CropsConfig
from mvmr.methods.parts.dependence import effective_rank
from mvmr.methods.parts.gathering import gather
from mvmr.methods.parts.gaussianity import gaussian_energy, sigreg
from mvmr.methods.parts.heads import build_projector


@dataclass(frozen=True, kw_only=True)
class LejepaConfig(CropsConfig):
    """The paper's trade-off and slices."""

    name: Literal["lejepa"] = "lejepa"
    trade: float = 0.05  # lambda: weight of the spread; 1 - lambda is the prediction's [0 to 1]
    # the paper's SIGReg on random slices, or the energy distance to a Gaussian, which needs none
    spread: Literal["sigreg", "energy"] = "sigreg"
    slices: int = 1024  # directions that SIGReg draws in a step [1 or more]
    global_area: tuple[float, float] | None = (0.3, 1.0)
    local_area: tuple[float, float] = (0.05, 0.3)
    projector: tuple[int, ...] = (2048, 2048, 128)  # widths of its layers [outputs, 1 or more each]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.trade <= 1:
            raise MvmrError(f"[method] trade = {self.trade}: must lie between 0 and 1")
        if self.slices < 1:
            raise MvmrError(f"[method] slices = {self.slices}: must be 1 or more")


class Lejepa(Method):
    """Encoder and projector, and how many steps there were: the slices of each are drawn by its number."""

    projector: nn.Module
    steps: Tensor

    def __init__(self, config: LejepaConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.config = config
        self.projector = build_projector(setting.width, config.projector)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        c = self.config
        h = [self.features(views[spec.name]) for spec in c.views]
        with torch.autocast(h[0].device.type, enabled=False):
            z = torch.stack([gather(self.projector(features.float())) for features in h])  # [V, B, D]
            prediction = (z - z[: c.crops].mean(0)).square().mean()  # each view tells the mean of the global ones
            generator = torch.Generator().manual_seed(int(self.steps))
            spreads = [
                sigreg(view, c.slices, generator) if c.spread == "sigreg" else gaussian_energy(view) for view in z
            ]
            losses = {
                "prediction": (1 - c.trade) * prediction,
                c.spread: c.trade * torch.stack(spreads).mean(),
            }
        return Step(losses, h[0], (h[0].detach().float(), z[0].detach()))

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        self.steps.fill_(step)

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
        """Effective ranks of features and projections, and the mean spread of the latter: 1 and 0 are a collapse."""
        h, z = outputs
        return {"rank_h": effective_rank(h), "rank_z": effective_rank(z), "std_z": float(z.std(0).mean())}
