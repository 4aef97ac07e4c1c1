"""The MV-MR objective: invariance and variance (L1), dependence between views (L2) and on representations (L3).

With h the features, z the projection, a tilde for the augmented view and z*_k the k-th fixed representation of the
original view::

    L1 = invariance * MSE(z, z~) + variance * [v(z) + v(z~)],   v(z) = mean_j max(0, gamma - sqrt(Var(z_j) + eps))
    L2 = dependence * (1 - dCor(z~, z))
    L3 = sum_k representations[k] * (1 - dCor(z~, z*_k))

One more term, zero in the paper's objective, was added by measurement (docs/method.md)::

    decorrelation * [c(z) + c(z~)],   c(z) = sum of squared off-diagonal covariances / D   (VICReg, equation 3)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvmr.errors import MvmrError
from mvmr.methods.parts.dependence import Estimator, centred_distances, correlate, effective_rank, permutation_null
from mvmr.methods.parts.moments import covariance_penalty, hinge


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the terms; the defaults are the paper's, without any representation."""

    invariance: float = 1.0  # lambda: weight of MSE(z, z~) [0 or more]
    variance: float = 1.0  # mu: weight of v(z) and v(z~) [0 or more]
    gamma: float = 1.0  # the standard deviation each dimension of z must reach [above 0]
    eps: float = 1e-4  # inside the square root of v(z) [above 0]
    dependence: float = 1.0  # alpha: weight of 1 - dCor of both views [0 or more]
    representations: dict[str, float] = field(default_factory=dict)  # beta_k: weights of 1 - dCor, by name [0 or more]
    decorrelation: float = 0.0  # weight of the squared off-diagonal covariances, VICReg's third term [0 or more]
    space: Literal["projection", "features"] = "projection"  # what the terms in z are taken on
    estimator: Estimator = "biased"  # of dCor: biased as in the paper, or unbiased, of its square

    def __post_init__(self) -> None:
        weights = {"invariance": self.invariance, "variance": self.variance, "dependence": self.dependence}
        weights |= {"decorrelation": self.decorrelation}
        weights |= {f"representations.{name}": weight for name, weight in self.representations.items()}
        if negative := [name for name, weight in weights.items() if not weight >= 0]:
            raise MvmrError(f"[method] {negative[0]} = {weights[negative[0]]}: a weight must be 0 or more")
        if not any(weights.values()):
            raise MvmrError("[method] every weight is 0: there is nothing to learn; give at least one")

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the representations that some term needs."""
        return tuple(name for name, weight in self.representations.items() if weight)


class Objective:
    """The loss of a batch."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def __call__(self, views: Embeddings, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every weighted term by name; the loss is their sum.

        Shapes:
            targets: name -> [B, K] float, the representation of the original view.
            returns: name -> scalar float32.
        """
        c = self.config
        z, za = views.space(c.space)
        terms: dict[str, Tensor] = {}
        if c.invariance:
            terms["invariance"] = c.invariance * F.mse_loss(z, za)
        if c.variance:
            terms["variance"] = c.variance * (hinge(z, c.gamma, c.eps) + hinge(za, c.gamma, c.eps))
        if c.decorrelation:
            terms["decorrelation"] = c.decorrelation * (covariance_penalty(z) + covariance_penalty(za))
        if c.dependence or any(c.representations.values()):
            a = centred_distances(za, c.estimator)
            if c.dependence:
                terms["dependence"] = c.dependence * (1 - correlate(a, centred_distances(z, c.estimator), c.estimator))
            for name, weight in c.representations.items():
                if weight:
                    b = centred_distances(targets[name], c.estimator)
                    terms[f"dcor.{name}"] = weight * (1 - correlate(a, b, c.estimator))
        return terms

    @torch.no_grad()
    def diagnose(
        self, views: Embeddings, targets: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, float]:
        """What the loss can't show: both estimators of dCor, the null beside each, effective ranks, mean spread."""
        z, za = views.space(self.config.space)
        report = {
            "rank_h": effective_rank(views.h),
            "rank_z": effective_rank(z),
            "std_h": float(views.h.std(0).mean()),
            "std_z": float(z.std(0).mean()),
        }
        estimators: tuple[Estimator, ...] = ("biased", "unbiased") if len(za) >= 4 else ("biased",)
        for estimator in estimators:
            a = centred_distances(za, estimator)
            for name, target in {"views": z, **targets}.items():
                b = centred_distances(target, estimator)
                report[f"{estimator}.{name}"] = float(correlate(a, b, estimator))
                report[f"{estimator}.{name}.null"] = float(permutation_null(a, b, estimator, generator))
        return report


class Embeddings(NamedTuple):
    """Features h and projections z of both views, each [B, D] float32."""

    h: Tensor
    h_augmented: Tensor
    z: Tensor
    z_augmented: Tensor

    def space(self, name: Literal["projection", "features"]) -> tuple[Tensor, Tensor]:
        """(original, augmented) in the named space."""
        return (self.z, self.z_augmented) if name == "projection" else (self.h, self.h_augmented)
