"""What a method of learning is: the contract between the trainer, which knows no method, and each of them.

A method is one file with its settings on top. `mvmr.methods.table` lists them; docs and tests loop over that table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from mvmr.bundles.preprocess import Preprocess
from mvmr.bundles.tensors import Normalise
from mvmr.methods.parts.standardising import Rows


@dataclass(frozen=True)
class ViewSpec:
    """A view of each image, by the name under which `Method.forward` gets it.

    policy: of augmentation, a name or steps of mvmr.training.views; None: the recipe's
    scale: of its side to that of the others, 1 or less
    area: of a random crop, as shares of the image's; None: 8 to 100 %
    """

    name: str
    policy: str | None = None
    scale: float = 1.0
    area: tuple[float, float] | None = None


ORIGINAL = ViewSpec("original", "none")  # resized and cropped by the bundle's preprocessing, as it will be served
AUGMENTED = ViewSpec("augmented")
PAIR = (ViewSpec("first"), ViewSpec("second"))  # two augmented ones


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Settings of a method, the `[method]` table of a recipe; every method's own begin with ``name``."""

    smallest_batch: ClassVar[int] = 2  # images, over all devices
    has_classes: ClassVar[bool] = False  # whether the projector's outputs are logits of classes that it has found
    weighted: ClassVar[tuple[str, ...]] = ()  # settings that are weights by the name of a target

    name: str  # which method it is; the other keys are its settings

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        """The views it learns from; those that are augmented are independent of each other."""
        return (ORIGINAL, AUGMENTED)

    def settle(self, images: int) -> Self:
        """The same with what was left to the number of images decided, as it is written into the bundle."""
        return self

    def check(self, batch_size: int, images: int) -> None:
        """Refuse a size of batches, over all devices, or a number of images that it can't learn from.

        Raises: MvmrError, with the numbers.
        """

    @property
    def targets(self) -> tuple[str, ...]:
        """Representations of the original view that it learns from, teachers among them."""
        return ()

    @property
    def stored_targets(self) -> tuple[str, ...]:
        """Those of `targets` of which it must have the rows of all images."""
        return ()


class Setting(NamedTuple):
    """What a method is built for.

    width: of the encoder's features; images: how many there are to learn from
    rows: of all images, float32 [N, K], of every one of `stored_targets`, by name
    """

    width: int
    preprocess: Preprocess
    images: int
    rows: Mapping[str, Rows]


class Step(NamedTuple):
    """What a forward pass gives.

    losses: the terms of the loss by name, scalars float32 over the batch of all devices; their sum is minimised
    h: features of one augmented view, [B, D] of this device, with their gradient
    outputs: whatever `Method.diagnose` wants to see of it
    """

    losses: dict[str, Tensor]
    h: Tensor
    outputs: Any


class Method(nn.Module):
    """What is trained: an encoder, which is kept and served, and all that learning needs beside it.

    All that it remembers is a parameter or a buffer, so that checkpoints, resuming and several devices need nothing
    of their own. What is not trained by gradients has ``requires_grad`` off.

    projector: kept in the bundle beside the encoder, if there is one
    """

    encoder: nn.Module
    projector: nn.Module | None

    def __init__(self, encoder: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, None
        self.normalise = Normalise(preprocess)

    def features(self, images: Tensor) -> Tensor:
        """h of images: uint8 [B, 3, S, S] -> [B, D]."""
        h: Tensor = self.encoder(self.normalise(images))
        return h

    def forward(self, views: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Step:
        """One batch.

        Shapes: views uint8 [B, 3, S, S] by name, of this device; targets [B, K] by name, of this device.
        """
        raise NotImplementedError

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Called after each optimiser step, `step` from 1 to `steps`: moving averages, queues, prototypes."""

    @torch.no_grad()
    def before_epoch(self, epoch: int, features: Callable[[], Tensor]) -> None:
        """Called before the first step of each epoch, from 0 on, on every device.

        features: computes those of all original images as they are now, [N, D] float32 on the CPU
        """

    @torch.no_grad()
    def diagnose(self, outputs: Any, generator: torch.Generator) -> dict[str, float]:
        """What the loss can't show, by name, of the outputs of one forward pass; chance comes from `generator`."""
        return {}
