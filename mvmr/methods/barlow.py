"""Barlow Twins: each dimension of two views is to agree with itself and with no other.

Source: Zbontar et al., "Barlow twins: self-supervised learning via redundancy reduction" (2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.method import PAIR, Method, MethodConfig, Setting, Step, ViewSpec
from mvmr.methods.parts.dependence import effective_rank
from mvmr.methods.parts.gathering import gather
from mvmr.methods.parts.heads import build_projector

_EPS = 1e-5  # as in a batch norm


@dataclass(frozen=True, kw_only=True)
class BarlowConfig(MethodConfig):
    """The paper's projector and weight."""

    smallest_batch: ClassVar[int] = 3  # of two images all dimensions correlate with all

    name: Literal["barlow"] = "barlow"
    redundancy: float = 0.005  # lambda: weight of correlations between dimensions [0 or more]
    projector: tuple[int, ...] = (8192, 8192, 8192)  # widths of its layers [outputs, 1 or more each]

    def __post_init__(self) -> None:
        if not self.redundancy >= 0:
            raise MvmrError(f"[method] redundancy = {self.redundancy}: a weight must be 0 or more")

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return PAIR


class Barlow(Method):
    """Encoder and projector."""

    projector: nn.Module

    def __init__(self, config: BarlowConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.projector = build_projector(setting.width, config.projector)
        self.redundancy = config.redundancy

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        h = [self.features(views[name]) for name in ("first", "second")]
        z = [self.projector(features) for features in h]
        with torch.autocast(h[0].device.type, enabled=False):
            first, second = (gather(projection.float()) for projection in z)
            invariance, redundancy = correlation_terms(first, second)
        losses = {"invariance": invariance, "redundancy": self.redundancy * redundancy}
        return Step(losses, h[0], (h[0].detach().float(), first.detach()))

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
        """Effective ranks of features and projections: 1 is a collapse."""
        h, z = outputs
        return {"rank_h": effective_rank(h), "rank_z": effective_rank(z)}


def correlation_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Of the correlations C of dimensions of both views: sum of (1 - C_ii)^2, and sum of C_ij^2 of all others (eq. 1).

    Shapes: [B, D] float32 each -> two scalars.
    """
    a, b = (_standardise(z) for z in (first, second))
    correlations = a.T @ b / len(a)  # [D, D]
    diagonal = correlations.diagonal()
    return (1 - diagonal).square().sum(), correlations.square().sum() - diagonal.square().sum()


def _standardise(z: Tensor) -> Tensor:
    return (z - z.mean(0)) / torch.sqrt(z.var(0, unbiased=False) + _EPS)
