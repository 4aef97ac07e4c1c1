"""DeeperCluster: how a view has been turned and which cluster its image is of, and then which cluster within that.

Source: Caron et al., "Unsupervised pre-training of image features on non-curated data" (2019), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.method import AUGMENTED, Method, MethodConfig, Setting, Step, ViewSpec
from mvmr.methods.parts.classes import check_classes, count_classes
from mvmr.methods.parts.dependence import effective_rank
from mvmr.methods.parts.gathering import first_row, world_size
from mvmr.methods.parts.kmeans import balance, kmeans

_ROTATIONS = 4  # by 0, 90, 180 and 270 degrees
_SUBCLUSTERS = 20_000  # within each cluster, as in the paper, for 96 million images


@dataclass(frozen=True, kw_only=True)
class DeeperclusterConfig(MethodConfig):
    """The paper's four clusters, which with four rotations are 16 super-classes, and its pace."""

    name: Literal["deepercluster"] = "deepercluster"
    clusters: int = 4  # how many; each with each of four rotations is a super-class [2 or more]
    subclusters: int = 0  # in a cluster; 0: 20,000, or one to ten images where that is less [0, or 2 or more]
    every: int = 3  # from one clustering to the next [epochs, 1 or more]

    def __post_init__(self) -> None:
        if self.clusters < 2:
            raise MvmrError(f"[method] clusters = {self.clusters}: give 2 or more")
        check_classes("subclusters", self.subclusters)
        if self.every < 1:
            raise MvmrError(f"[method] every = {self.every}: give a number of epochs, 1 or more")

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return (AUGMENTED,)

    def settle(self, images: int) -> Self:
        return replace(self, subclusters=self.subclusters or count_classes(_SUBCLUSTERS, images // self.clusters))

    def check(self, batch_size: int, images: int) -> None:
        if self.clusters * self.subclusters > images:
            raise MvmrError(
                f"[method] clusters = {self.clusters} with subclusters = {self.subclusters} each are more than the "
                f"{images} images: give fewer"
            )


class Deepercluster(Method):
    """Encoder, a classifier of super-classes and one within each; and what clusters each image has."""

    cluster: Tensor  # int64 [images]
    subcluster: Tensor  # int64 [images], within its cluster
    weights: Tensor  # float32 [images]
    steps: Tensor  # that are done

    def __init__(self, config: DeeperclusterConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.config = config
        superclasses = config.clusters * _ROTATIONS
        self.outer = nn.Linear(setting.width, superclasses)  # V
        self.inner = nn.Linear(setting.width, superclasses * config.subclusters)  # W_s, one after the other
        self.register_buffer("cluster", torch.zeros(setting.images, dtype=torch.int64))
        self.register_buffer("subcluster", torch.zeros(setting.images, dtype=torch.int64))
        self.register_buffer("weights", torch.ones(setting.images))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        index, images = views["index"], views["augmented"]
        turns = self._draw_turns(len(images)).to(images.device)
        h = self.features(turn(images, turns))
        with torch.autocast(h.device.type, enabled=False):
            outer, inner = self.outer(h.float()), self.inner(h.float())
            superclass = self.cluster[index] * _ROTATIONS + turns
            losses = hierarchical_loss(outer, inner, superclass, self.subcluster[index], self.weights[index])
        return Step(losses, h, (h.detach().float(), outer.detach(), superclass))

    def _draw_turns(self, count: int) -> Tensor:
        """Quarter turns of each image of this rank, other ones in every step."""
        generator = torch.Generator().manual_seed(int(self.steps))
        start = first_row(count)
        return torch.randint(_ROTATIONS, (count * world_size(),), generator=generator)[start : start + count]

    @torch.no_grad()
    def before_epoch(self, epoch: int, features: Callable[[], Tensor]) -> None:
        """Cluster all images, then each cluster; and forget the classifiers, for they knew other classes."""
        c = self.config
        if epoch % c.every:
            return
        h = features()
        h = h - h.mean(0)
        _, cluster = kmeans(h, c.clusters, seed=epoch)
        subcluster = torch.zeros_like(cluster)
        for number in range(c.clusters):
            rows = (cluster == number).nonzero()[:, 0]
            if len(rows):
                subcluster[rows] = kmeans(h[rows], min(c.subclusters, len(rows)), seed=epoch)[1]
        self.cluster.copy_(cluster)
        self.subcluster.copy_(subcluster)
        self.weights.copy_(balance(cluster * c.subclusters + subcluster, c.clusters * c.subclusters))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(epoch)
            for layer in (self.outer, self.inner):
                layer.load_state_dict(nn.Linear(layer.in_features, layer.out_features).state_dict())

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        self.steps.fill_(step)

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
        """Effective rank of the features: 1 is a collapse; accuracy of super-classes and of rotations, in percent."""
        h, outer, superclass = outputs
        predicted = outer.argmax(1)
        turned = (predicted % _ROTATIONS == superclass % _ROTATIONS).float()
        return {
            "rank_h": effective_rank(h),
            "superclass": 100 * float((predicted == superclass).float().mean()),
            "rotation": 100 * float(turned.mean()),
        }


def turn(images: Tensor, turns: Tensor) -> Tensor:
    """Each image turned by so many quarters, anti-clockwise; uint8 [B, 3, S, S], int64 [B] of 0 to 3."""
    out = images.clone()
    for quarter in range(1, _ROTATIONS):
        out[turns == quarter] = images[turns == quarter].rot90(quarter, dims=(2, 3))
    return out


def hierarchical_loss(
    outer: Tensor, inner: Tensor, superclass: Tensor, subclass: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Cross-entropy of the super-class, and of the sub-class by the classifier of that super-class alone (eq. 5).

    Shapes: outer [B, S], inner [B, S * K], superclass and subclass int64 [B], weights [B] -> two scalars.
    """
    rows = torch.arange(len(outer), device=outer.device)
    within = inner.view(len(outer), outer.shape[1], -1)[rows, superclass]
    return {
        "superclass": (weights * F.cross_entropy(outer, superclass, reduction="none")).mean(),
        "subclass": (weights * F.cross_entropy(within, subclass, reduction="none")).mean(),
    }
