"""Files that visitors of the app give: photographs, odd ones, and one that would be too large."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import skimage.data
from PIL import Image


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def photograph() -> Image.Image:
    return Image.fromarray(skimage.data.coffee())


def giant() -> bytes:
    """A PNG that says it has 30,000 x 30,000 pixels, in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def odd_images() -> dict[str, tuple[bytes, str]]:
    base = photograph().resize((120, 90))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
    frames = [base, base.rotate(90), base.rotate(180)]
    return {
        "an animation": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "the first of 3 frames"),
        "CMYK": (encoded(base.convert("CMYK"), "JPEG"), "CMYK"),
        "16 bits": (encoded(deep), "8"),
        "EXIF": (encoded(base, "JPEG", exif=turned), "upright"),
        "1 x 1": (encoded(base.resize((1, 1))), "1 x 1 pixels"),
        "alpha": (encoded(base.convert("RGBA")), "120 x 90 pixels"),
    }
