"""Batch norms folded into the convolutions before them: what is served needs none of its own."""

from __future__ import annotations

import copy

from torch import nn
from torch.fx.experimental.optimization import fuse


def plain_copy(encoder: nn.Module) -> nn.Module:
    """A float32 copy on the CPU, for inference."""
    return copy.deepcopy(encoder).cpu().float().eval().requires_grad_(False)


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """The same network with its batch norms folded; changes what it is given.

    Raises: ValueError for batch norms that follow no convolution.
    """
    folded: nn.Module = fuse(network, inplace=True)
    if unfolded := [name for name, part in folded.named_modules() if isinstance(part, nn.BatchNorm2d)]:
        raise ValueError(f"batch norms that follow no convolution can't be folded: {', '.join(unfolded)}")
    return folded
