"""Learning from labels: cross-entropy of a linear head on the features, encoder and head trained together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.methods.method import AUGMENTED, Method, MethodConfig, Step, ViewSpec


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(MethodConfig):
    """Nothing to choose: what `mvmr finetune` does."""

    name: Literal["supervised"] = "supervised"

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return (AUGMENTED,)

    @property
    def targets(self) -> tuple[str, ...]:
        return ("label",)


class Supervised(Method):
    """Encoder and linear head; the target ``label`` is int64 [B].

    weights: of the classes, float32 [C]; None weighs every image alike
    """

    weights: Tensor | None

    def __init__(
        self, encoder: nn.Module, head: nn.Linear, preprocess: Preprocess, weights: Tensor | None = None
    ) -> None:
        super().__init__(encoder, preprocess)
        self.head = head
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        h, labels = self.features(views["augmented"]), targets["label"]
        with torch.autocast(labels.device.type, enabled=False):
            logits = self.head(h.float())
            return Step({"cross_entropy": F.cross_entropy(logits, labels, self.weights)}, h, (logits, labels))

    @torch.no_grad()
    def diagnose(self, outputs: Any, generator: torch.Generator) -> dict[str, float]:
        """The accuracy in percent on the views of this rank, in training mode."""
        logits, labels = outputs
        return {"top1": 100 * float((logits.argmax(1) == labels).float().mean())}
