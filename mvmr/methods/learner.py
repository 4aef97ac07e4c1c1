"""What is trained, in one module: an encoder with its projector and objective, or with a linear classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.methods.objective import Embeddings, Objective


class Learner(nn.Module):
    """What learns without labels: encoder, projector and the maps inside the objective, from images to loss."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, objective: Objective, preprocess: Preprocess):
        super().__init__()
        self.encoder, self.projector, self.objective = encoder, projector, objective
        self.normalise = Normalise(preprocess)

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] uint8 -> h [B, D]."""
        h: Tensor = self.encoder(self.normalise(images))
        return h

    def forward(
        self, original: Tensor, augmented: Tensor, targets: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Embeddings, Mapping[str, Tensor]]:
        """Both views, uint8, and the targets of this rank -> the loss by term; embeddings and targets of all ranks."""
        h, ha = self.features(original), self.features(augmented)
        z, za = self.projector(h), self.projector(ha)
        with torch.autocast(original.device.type, enabled=False):
            views = Embeddings(*(gather(t.float()) for t in (h, ha, z, za)))
            everyone = {name: gather(t.float()) for name, t in targets.items()}
            return self.objective(views, everyone), views, everyone

    def diagnose(
        self, views: Embeddings, targets: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, float]:
        """What the loss can't show, of a forward pass's embeddings and targets."""
        return self.objective.diagnose(views, targets, generator)


class Classifier(nn.Module):
    """What learns from labels: encoder and linear head, on the augmented views alone."""

    def __init__(self, encoder: nn.Module, head: nn.Linear, preprocess: Preprocess):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.normalise = Normalise(preprocess)

    def forward(
        self, original: Tensor, augmented: Tensor, targets: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Views, uint8, and the target ``label``, int64 [B] -> the loss by term; logits [B, C] and labels."""
        h, labels = self.encoder(self.normalise(augmented)), targets["label"]
        with torch.autocast(augmented.device.type, enabled=False):
            logits = self.head(h.float())
            return {"cross_entropy": F.cross_entropy(logits, labels)}, logits, labels

    @torch.no_grad()
    def diagnose(self, logits: Tensor, labels: Tensor, _: torch.Generator) -> dict[str, float]:
        """The accuracy in percent on the views of this rank, in training mode."""
        return {"top1": 100 * float((logits.argmax(1) == labels).float().mean())}


class Normalise(nn.Module):
    """[B, 3, H, W] uint8 -> float32 as the encoder takes it; has no weights and leaves no trace in a checkpoint."""

    mean: Tensor
    std: Tensor

    def __init__(self, preprocess: Preprocess):
        super().__init__()
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks, keeping gradients, so that N ranks of B compute the loss of one rank of N * B.

    The backward pass sums over ranks and DDP averages over them: together exactly the gradient of the global batch.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size())
        ]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.chunk(distributed.get_world_size())[distributed.get_rank()]
