"""TWIST: both views of an image are sure of one class, and all classes are used alike.

Source: Wang et al., "Self-supervised learning by estimating twin class distributions" (2021; IEEE TIP 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.errors import MvmrError
from mvmr.methods.method import Method, MethodConfig, Statistics, Step, ViewSpec
from mvmr.methods.parts.dependence import effective_rank
from mvmr.methods.parts.gathering import gather
from mvmr.methods.parts.heads import build_projector


@dataclass(frozen=True, kw_only=True)
class TwistConfig(MethodConfig):
    """The paper's weights and number of classes, which is for ImageNet: give fewer for fewer images."""

    name: Literal["twist"] = "twist"
    classes: int = 4096
    sharpness: float = 1.0  # alpha
    diversity: float = 1.0  # beta
    hidden: tuple[int, ...] = (4096,)  # widths between features and classes

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise MvmrError(f"[method] classes = {self.classes}: give 2 or more")
        for name in ("sharpness", "diversity"):
            if not getattr(self, name) >= 0:
                raise MvmrError(f"[method] {name} = {getattr(self, name)}: a weight must be 0 or more")

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return (ViewSpec("first"), ViewSpec("second"))

    def check(self, batch_size: int, images: int) -> None:
        if self.classes > images:
            raise MvmrError(f"[method] classes = {self.classes}, of {images} images: give {images} or fewer")


class Twist(Method):
    """Encoder, and the projector that tells classes: its last layer is a batch norm, as logits else collapse."""

    projector: nn.Module

    def __init__(
        self, config: TwistConfig, encoder: nn.Module, width: int, preprocess: Preprocess, statistics: Statistics
    ) -> None:
        super().__init__(encoder, preprocess)
        self.config = config
        self.projector = build_projector(width, (*config.hidden, config.classes), last_norm=True)

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        c = self.config
        h = [self.features(views[name]) for name in ("first", "second")]
        with torch.autocast(h[0].device.type, enabled=False):
            logits = [gather(self.projector(features.float())) for features in h]
            consistency, sharpness, diversity = twin_terms(*logits)
        losses = {
            "consistency": consistency, "sharpness": c.sharpness * sharpness, "diversity": -c.diversity * diversity,
        }  # fmt: skip
        return Step(losses, (h[0].detach().float(), logits[0].detach()))

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
        """Effective rank of the features, and how many classes the batch takes: 1 of either is a collapse."""
        h, logits = outputs
        return {"rank_h": effective_rank(h), "classes": float(len(logits.argmax(1).unique()))}


def twin_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means over both views of three terms (equations 1 to 5), p_b being the softmax of a row:

        consistency  KL(p_b || p'_b) and KL(p'_b || p_b), mean over rows
        sharpness    entropy of p_b, mean over rows: 0 where each is sure
        diversity    entropy of the mean of all p_b: log C where classes are used alike

    The loss is consistency + alpha * sharpness - beta * diversity; its least value is -beta log C.

    Shapes: logits [B, C] float32 each -> three scalars.
    """
    logs = [F.log_softmax(logits, dim=1) for logits in (first, second)]
    p = [log.exp() for log in logs]
    consistency = ((p[0] - p[1]) * (logs[0] - logs[1])).sum(1).mean() / 2
    sharpness = -sum((a * log).sum(1).mean() for a, log in zip(p, logs, strict=True)) / 2
    means = [a.mean(0) for a in p]
    diversity = -sum((mean * mean.clamp(min=1e-30).log()).sum() for mean in means) / 2
    return consistency, torch.as_tensor(sharpness), torch.as_tensor(diversity)
