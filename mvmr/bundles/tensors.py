"""Prepared pictures in torch: made into tensors, and normalised as `Preprocess.normalise` does it in numpy."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mvmr.bundles.preprocess import Preprocess


def channels_first(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """One picture or a batch, copied: uint8 [..., H, W, 3] -> uint8 [..., 3, H, W], contiguous, on the CPU."""
    return torch.from_numpy(np.moveaxis(pixels, -1, -3).copy())


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
