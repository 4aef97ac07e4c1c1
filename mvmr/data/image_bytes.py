"""From the bytes of one image file to the pixels an engine takes, or the reason why not."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from mvmr.bundles.preprocess import Preprocess
from mvmr.data import decoding
from mvmr.errors import MvmrError

AT_ONCE = 4  # images that a decoding process is handed at most


def room_for_pixels(side: int) -> int:
    """Bytes that pixels take in the memory shared with a decoding process.

    Behind them come a byte that is 1 while the process reads a file, and the images' bytes or paths.
    """
    return AT_ONCE * 3 * side**2


@dataclass(frozen=True)
class Limits:
    """What an image may take.

    size: bytes of its file, in the batch job
    pixels: by its header, and as enlarged where it is thin
    seconds: of a processor; memory: bytes, a third of it for an image of fewer than a quarter of the pixels; both hold
        where decoding has a process of its own (`DecodePool`)
    formats: Pillow's names of those that are read

    Raises: MvmrError for a number that is not above 0, or an unknown format.
    """

    size: float = 256 * 2**20
    pixels: float = 50e6
    seconds: float = 10.0
    memory: float = 768 * 2**20
    formats: tuple[str, ...] = decoding.COMMON

    def __post_init__(self) -> None:
        for name in ("size", "pixels", "seconds", "memory"):
            if not 0 < getattr(self, name) < math.inf:  # NaN, too
                raise MvmrError(f"{name} = {getattr(self, name)} to decode an image must be above 0")
        decoding.select_formats(self.formats)

    def is_large(self, pixels: int) -> bool:
        """Whether an image of so many pixels may take all of the memory."""
        return pixels > self.pixels / 4

    def to_json(self) -> str:
        """As text for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "formats": tuple(values["formats"])})


LIMITS = Limits()


@dataclass(frozen=True)
class Prepared:
    """An image ready for the engine.

    pixels: uint8 [S, S, 3] RGB, resized and cropped by the bundle's preprocessing; width, height: the file's, in pixels
    sha256: of the file, in hex, where it was asked for
    """

    pixels: npt.NDArray[np.uint8]
    width: int
    height: int
    sha256: str = ""


@dataclass(frozen=True)
class Rejected:
    """Why an image has no embedding: a stable code for programs, and words for people.

    code: ``empty``, ``unreadable``, ``too-many-bytes``, ``not-an-image``,
        ``too-many-pixels``, ``too-much-memory``, ``too-slow`` or ``undecodable``.
    """

    code: str
    reason: str


def prepare(
    data: bytes, preprocess: Preprocess, limits: Limits = LIMITS, *, before: Callable[[int], None] = lambda pixels: None
) -> Prepared | Rejected:
    """Decode the file `data` (the first frame of an animation) and resize and crop it as in training.

    How many pixels it has is read from its header, before anything is decoded; `before` hears of it then.
    """
    if not data:
        return Rejected("empty", "no bytes at all")
    try:
        if webp := _webp_size(data):  # whose reader takes memory for all pixels when it is opened
            if rejection := _too_many(webp, preprocess, limits):
                return rejection
            before(webp[0] * webp[1])
        with Image.open(io.BytesIO(data), formats=decoding.select_formats(limits.formats)) as image:
            if rejection := _too_many(image.size, preprocess, limits):
                return rejection
            width, height = image.size
            if not webp:
                before(width * height)
            return Prepared(preprocess.image(image), width, height)
    except UnidentifiedImageError:
        return Rejected(
            "not-an-image", f"none of {', '.join(limits.formats)}, or damaged in its header; --format adds formats"
        )
    except Image.DecompressionBombError:  # Pillow's own limit, for files whose header is read later
        return Rejected(
            "too-many-pixels", f"more pixels than the {limits.pixels / 1e6:g} million allowed (--max-megapixels)"
        )
    except MemoryError:
        return Rejected("too-much-memory", "decoding it takes more memory than is allowed (--decode-memory-mb)")
    except Exception as error:  # Pillow's plugins raise whatever their parsing meets
        return Rejected("undecodable", decoding.reason(error))


def _too_many(size: tuple[int, int], preprocess: Preprocess, limits: Limits) -> Rejected | None:
    width, height = size
    # a thin image is enlarged until its short side fits: 1 x 100,000 pixels would become 256 x 25,600,000
    enlargement = max(1.0, preprocess.resize / max(1, min(width, height)))
    if width * height * enlargement**2 <= limits.pixels:
        return None
    note = "" if enlargement == 1 else f", {round(enlargement)} times enlarged"
    limit = f"more than the {limits.pixels / 1e6:g} million allowed (--max-megapixels)"
    return Rejected("too-many-pixels", f"{width} x {height} pixels{note}, {limit}")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that a WebP declares (RFC 9649); None for any other file."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
