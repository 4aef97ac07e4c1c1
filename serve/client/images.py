"""A client's images, of whatever kind, as the bytes of files in requests of a bounded size."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvmr.bundles.preprocess import upright
from mvmr.data import decoding
from mvmr.errors import MvmrError

ImageLike = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]
Images = Iterable[ImageLike] | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImageError:
    """Why an image can't be embedded.

    index: its place among the images of the call; name: its path, or its number
    code: the service's, or ``unreadable`` and ``undecodable`` for what can't even be sent
    reason: in words, where there are any: binary answers have codes alone
    """

    index: int
    name: str
    code: str
    reason: str | None = None


@dataclass(frozen=True)
class ImageFile:
    """An image as it is sent: the bytes of a file."""

    index: int
    name: str
    content: bytes


def pack(images: Images, most: int, most_bytes: int) -> Iterator[list[ImageFile | ImageError]]:
    """Read the images in order and pack them: at most `most` to a part, and `most_bytes` unless one alone is more.

    Paths and bytes stay as they are; PIL images and arrays uint8 [H, W, 3] become PNG, upright, RGB or
    RGBA: what a transparent image is laid on is the service's to say.

    Raises: MvmrError for one image in place of several, or what is no image at all.
    """
    if isinstance(images, str | bytes | os.PathLike | Image.Image):
        raise MvmrError("the client takes several images; put the one into a list")
    if isinstance(images, np.ndarray) and images.ndim != 4:
        raise MvmrError(f"the client takes arrays of uint8 [N, H, W, 3], this one is {_describe(images)}")
    part: list[ImageFile | ImageError] = []
    size = 0
    for index, image in enumerate(images):
        entry = _read(index, image)
        more = len(entry.content) if isinstance(entry, ImageFile) else 0
        if part and (len(part) == most or size + more > most_bytes):
            yield part
            part, size = [], 0
        part.append(entry)
        size += more
    if part:
        yield part


def _read(index: int, image: object) -> ImageFile | ImageError:
    name = f"image number {index}"
    if isinstance(image, str | os.PathLike):
        name = os.fspath(image)
        try:
            return ImageFile(index, name, Path(image).read_bytes())
        except OSError as error:
            return ImageError(index, name, "unreadable", decoding.reason(error))
    if isinstance(image, bytes):
        return ImageFile(index, name, image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise MvmrError(f"an array must be uint8 [H, W, 3], {name} is {_describe(image)}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise MvmrError(f"the client takes paths, bytes, PIL images and uint8 arrays, {name} is a {kind}")
    try:
        file = io.BytesIO()
        upright(image).save(file, "PNG", compress_level=1)
    except Exception as error:  # a file that Pillow opened but has not read yet may raise whatever its parsing meets
        return ImageError(index, name, "undecodable", decoding.reason(error))
    return ImageFile(index, name, file.getvalue())


def _describe(array: npt.NDArray[np.generic]) -> str:
    return f"{array.dtype} {list(array.shape)}"
