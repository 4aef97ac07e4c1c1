"""A network that follows another as a moving average of its weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def make_follower(module: M) -> M:
    """A copy of a network that gets no gradient; it begins with the same weights."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(follower: nn.Module, module: nn.Module, momentum: float) -> None:
    """Parameters <- momentum * parameters + (1 - momentum) * those of `module`; batch-norm statistics stay its own."""
    for average, parameter in zip(follower.parameters(), module.parameters(), strict=True):
        average.lerp_(parameter, 1 - momentum)


@torch.no_grad()
def encode_in_halves(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a slow network with batch norms makes of a batch: every second image, then the others; in their order.

    Its batch norms would else see the same images as those of the fast one, and give both views of an image statistics
    by which they can be told from past batches without being understood. MoCo deals images out to other GPUs for this
    (He et al. 2020, section 3.3); as batches come in a random order, halves do on one.
    """
    if len(images) < 4:
        return network(images)
    halves = [network(images[start::2]) for start in (0, 1)]
    rows = halves[0].new_empty(len(images), *halves[0].shape[1:])
    rows[::2], rows[1::2] = halves
    return rows


def cosine_momentum(start: float, step: int, steps: int) -> float:
    """From `start` at step 0 to 1 at the last, by half a cosine (BYOL, section 3.3)."""
    return 1 - (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2
