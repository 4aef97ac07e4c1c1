"""Histogram of oriented gradients, batched on the device of the images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Hog:
    """HOG with hard binning of unsigned angles, as scikit-image's ``hog(channel_axis=-1, block_norm="L2-Hys")``.

    Each pixel takes the gradient of the channel where it is strongest; a side that is not a multiple of ``cell``
    loses its last pixels.

    Source: Dalal and Triggs, "Histograms of oriented gradients for human detection" (2005).
    """

    bins: int = 24
    cell: int = 8  # pixels
    block: int = 2  # cells on a side of a normalised block; 1 where the image has but one cell

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, K] float32 in [0, 1], K = blocks down * across * block^2 * bins."""
        histograms = self._histograms(images)
        block = min(self.block, *histograms.shape[1:3])
        # [B, down, across, bins, block, block] -> [B, down, across, block * block * bins], cells before bins
        blocks = histograms.unfold(1, block, 1).unfold(2, block, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)
        clipped = _unit(blocks).clamp(max=0.2)
        return _unit(clipped).flatten(1).float()

    def _histograms(self, images: Tensor) -> Tensor:
        # float64: equal gradients down and across lie exactly on the edge of a bin (45 degrees), where float32 rounding
        # would decide the bin
        x = images.double()
        down, across = torch.zeros_like(x), torch.zeros_like(x)
        down[:, :, 1:-1] = x[:, :, 2:] - x[:, :, :-2]
        across[:, :, :, 1:-1] = x[:, :, :, 2:] - x[:, :, :, :-2]
        magnitude = torch.hypot(down, across)
        magnitude, strongest = magnitude.max(1, keepdim=True)
        down, across = down.gather(1, strongest)[:, 0], across.gather(1, strongest)[:, 0]
        degrees = torch.rad2deg(torch.atan2(down, across)).remainder(180.0)
        bins = (degrees / (180.0 / self.bins)).long().clamp(max=self.bins - 1)
        votes = magnitude[:, 0]
        return torch.stack([F.avg_pool2d(votes * (bins == k), self.cell) for k in range(self.bins)], dim=-1)


def _unit(blocks: Tensor) -> Tensor:
    return blocks / torch.sqrt(blocks.square().sum(-1, keepdim=True) + 1e-5**2)
