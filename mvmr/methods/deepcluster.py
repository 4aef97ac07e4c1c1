"""DeepCluster v2: from each view of an image, the cluster of the image, clusters being found anew in every epoch.

Source: Caron et al., "Deep clustering for unsupervised learning of visual features" (2018); version 2 is that of
"Unsupervised learning of visual features by contrasting cluster assignments" (2020), section 4.1 and appendix D: the
classifier is the clusters' means themselves, so that clusters need no order to be learned again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.method import Method, Setting, Step
from mvmr.methods.parts.classes import check_classes, count_classes
from mvmr.methods.parts.crops import CropsConfig
from mvmr.methods.parts.dependence import effective_rank
from mvmr.methods.parts.heads import Prototypes, build_projector
from mvmr.methods.parts.kmeans import balance, kmeans

_CLUSTERS = 3000  # of the paper, for ImageNet
_ROWS = 4096  # projected at once


@dataclass(frozen=True, kw_only=True)
class DeepclusterConfig(CropsConfig):
    """The paper's temperature, projector, crops and number of clusterings."""

    has_classes: ClassVar[bool] = True

    name: Literal["deepcluster"] = "deepcluster"
    clusters: int = 0  # how many; 0: 3,000, or one to ten images where that is less [0, or 2 or more]
    heads: int = 3  # clusterings of the same projections, from other starts [1 or more]
    temperature: float = 0.1  # of the softmax: the lower, the sharper [above 0]
    projector: tuple[int, ...] = (2048, 128)  # widths of its layers [outputs, 1 or more each]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_classes("clusters", self.clusters)
        if self.heads < 1:
            raise MvmrError(f"[method] heads = {self.heads}: give 1 or more")
        if not self.temperature > 0:
            raise MvmrError(f"[method] temperature = {self.temperature}: must be above 0")
        if not self.projector:
            raise MvmrError("[method] projector = []: give its widths, such as 2048,128")

    def settle(self, images: int) -> Self:
        return replace(self, clusters=self.clusters or count_classes(_CLUSTERS, images))

    def check(self, batch_size: int, images: int) -> None:
        check_classes("clusters", self.clusters, images)


class Deepcluster(Method):
    """Encoder and projector, whose last layer are the means of the first clustering; and the clusters of each image."""

    projector: nn.Sequential
    assigned: Tensor  # int64 [heads, images]
    weights: Tensor  # float32 [heads, images]

    def __init__(self, config: DeepclusterConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.config = config
        width = config.projector[-1]
        means = [Prototypes(width, config.clusters).requires_grad_(False) for _ in range(config.heads)]
        self.projector = build_projector(setting.width, config.projector).append(means[0])
        self.others = nn.ModuleList(means[1:])
        self.register_buffer("assigned", torch.zeros(config.heads, setting.images, dtype=torch.int64))
        self.register_buffer("weights", torch.ones(config.heads, setting.images))

    @property
    def means(self) -> list[Prototypes]:
        """The means of each clustering."""
        return [self.projector[-1], *self.others]

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        c, index = self.config, views["index"]
        h = [self.features(views[spec.name]) for spec in c.views]
        with torch.autocast(h[0].device.type, enabled=False):
            z = [self.projector[:-1](features.float()) for features in h]
            terms = [
                self.weights[head, index]
                * F.cross_entropy(means(row) / c.temperature, self.assigned[head, index], reduction="none")
                for head, means in enumerate(self.means)
                for row in z
            ]
            loss = torch.stack(terms).mean()
        return Step({"cross_entropy": loss}, h[0], (h[0].detach().float(), self.means[0](z[0].detach())))

    @torch.no_grad()
    def before_epoch(self, epoch: int, features: Callable[[], Tensor]) -> None:
        """Cluster the projections of all images, `heads` times."""
        device = self.assigned.device
        self.projector.eval()
        z = torch.cat([self.projector[:-1](rows.to(device)).cpu() for rows in features().split(_ROWS)])
        self.projector.train()
        for head, prototypes in enumerate(self.means):
            means, assigned = kmeans(z, self.config.clusters, seed=epoch * self.config.heads + head)
            prototypes.weight.copy_(means)
            self.assigned[head] = assigned
            self.weights[head] = balance(assigned, self.config.clusters)

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
        """Effective rank of the features, and how many clusters the batch is taken for: 1 of either is a collapse."""
        h, logits = outputs
        return {"rank_h": effective_rank(h), "clusters": float(len(logits.argmax(1).unique()))}
