"""Heads of requests: which are not taken, and those that ask for another protocol."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mvmr.serve.http.problems import Problem

Headers = Sequence[tuple[bytes, bytes]]

_HOST = re.compile(rb"[\w.~!$&'()*+,;=%:\[\]-]*", re.ASCII)
# Of a request that asks for another protocol; none is spoken here, so it is answered as if it did not.
_UPGRADE = frozenset({b"upgrade", b"http2-settings", b"connection"})


def find_fault(method: bytes, version: str, headers: Headers) -> Problem | None:
    """Why a head that can be read is not taken all the same (RFC 9112, 3.2); None: it is.

    headers: their names in small letters.
    """
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        return Problem("malformed", f"a request has one Host header, this one has {len(hosts)}")
    if hosts and not _HOST.fullmatch(hosts[0]):
        return Problem("malformed", "the Host header is not the name of a host")
    if method == b"CONNECT":
        return Problem("wrong-method", "this is no proxy: CONNECT is not taken", headers={"allow": "GET, POST"})
    return None


def drop_upgrade(method: bytes, url: bytes, version: str, headers: Headers, *, close: bool) -> bytes:
    """A head once more, without its wish for another protocol; close: its connection is to end with the answer."""
    lines = [b"%s %s HTTP/%s" % (method, url, version.encode())]
    lines += _lines(header for header in headers if header[0] not in _UPGRADE)
    if close:
        lines.append(b"connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def write_answer(status_line: bytes, headers: Headers, body: bytes) -> bytes:
    """An answer that ends its connection."""
    return b"\r\n".join([status_line.rstrip(), *_lines([*headers, (b"connection", b"close")]), b"", body])


def _lines(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    return [b"%s: %s" % header for header in headers]
