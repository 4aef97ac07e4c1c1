"""The image itself."""

from torch import Tensor


def pixels(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, 3 * H * W], unchanged."""
    return images.flatten(1)
