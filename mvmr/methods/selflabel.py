"""Self-Label: classes that the network is surest of, all of the same size, are what it learns; several times over.

Source: Asano, Rupprecht and Vedaldi, "Self-labelling via simultaneous clustering and representation learning" (2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.errors import MvmrError
from mvmr.methods.method import AUGMENTED, Method, MethodConfig, Setting, Step, ViewSpec
from mvmr.methods.parts.classes import check_classes, count_classes
from mvmr.methods.parts.dependence import effective_rank
from mvmr.methods.parts.sinkhorn import equal_partition

_CLASSES = 3000  # of the paper, for ImageNet


@dataclass(frozen=True, kw_only=True)
class SelflabelConfig(MethodConfig):
    """The paper's sharpness and number of heads."""

    has_classes: ClassVar[bool] = True

    name: Literal["selflabel"] = "selflabel"
    classes: int = 0  # in a head; 0: 3,000, or one to ten images where that is less [0, or 2 or more]
    heads: int = 10  # classifiers, each with classes of its own [1 or more]
    every: int = 1  # from one labelling to the next [epochs, 1 or more]
    sharpness: float = 25.0  # lambda: the higher, the nearer is the solution to the optimum, and the slower [above 0]

    def __post_init__(self) -> None:
        check_classes("classes", self.classes)
        for name in ("heads", "every"):
            if getattr(self, name) < 1:
                raise MvmrError(f"[method] {name} = {getattr(self, name)}: give 1 or more")
        if not self.sharpness > 0:
            raise MvmrError(f"[method] sharpness = {self.sharpness}: must be above 0")

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return (AUGMENTED,)

    def settle(self, images: int) -> Self:
        return replace(self, classes=self.classes or count_classes(_CLASSES, images))

    def check(self, batch_size: int, images: int) -> None:
        check_classes("classes", self.classes, images)


class Selflabel(Method):
    """Encoder and linear heads, the first of which is kept as projector; and the label of each image for each head."""

    projector: nn.Linear
    labels: Tensor  # int64 [heads, images]

    def __init__(self, config: SelflabelConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.config = config
        self.projector = nn.Linear(setting.width, config.classes)
        self.others = nn.ModuleList(nn.Linear(setting.width, config.classes) for _ in range(config.heads - 1))
        self.register_buffer("labels", torch.zeros(config.heads, setting.images, dtype=torch.int64))

    @property
    def heads(self) -> list[nn.Linear]:
        """The classifiers."""
        return [self.projector, *self.others]

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        h, index = self.features(views["augmented"]), views["index"]
        with torch.autocast(h.device.type, enabled=False):
            logits = [head(h.float()) for head in self.heads]
            terms = [F.cross_entropy(logit, self.labels[number, index]) for number, logit in enumerate(logits)]
        return Step({"cross_entropy": torch.stack(terms).mean()}, h, (h.detach().float(), logits[0].detach()))

    @torch.no_grad()
    def before_epoch(self, epoch: int, features: Callable[[], Tensor]) -> None:
        """Label all images anew, head by head: by the equal partition that is likeliest (equations 6 to 8)."""
        if epoch % self.config.every:
            return
        h = features()
        for number, head in enumerate(self.heads):
            log = F.log_softmax(F.linear(h, head.weight.cpu(), head.bias.cpu()), dim=1)
            self.labels[number] = equal_partition(log, self.config.sharpness)

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
        """Effective rank of the features, and how many classes the batch is taken for: 1 of either is a collapse."""
        h, logits = outputs
        return {"rank_h": effective_rank(h), "classes": float(len(logits.argmax(1).unique()))}
