"""How the service is set up."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mvmr.errors import MvmrError
from mvmr.serve.decode import LIMITS, Limits

_FEWEST_LETTERS = 16
_LONGEST = 3600
_ORIGIN = re.compile(r"\*|https?://[^/\s]+")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `mvmr serve` takes; docs/serving.md has a table of flags and variables.

    queue: images accepted and not yet answered at most, above which requests get 429
    max_batch: images to a batch of the engine; None: 4 on a processor, 32 on a GPU
    workers: threads that run the engine, each a batch of its own; None: `serve` takes one to a core, or one on a GPU
    decoders: processes that decode for one client; None: as many as cores
    limits: of an image; max_items: images to a request; max_body: bytes
    api_keys: one of them must come with each request, none: open to all
    cors: origins whose pages may ask; url_hosts: hosts that images may be fetched from
    head_seconds: for a request's head to arrive, else its connection is closed; body_seconds: for its body, else 408
    stuck_seconds: that the engine may take for a batch before the service is not ready
    drain: seconds between SIGTERM and the closing of the door; grace: seconds for what was accepted to end
    """

    host: str = "127.0.0.1"
    port: int = 8000
    queue: int = 256
    max_batch: int | None = None
    workers: int | None = None
    decoders: int | None = None
    limits: Limits = LIMITS
    max_items: int = 64
    max_body: int = 64 * 2**20
    head_seconds: float = 15.0
    body_seconds: float = 30.0
    stuck_seconds: float = 30.0
    api_keys: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    url_hosts: tuple[str, ...] = ()
    drain: float = 1.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name in ("queue", "max_items", "max_body"):
            if getattr(self, name) < 1:
                raise MvmrError(f"{name} = {getattr(self, name)} must be at least 1")
        if not 0 <= self.port <= 65535:
            raise MvmrError(f"port {self.port} is none; give one from 0 to 65535")
        for name in ("drain", "grace", "head_seconds", "body_seconds", "stuck_seconds"):
            if not 0 <= getattr(self, name) <= _LONGEST:  # NaN, too
                raise MvmrError(f"{name} = {getattr(self, name)} must lie between 0 and {_LONGEST} seconds")
        for origin in self.cors:
            if not _ORIGIN.fullmatch(origin):
                raise MvmrError(f"cors: {origin!r} is no origin; give one such as https://app.example, or *")
        if self.max_items > self.queue:
            raise MvmrError(
                f"max_items = {self.max_items} is more than queue = {self.queue} holds: such a request could never be "
                "accepted; raise queue or lower max_items"
            )


def read_keys(file: str | Path) -> tuple[str, ...]:
    """Read API keys: one to a line; empty lines and lines that begin with # don't count.

    Raises: MvmrError for a file that can't be read, holds no key, or a key of fewer than 16 letters.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MvmrError(f"cannot read the API keys in {file}: {getattr(error, 'strerror', None) or error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise MvmrError(f"{file} holds no API key; write one to a line, such as `openssl rand -hex 32` makes")
    for number, key in enumerate(keys, 1):
        if len(key) < _FEWEST_LETTERS or not key.isascii() or not key.isprintable() or " " in key:
            wanted = f"{_FEWEST_LETTERS} or more printable ASCII letters without spaces"
            raise MvmrError(f"key number {number} in {file} is not {wanted}; make one by `openssl rand -hex 32`")
    return keys
