"""Image files that are small and take much: memory when they become large, or time."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from functools import cache

from PIL import Image

MIB = 2**20
PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file, its checksum right."""
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


@cache
def png(
    width: int, height: int, *, colour: int = 0, bits: int = 8, rows: int | None = None, extra: bytes = b""
) -> bytes:
    """A black PNG; `rows`: of which only so many are there; `extra`: chunks before the pixels."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row, packer = bytes(1 + (width * samples * bits + 7) // 8), zlib.compressobj(9)
    data = b"".join([packer.compress(row) for _ in range(height if rows is None else rows)]) + packer.flush()
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, colour, 0, 0, 0])
    return b"".join([PNG, chunk(b"IHDR", head), extra, chunk(b"IDAT", data), chunk(b"IEND", b"")])


def iptc(content: bytes) -> bytes:
    """An IPTC file that says it has 1 x 1 pixels, around another file."""

    def field(record: int, number: int, value: bytes) -> bytes:
        return bytes([0x1C, record, number]) + len(value).to_bytes(2, "big") + value

    head = [field(3, 20, b"\0\1"), field(3, 30, b"\0\1"), field(3, 60, b"\1\0"), field(3, 120, b"\5")]
    return b"".join(head + [field(8, 10, content[start : start + 8000]) for start in range(0, len(content), 8000)])


def ico(content: bytes) -> bytes:
    """An icon that says it has 16 x 16 pixels, around a PNG."""
    return b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + len(content).to_bytes(4, "little") + b"\x16\0\0\0" + content


def icns(content: bytes) -> bytes:
    """An Apple icon that says it has 128 x 128 pixels, around a PNG."""
    size = len(content)
    return b"icns" + (16 + size).to_bytes(4, "big") + b"ic07" + (8 + size).to_bytes(4, "big") + content


def compressed_text() -> bytes:
    """Chunks of a PNG: texts and a colour profile that unpack to 256 MB."""
    packed = zlib.compress(bytes(64 * MIB), 9)
    return b"".join([chunk(b"zTXt", b"a\0\0" + packed)] * 3) + chunk(b"iCCP", b"a\0\0" + packed)


def wide_gif() -> bytes:
    """A GIF that says it has 65,535 x 65,535 pixels."""
    return b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b"\x2c\0\0\0\0\xff\xff\xff\xff\0\x08\x04\0\1\4\4\0;"


# Files that take long


@cache
def gif_of_tiny_comments() -> bytes:
    """8 MB: a comment in pieces of a byte, for which Pillow's time grows with the square of its length."""
    return b"GIF89a\x01\x00\x01\x00\x00\x00\x00!\xfe" + b"\x01a" * 4_000_000 + b"\x00;"


@cache
def jpeg_of_exif() -> bytes:
    """5.6 MB: many small Exif segments."""
    segment = b"\xff\xe1" + struct.pack(">H", 10) + b"Exif\0\0ab"
    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "JPEG")
    return plain.getvalue()[:2] + segment * 470_000 + plain.getvalue()[2:]


@cache
def ppm_of_comments() -> bytes:
    """30 MB: a comment a line."""
    return b"P6\n" + b"#\n" * (15 * MIB) + b"1 1\n255\nabc"


@cache
def png_of_profiles() -> bytes:
    """5 MB: many colour profiles, each of a megabyte of zeros."""
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(MIB - 1)))
    return png(8, 8, extra=profile * 5000)


@cache
def jpeg_of_scans() -> bytes:
    """200 KB: a progressive JPEG of 12 megapixels in a thousand scans, most of them of nothing."""
    plain = io.BytesIO()
    Image.new("L", (4000, 3000)).save(plain, "JPEG", progressive=True)
    content = plain.getvalue()
    begin = content.rindex(b"\xff\xda")
    return content[:begin] + content[begin:-2] * 1000 + content[-2:]


@cache
def jpeg2000() -> bytes:
    """A few KB of 49 megapixels."""
    made = io.BytesIO()
    Image.new("L", (7000, 7000)).save(made, "JPEG2000")
    return made.getvalue()


@cache
def fits() -> bytes:
    """200 KB that become 49 megapixels of 32 bits."""
    cards = ["XTENSION= 'BINTABLE'", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 8", "NAXIS2  = 1", "PCOUNT  = 0"]
    cards += ["GCOUNT  = 1", "TFIELDS = 1", "ZIMAGE  = T", "ZCMPTYPE= 'GZIP_1  '", "ZBITPIX = 32", "ZNAXIS  = 2"]
    cards += ["ZNAXIS1 = 7000", "ZNAXIS2 = 7000", "END"]
    first = ["SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 0", "EXTEND  = T", "END"]

    def block(lines: list[str]) -> bytes:
        text = "".join(line.ljust(80) for line in lines)
        return text.ljust(-(-len(text) // 2880) * 2880).encode()

    return block(first) + block(cards) + bytes(8) + gzip.compress(bytes(7000 * 7000 * 4))


@cache
def large_png() -> bytes:
    """150 KB that become 49 megapixels, all of it allowed."""
    return png(7000, 7000)
