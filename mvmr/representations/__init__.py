"""Fixed representations of the original view: what the student's projection is made to depend on.

A hand-crafted representation is a function of images; a teacher (``mvmr.distillation``) has the same interface.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from inspect import isfunction
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from mvmr.bundles.preprocess import Preprocess
from mvmr.bundles.tensors import channels_first
from mvmr.data.image_set import ImageSet
from mvmr.errors import unknown
from mvmr.representations.hog import Hog
from mvmr.representations.local_std import local_std
from mvmr.representations.pixels import pixels
from mvmr.representations.scattering import Scattering


class Representation(Protocol):
    """A fixed description of images: hand-crafted, a teacher's, or a student's when it is evaluated."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str:
        """Hex hash of everything its values depend on but the image: weights, parameters, preprocessing."""
        ...

    def prepare(self, image: Image.Image) -> Tensor:
        """One RGB image -> [C, H, W], as the representation wants it."""
        ...

    def __call__(self, batch: Tensor) -> Tensor:
        """[B, C, H, W] prepared -> [B, K] float32, on the device of the batch; row i depends on image i alone."""
        ...


@runtime_checkable
class Stored(Protocol):
    """A representation of which there are rows already, for images that it knows."""

    def batches(self, images: ImageSet, start: int) -> Iterable[npt.NDArray[np.floating]]:
        """Rows of the images from number `start` on, in order, [b, K] at a time.

        Raises: MvmrError: an image has none.
        """
        ...


class Pretrained(Representation, Protocol):
    """A representation that was learned elsewhere: a teacher's."""

    @property
    def weights(self) -> str:
        """Where its weights come from, for people: a tag or a file."""
        ...


# By name, from the side of the images in pixels.
HAND_CRAFTED: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {
    "pixels": lambda size: pixels,
    "scattering": Scattering,
    "hog": lambda size: Hog(),
    "local_std": lambda size: local_std,
}
# Not fixed: an augmentation of the original view, independent per image and epoch, so it is never cached.
AUGMENTED_PIXELS = "augmented_pixels"


@dataclass(frozen=True)
class HandCrafted:
    """A hand-crafted representation of preprocessed, unnormalised images.

    Args:
        function: [B, 3, H, W] float32 in [0, 1] -> [B, K] float32.
    """

    name: str
    preprocess: Preprocess
    function: Callable[[Tensor], Tensor]

    @property
    def parameters(self) -> str:
        """The function's parameters in words; a plain function has none (its repr would be a memory address)."""
        return "" if isfunction(self.function) else repr(self.function)

    @property
    def identity(self) -> str:
        description = json.dumps([self.name, self.parameters, asdict(self.preprocess)], sort_keys=True)
        return hashlib.sha256(description.encode()).hexdigest()

    def prepare(self, image: Image.Image) -> Tensor:
        return channels_first(self.preprocess.image(image))

    def __call__(self, batch: Tensor) -> Tensor:
        """[B, 3, H, W] uint8 -> [B, K] float32."""
        return self.function(batch.float() / 255)


def hand_crafted(name: str, preprocess: Preprocess) -> HandCrafted:
    """The hand-crafted representation called ``name``, of images preprocessed by ``preprocess``.

    Raises:
        MvmrError: there is none of that name.
    """
    if name not in HAND_CRAFTED:
        raise unknown("representation", name, (*HAND_CRAFTED, AUGMENTED_PIXELS))
    return HandCrafted(name, preprocess, HAND_CRAFTED[name](preprocess.crop))
