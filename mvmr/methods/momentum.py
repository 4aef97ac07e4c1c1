"""A network that follows another as a moving average of its weights."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def make_follower(module: M) -> M:
    """A copy of a network that gets no gradient; it begins with the same weights."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(follower: nn.Module, module: nn.Module, momentum: float) -> None:
    """Parameters <- momentum * parameters + (1 - momentum) * those of `module`; batch-norm statistics stay its own."""
    for average, parameter in zip(follower.parameters(), module.parameters(), strict=True):
        average.lerp_(parameter, 1 - momentum)


def cosine_momentum(start: float, step: int, steps: int) -> float:
    """From `start` at step 0 to 1 at the last, by half a cosine (BYOL, section 3.3)."""
    return 1 - (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2
