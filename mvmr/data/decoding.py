"""One image file: which formats are read, and what is wrong with a file that cannot be."""

import errno
import os
import stat
from functools import lru_cache
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from mvmr.bundles.preprocess import upright
from mvmr.errors import one_line, unknown

# EPS would run Ghostscript on strangers' files, and IPTC holds a file of any other kind and size; the others are
# recognised by Pillow but need a reader it lacks
_LEFT_OUT = frozenset({"EPS", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"})
# What cameras, browsers and scanners make; MPO is a JPEG of several pictures, as some telephones take them.
COMMON = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Return the formats Pillow opens here, without those that need a program or reader from outside."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - _LEFT_OUT))


@lru_cache(maxsize=8)
def select_formats(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the formats `names` that Pillow opens here; the installed one may lack AVIF.

    Raises: MvmrError for a name that is none.
    """
    for name in names:
        if name not in formats() and name not in COMMON:
            raise unknown("format", name, formats())
    return tuple(name for name in names if name in formats())


@lru_cache(maxsize=8)
def extensions(names: tuple[str, ...] | None = None) -> frozenset[bytes]:
    """Return the endings of image files of the formats `names`, or of all `formats`, lower case with the dot."""
    wanted = set(formats() if names is None else select_formats(names))
    return frozenset(os.fsencode(ext.lower()) for ext, name in Image.registered_extensions().items() if name in wanted)


def read(path: bytes) -> Image.Image:
    """Return the image (the first frame of an animation) upright, in mode RGB, or RGBA where it has alpha.

    Raises: what the operating system or Pillow raises; `reason` turns it into words.
    """
    with open_file(path) as file, _open(file) as image:
        image.load()
        return upright(image)


def open_file(path: bytes) -> BinaryIO:
    """Open a regular file to be read; a pipe would wait for its writer, and a device never end.

    Raises: OSError, also for what is no regular file.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(number).st_mode):
        return os.fdopen(number, "rb")
    os.close(number)
    raise OSError(errno.EINVAL, "no regular file, but a pipe, a device or the like")


def check(path: bytes) -> int:
    """Decode the whole file, as cheaply as its format allows, and return its short side in pixels.

    Raises: as `read` would.
    """
    with open_file(path) as file, _open(file) as image:
        short = min(image.size)
        # a JPEG is decoded at an eighth of its size: every byte is still read, so a cut file is still found
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        upright(image)
        return short


def reason(error: Exception) -> str:
    """Say in a few words, on one line, why a file could not be read."""
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, FileNotFoundError):
        return "missing (a link to nowhere, or removed meanwhile)"
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged in its header"
    if isinstance(error, Image.DecompressionBombError):
        return "far too many pixels (a decompression bomb?)"
    return one_line(getattr(error, "strerror", None) or error)


def _open(file: BinaryIO) -> Image.Image:
    if os.fstat(file.fileno()).st_size == 0:
        raise ValueError("empty file (0 bytes)")
    return Image.open(file, formats=formats())
