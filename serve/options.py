"""Options that the service and the batch job share."""

from __future__ import annotations

from typing import Any

import click

from mvmr.cli.options import options
from mvmr.data import decoding
from mvmr.data.image_bytes import Limits
from mvmr.export.runtimes import PROVIDERS
from mvmr.serve.http.settings import ConnectionLimits

_FILE_MB = 256.0
ENGINE = options(
    click.option("--precision", help="fp32, fp16 or int8; left out, int8 on a processor, fp16 on a GPU, where it is."),
    click.option("--provider", default="cpu", show_default=True, help=f"{', '.join(PROVIDERS)}."),
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
CONNECTIONS = options(
    click.option("--max-connections", default=2000, show_default=True, help="At a time."),
    click.option(
        "--max-connections-per-address", default=1000, show_default=True, help="Of those, of an address."
    ),
    click.option("--max-head-kb", default=32.0, show_default=True, help="Kilobytes of a request's head."),
    click.option("--max-headers", default=100, show_default=True, help="In a head."),
    click.option(
        "--max-pipelined", default=16, show_default=True, help="Requests sent before their answers."
    ),
    click.option(
        "--max-unsent-mb", default=64.0, show_default=True, help="Megabytes of answers that clients leave unread."
    ),
    click.option("--head-seconds", default=15.0, show_default=True, help="For a head, or a TLS handshake, to arrive."),
    click.option("--body-seconds", default=30.0, show_default=True, help="For a body to arrive."),
    click.option("--answer-seconds", default=60.0, show_default=True, help="For an answer to be read."),
    click.option("--idle-seconds", default=75.0, show_default=True, help="Between requests of a connection."),
    click.option(
        "--trust-proxy", "proxies", multiple=True, metavar="ADDRESS",
        help="Of a proxy whose X-Forwarded-For names the client; may be repeated.",
    ),
)  # fmt: skip
KB, MB = 2**10, 2**20
_MOST = 100_000


def bytes_of(flag: str, value: float, unit: int = MB) -> int:
    """A flag's megabytes or kilobytes as bytes; raises BadParameter for a number that can't be."""
    if not 0 < value < _MOST:  # NaN, too
        raise click.BadParameter(f"{value} must lie between 0 and {_MOST}", param_hint=flag)
    return int(value * unit)


def connections_of(values: dict[str, Any]) -> ConnectionLimits:
    """Take the values of `CONNECTIONS` out of what a command was given; raises MvmrError for values that can't be."""
    names = ("head_seconds", "body_seconds", "answer_seconds", "idle_seconds", "proxies")
    return ConnectionLimits(
        total=values.pop("max_connections"),
        of_one=values.pop("max_connections_per_address"),
        head=bytes_of("--max-head-kb", values.pop("max_head_kb"), KB),
        headers=values.pop("max_headers"),
        pipelined=values.pop("max_pipelined"),
        unsent=bytes_of("--max-unsent-mb", values.pop("max_unsent_mb")),
        **{name: values.pop(name) for name in names},
    )


def limits_of(values: dict[str, Any]) -> Limits:
    """Take the values of `LIMITS` out of what a command was given; raises MvmrError for values that can't be."""
    names = tuple(name.upper() for name in values.pop("formats"))
    return Limits(
        size=values.pop("max_file_mb", _FILE_MB) * 2**20,
        pixels=values.pop("max_megapixels") * 1e6,
        seconds=values.pop("decode_seconds"),
        memory=values.pop("decode_memory_mb") * 2**20,
        formats=(*decoding.COMMON, *(name for name in names if name not in decoding.COMMON)),
    )
