"""Local standard deviation: how busy the image is around each pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor


def local_std(images: Tensor) -> Tensor:
    """Population standard deviation of the 3 x 3 neighbourhood of every pixel, per channel; edges are repeated.

    Taken on differences from the centre pixel: with E[x^2] - E[x]^2 flat regions are lost to rounding in float32, but a
    window that holds a zero and a difference d has a variance of d^2 / 18 or more, so here rounding stays relative.

    Shapes:
        images: [B, C, H, W] in [0, 1] -> [B, C * H * W] in [0, 0.5].
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    total, squares = torch.zeros_like(images), torch.zeros_like(images)
    for y in range(3):
        for x in range(3):
            difference = padded[:, :, y : y + height, x : x + width] - images
            total += difference
            squares += difference.square()
    return (squares / 9 - (total / 9).square()).clamp(min=0).sqrt().flatten(1)
