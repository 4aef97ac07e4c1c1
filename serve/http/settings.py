"""How the service is set up."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from mvmr.data.image_bytes import LIMITS, Limits
from mvmr.errors import MvmrError

_FEWEST_LETTERS = 16
_LONGEST = 3600
_ORIGIN = re.compile(r"\*|https?://[^/\s]+")


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What connections may take.

    total: of them at a time, as far as this process may open files; of_one: of one address, or IPv6 network of 64 bits
    head: bytes of a request's head; headers: in it; pipelined: requests sent before their answers, on a connection
    unsent: bytes of answers that clients have not taken yet, all together
    head_seconds: for a head, or a TLS handshake, to arrive; body_seconds: for a body, else 408
    answer_seconds: for a client to take its answer; idle_seconds: between two requests
    proxies: addresses whose X-Forwarded-For names the client, and which may have any number of connections

    Raises: MvmrError for a value that can't be.
    """

    total: int = 2000
    of_one: int = 1000
    head: int = 32 * 2**10
    headers: int = 100
    pipelined: int = 16
    unsent: int = 64 * 2**20
    head_seconds: float = 15.0
    body_seconds: float = 30.0
    answer_seconds: float = 60.0
    idle_seconds: float = 75.0
    proxies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("total", "of_one", "head", "headers", "pipelined", "unsent"):
            _check_count(name, getattr(self, name))
        for name in ("head_seconds", "body_seconds", "answer_seconds", "idle_seconds"):
            if getattr(self, name) == 0:
                raise MvmrError(f"{name} = 0 leaves no time; give more")
            _check_seconds(name, getattr(self, name))
        for proxy in self.proxies:
            try:
                ipaddress.ip_address(proxy)
            except ValueError:
                raise MvmrError(f"trust_proxy: {proxy!r} is no address; give one such as 10.0.0.7") from None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `mvmr serve` takes; docs/serving.md has a table of flags and variables.

    queue: images accepted and not yet answered at most, above which requests get 429
    max_batch: images to a batch of the engine; None: 4 on a processor, 32 on a GPU
    workers: threads that run the engine, each a batch of its own; None: `serve` takes one to a core, or one on a GPU
    decoders: processes that decode for one client; None: as many as cores
    limits: of an image; max_items: images to a request; max_body: bytes; max_json: bytes of a body that is JSON
    connections: limits of theirs; probe_port: a second door, for probes alone
    api_keys: one of them must come with each request, none: open to all
    cors: origins whose pages may ask; url_hosts: hosts that images may be fetched from
    tls_cert, tls_key: PEM files; given both, the service speaks https
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
    max_json: int = 16 * 2**20
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    probe_port: int | None = None
    stuck_seconds: float = 30.0
    api_keys: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    url_hosts: tuple[str, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    drain: float = 1.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name in ("queue", "max_items", "max_body", "max_json"):
            _check_count(name, getattr(self, name))
        for port in (self.port, self.probe_port or 0):
            if not 0 <= port <= 65535:
                raise MvmrError(f"there is no port {port}: give one from 0 (any free one) to 65535")
        for name in ("drain", "grace", "stuck_seconds"):
            _check_seconds(name, getattr(self, name))
        for origin in self.cors:
            if not _ORIGIN.fullmatch(origin):
                raise MvmrError(f"cors: {origin!r} is no origin; give one such as https://app.example, or *")
        if self.max_items > self.queue:
            raise MvmrError(
                f"max_items = {self.max_items} is more than queue = {self.queue} holds: such a request could never be "
                "accepted; raise queue or lower max_items"
            )


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise MvmrError(f"{name} = {value} must be at least 1")


def _check_seconds(name: str, value: float) -> None:
    if not 0 <= value <= _LONGEST:  # NaN, too
        raise MvmrError(f"{name} = {value} must lie between 0 and {_LONGEST} seconds")


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
            rule = f"{_FEWEST_LETTERS} or more printable ASCII letters without spaces"
            raise MvmrError(f"key number {number} in {file} is not {rule}; make one by `openssl rand -hex 32`")
    return keys
