"""MV-MR's third term beside any method: features of an augmented view depend on fixed representations of the original.

    sum_k representations[k] * (1 - dCor(h~, z*_k)),   z*_k the k-th representation of the original view

Source: Kinakh, Drozdova, Voloshynovskiy, "MV-MR: multi-views and multi-representations for self-supervised learning and
knowledge distillation" (Entropy 2024), equation 8 in the space of the features, which every method has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mvmr.errors import MvmrError
from mvmr.methods.parts.dependence import Estimator, centred_distances, correlate
from mvmr.methods.parts.gathering import gather
from mvmr.representations import AUGMENTED_PIXELS


@dataclass(frozen=True, kw_only=True)
class RegulariserConfig:
    """Weights of the representations, by name; none: the method's own loss alone."""

    # weights of 1 - dCor, by name of a representation or teacher; empty: the method's loss alone [0 or more each]
    representations: dict[str, float] = field(default_factory=dict)
    estimator: Estimator = "biased"  # of dCor: biased as in the paper, or unbiased, of its square

    def __post_init__(self) -> None:
        for name, weight in self.representations.items():
            if not weight >= 0:
                raise MvmrError(f"[objective] representations.{name} = {weight}: a weight must be 0 or more")
        if AUGMENTED_PIXELS in self.representations:
            raise MvmrError(f"[objective] representations.{AUGMENTED_PIXELS}: that is one of method mvmr alone")

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the representations that it needs."""
        return tuple(name for name, weight in self.representations.items() if weight)

    @property
    def smallest_batch(self) -> int:
        """Images, over all devices; 0 where there is no term."""
        return (4 if self.estimator == "unbiased" else 2) if self.targets else 0


def regularise(config: RegulariserConfig, h: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weighted terms by name, over the batch of all devices.

    Shapes: h [B, D], targets [B, K] by name, of this device -> scalars float32.
    """
    if not config.targets:
        return {}
    with torch.autocast(h.device.type, enabled=False):
        a = centred_distances(gather(h.float()), config.estimator)
        terms = {}
        for name in config.targets:
            b = centred_distances(gather(targets[name].float()), config.estimator)
            terms[f"dcor.{name}"] = config.representations[name] * (1 - correlate(a, b, config.estimator))
        return terms
