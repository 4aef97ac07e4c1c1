"""The objective under observation, and variants of it that mvmr itself does not have; for benchmarks/recipes.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvmr.methods.objective import Embeddings, Objective, ObjectiveConfig


class Observed(Objective):
    """`Objective` that also reports how its terms pull at the features.

    steps: of the whole run
    unit: dCor is taken on features of length 1
    ramp: the dCor terms fade ``in`` or ``out``, linearly over the run
    one_scale: regressed targets are divided by one number, not each dimension by its own deviation
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        feature_dim: int,
        statistics: Mapping[str, tuple[Tensor, Tensor]],
        *,
        steps: int,
        unit: bool = False,
        ramp: Literal["in", "out"] | None = None,
        one_scale: bool = False,
    ) -> None:
        if one_scale:
            statistics = {
                name: (mean, std.square().mean().sqrt().expand_as(std)) for name, (mean, std) in statistics.items()
            }
        super().__init__(config, feature_dim, statistics)
        self.steps, self.unit, self.ramp, self.step = steps, unit, ramp, 0

    def forward(self, views: Embeddings, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        terms = self._terms(views, targets)
        self.step += 1
        return terms

    def _terms(self, views: Embeddings, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.unit:
            lengths = views._replace(h=F.normalize(views.h), h_augmented=F.normalize(views.h_augmented))
            regressed = super().forward(views, targets)
            terms = super().forward(lengths, targets)
            terms |= {name: term for name, term in regressed.items() if name.startswith("regression")}
        else:
            terms = super().forward(views, targets)
        done = self.step / self.steps
        share = {"in": done, "out": 1 - done, None: 1.0}[self.ramp]
        return {name: term * share if name.startswith("dcor") else term for name, term in terms.items()}

    @torch.no_grad()
    def diagnose(self, views: Embeddings, targets: Mapping[str, Tensor], generator: Any) -> dict[str, float]:
        """As `Objective.diagnose`, with the length of each term's gradient in the features, and their angle."""
        report = super().diagnose(views, targets, generator)
        with torch.enable_grad():
            leaves = Embeddings(*(each.detach().requires_grad_() for each in views))
            gradients = {}
            for name, term in self._terms(leaves, targets).items():
                found = torch.autograd.grad(term, (leaves.h, leaves.h_augmented), retain_graph=True, allow_unused=True)
                gradients[name] = (
                    torch.cat([g.flatten() for g in found if g is not None])
                    if any(g is not None for g in found)
                    else torch.zeros(1)
                )
        return (
            report
            | {f"pull.{name}": float(gradient.norm()) for name, gradient in gradients.items()}
            | _angle(gradients)
        )


def _angle(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Cosine between what the regression and what the teacher's dependence do to the features of the augmented view."""
    regression, dcor = gradients.get("regression.teacher"), gradients.get("dcor.teacher")
    if regression is None or dcor is None:
        return {}
    return {"pull.cosine": float(F.cosine_similarity(regression[-len(dcor) :], dcor, dim=0))}
