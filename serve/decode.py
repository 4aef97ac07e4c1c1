"""From the bytes of one image file to the pixels an engine takes, or the reason why not."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from mvmr.data import decoding
from mvmr.preprocess import Preprocess

MAX_PIXELS = 50_000_000


@dataclass(frozen=True)
class Prepared:
    """An image ready for the engine.

    pixels: uint8 [S, S, 3] RGB, resized and cropped by the bundle's preprocessing; width, height: the file's, in pixels
    """

    pixels: npt.NDArray[np.uint8]
    width: int
    height: int


@dataclass(frozen=True)
class Rejected:
    """Why an image has no embedding: a stable code for programs, and words for people.

    code: ``empty``, ``not-an-image``, ``too-many-pixels`` or ``undecodable``.
    """

    code: str
    reason: str


def prepare(data: bytes, preprocess: Preprocess, *, max_pixels: int = MAX_PIXELS) -> Prepared | Rejected:
    """Decode the file `data` (the first frame of an animation) and resize and crop it as in training.

    How many pixels it has is read from its header, before anything is decoded.
    """
    if not data:
        return Rejected("empty", "no bytes at all")
    try:
        with Image.open(io.BytesIO(data), formats=decoding.formats()) as image:
            width, height = image.size
            # a thin image is enlarged until its short side fits: 1 x 100,000 pixels would become 256 x 25,600,000
            enlarged = max(1.0, preprocess.resize / max(1, min(width, height)))
            if width * height * enlarged**2 > max_pixels:
                resized = "" if enlarged == 1 else f", {round(enlarged)} times enlarged"
                limit = f"more than the {max_pixels / 1e6:g} million allowed"
                return Rejected("too-many-pixels", f"{width} x {height} pixels{resized}, {limit}")
            return Prepared(preprocess.image(image), width, height)
    except UnidentifiedImageError as error:
        return Rejected("not-an-image", decoding.reason(error))
    except Image.DecompressionBombError:  # Pillow's own limit, for files whose header is read later
        return Rejected("too-many-pixels", f"more pixels than the {max_pixels / 1e6:g} million allowed")
    except Exception as error:  # Pillow's plugins raise whatever their parsing meets
        return Rejected("undecodable", decoding.reason(error))
