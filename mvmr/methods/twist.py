"""TWIST: all views of an image are sure of one class, and all classes are used alike.

Source: Wang et al., "Self-supervised learning by estimating twin class distributions" (2021; IEEE TIP 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from mvmr.methods.parts.gathering import gather
from mvmr.methods.parts.heads import build_projector
from mvmr.methods.parts.momentum import cosine_momentum, follow, make_follower

_CLASSES = 4096  # of the paper, for ImageNet


@dataclass(frozen=True, kw_only=True)
class TwistConfig(CropsConfig):
    """The paper's for ResNets; for transformers it has sharpness 0.4, momentum 0.996, labelling 0 and 6 local crops."""

    has_classes: ClassVar[bool] = True

    name: Literal["twist"] = "twist"
    classes: int = 0  # how many; 0: 4,096, or one to ten images where that is less [0, or 2 or more]
    sharpness: float = 1.0  # alpha: weight of the entropy of each view [0 or more]
    diversity: float = 1.0  # beta: weight of the entropy of their mean [0 or more]
    hidden: tuple[int, ...] = (4096, 4096)  # widths between features and classes [outputs, 1 or more each]
    momentum: float = 0.0  # of a slow network to be consistent with, growing to 1; 0: with each other [0 to 1]
    labelling: float = 0.06  # at last, in which views learn the class of the surest [share of all steps, 0 to 1]
    # that has a label then, at its beginning and its end [share of the batch, above 0, up to 1]
    confident: tuple[float, float] = (0.5, 0.6)
    local: int = 12
    global_area: tuple[float, float] | None = (0.4, 1.0)
    local_area: tuple[float, float] = (0.05, 0.4)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_classes("classes", self.classes)
        for name in ("sharpness", "diversity"):
            if not getattr(self, name) >= 0:
                raise MvmrError(f"[method] {name} = {getattr(self, name)}: a weight must be 0 or more")
        for name in ("momentum", "labelling"):
            if not 0 <= getattr(self, name) <= 1:
                raise MvmrError(f"[method] {name} = {getattr(self, name)}: must lie between 0 and 1")
        if not all(0 < share <= 1 for share in self.confident):
            raise MvmrError(f"[method] confident = {list(self.confident)}: give two shares above 0 and up to 1")

    def settle(self, images: int) -> Self:
        return replace(self, classes=self.classes or count_classes(_CLASSES, images))

    def check(self, batch_size: int, images: int) -> None:
        check_classes("classes", self.classes, images)


class Twist(Method):
    """Encoder, and the projector that tells classes: its last layer is a batch norm, as logits else collapse."""

    projector: nn.Module
    progress: Tensor  # share of the steps that are done

    def __init__(self, config: TwistConfig, encoder: nn.Module, setting: Setting) -> None:
        super().__init__(encoder, setting.preprocess)
        self.config = config
        self.projector = build_projector(setting.width, (*config.hidden, config.classes), last_norm=True)
        self.slow = make_follower(nn.Sequential(encoder, self.projector)) if config.momentum else None
        self.register_buffer("progress", torch.zeros(()))

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        c, progress = self.config, float(self.progress)
        images = [self.normalise(views[spec.name]) for spec in c.views]
        h = [self.encoder(view) for view in images]
        slow = None
        if self.slow is not None:
            with torch.no_grad():
                slow = [gather(self.slow(view).float()) for view in images[: c.crops]]
        with torch.autocast(h[0].device.type, enabled=False):
            logits = [gather(self.projector(features.float())) for features in h]
            if progress >= 1 - c.labelling:
                done = (progress - 1 + c.labelling) / c.labelling
                share = c.confident[0] + done * (c.confident[1] - c.confident[0])
                losses = {"labelling": labelling_loss(logits, slow or logits[: c.crops], share)}
            else:
                consistency, sharpness, diversity = twin_terms(logits, c.crops, slow)
                losses = {
                    "consistency": consistency, "sharpness": c.sharpness * sharpness,
                    "diversity": -c.diversity * diversity,
                }  # fmt: skip
        return Step(losses, h[0], (h[0].detach().float(), logits[0].detach()))

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        self.progress.fill_(step / steps)
        if self.slow is not None:
            momentum = cosine_momentum(self.config.momentum, step, steps)
            follow(self.slow, nn.Sequential(self.encoder, self.projector), momentum)

    @torch.no_grad()
    def diagnose(self, outputs: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
        """Effective rank of the features, and how many classes the batch takes: 1 of either is a collapse."""
        h, logits = outputs
        return {"rank_h": effective_rank(h), "classes": float(len(logits.argmax(1).unique()))}


def twin_terms(
    logits: Sequence[Tensor], crops: int, slow: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Means over pairs of views, a global one and any other, of three terms (equations 1 to 5); p_b, q_b softmaxes:

        consistency  KL(p_b || q_b) and KL(q_b || p_b), mean over rows and both
        sharpness    entropy of p_b, mean over rows: 0 where each is sure
        diversity    entropy of the mean of all p_b: log C where classes are used alike

    The loss is consistency + alpha * sharpness - beta * diversity; its least value is -beta log C. With a slow network,
    consistency is KL(slow p_b of a global view || q_b of another view) alone, and the others are means over views.

    Shapes: logits [B, C] float32 of each view, `crops` global ones first; slow: of the global ones -> three scalars.
    """
    logs = [F.log_softmax(view, dim=1) for view in logits]
    p = [log.exp() for log in logs]
    sharpness = torch.stack([-(a * log).sum(1).mean() for a, log in zip(p, logs, strict=True)])
    means = [a.mean(0) for a in p]
    diversity = torch.stack([-(mean * mean.clamp(min=1e-30).log()).sum() for mean in means])
    if slow is not None:
        targets = [F.log_softmax(view, dim=1) for view in slow]
        pairs = [(i, j) for i in range(crops) for j in range(len(logits)) if i != j]
        divergences = [(targets[i].exp() * (targets[i] - logs[j])).sum(1).mean() for i, j in pairs]
        return torch.stack(divergences).mean(), sharpness.mean(), diversity.mean()
    pairs = [(i, j) for i in range(crops) for j in range(i + 1, len(logits))]
    consistency = torch.stack([((p[i] - p[j]) * (logs[i] - logs[j])).sum(1).mean() / 2 for i, j in pairs]).mean()
    views = torch.tensor(pairs).flatten()
    return consistency, sharpness[views].mean(), diversity[views].mean()


def labelling_loss(logits: Sequence[Tensor], references: Sequence[Tensor], share: float) -> Tensor:
    """Cross-entropy with the class of an image's surest global view, of its other views, where it is sure enough.

    Only the `share` of the images that are surest have a label (section 3.4).

    Shapes: logits [B, C] of each view, global ones first; references [B, C] of the global ones -> scalar.
    """
    sure, classes = torch.stack([F.softmax(view.detach(), dim=1) for view in references]).max(2)  # [crops, B]
    best, surest = sure.max(0)
    labels = classes.gather(0, surest[None])[0]
    labelled = torch.zeros_like(best)
    labelled[best.topk(max(1, int(share * len(best)))).indices] = 1
    weights = torch.stack([labelled * (surest != number) for number in range(len(logits))])
    losses = torch.stack([F.cross_entropy(view, labels, reduction="none") for view in logits])
    return (weights * losses).sum() / weights.sum()
