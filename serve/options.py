"""Options that the service and the batch job share."""

from __future__ import annotations

from typing import Any

import click

from mvmr import decoding
from mvmr.options import options
from mvmr.serve.decode import Limits

_FILE_MB = 256.0
ENGINE = options(
    click.option("--precision", help="fp32, fp16 or int8; left out, int8 on a processor, fp16 on a GPU, where it is."),
    click.option("--provider", default="cpu", show_default=True, help="cpu, cuda, tensorrt or tensorrt-rtx."),
)
MAX_FILE = click.option("--max-file-mb", default=_FILE_MB, show_default=True, help="Of an image's file.")
LIMITS = options(
    click.option(
        "--max-megapixels", default=50.0, show_default=True, help="Of an image, by its header."
    ),
    click.option(
        "--decode-seconds", default=10.0, show_default=True, help="Of a processor, to decode an image."
    ),
    click.option("--decode-memory-mb", default=768.0, show_default=True, help="To decode an image."),
    click.option(
        "--format", "formats", multiple=True, metavar="NAME",
        help=f"Format that is read besides {', '.join(decoding.COMMON)}: PPM, JPEG2000; may be repeated.",
    ),
)  # fmt: skip


def limits_of(given: dict[str, Any]) -> Limits:
    """Take the values of `LIMITS` out of what a command was given; raises MvmrError for values that can't be."""
    names = tuple(name.upper() for name in given.pop("formats"))
    return Limits(
        size=given.pop("max_file_mb", _FILE_MB) * 2**20,
        pixels=given.pop("max_megapixels") * 1e6,
        seconds=given.pop("decode_seconds"),
        memory=given.pop("decode_memory_mb") * 2**20,
        formats=(*decoding.COMMON, *(name for name in names if name not in decoding.COMMON)),
    )
