"""Connections with a running service by hand, byte by byte."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx2

from tests.serve.serving import Running, counted, jpeg

HOST = b"host: here\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
ALIVE = b'{"status":"ok"}'
MIB = 2**20


@contextmanager
def connected(service: Running, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", service.port), 10, (source, 0)) as opened:
        opened.settimeout(20)
        yield opened


def everything(opened: socket.socket) -> bytes:
    """All that is said until the other side ends the connection."""
    said = b""
    with suppress(ConnectionResetError):
        while got := opened.recv(2**16):
            said += got
    return said


def answers(service: Running, *sent: bytes, half: bool = False, source: str = "127.0.0.1") -> list[httpx2.Response]:
    """The answers at a connection that is sent this and waits for its end."""
    with connected(service, source) as opened:
        for piece in sent:
            opened.sendall(piece)
        if half:
            opened.shutdown(socket.SHUT_WR)
        return parsed(everything(opened))


def parsed(said: bytes) -> list[httpx2.Response]:
    found = []
    while said:
        head, _, said = said.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        length = int(headers.get("content-length", 0))
        if not status.startswith("HTTP/1.1 100"):
            found.append(httpx2.Response(int(status.split()[1]), headers=headers, content=said[:length]))
        said = said[length:]
    return found


def is_alive(opened: socket.socket, request: bytes = GET) -> bool:
    """Whether the service answers at a connection."""
    opened.sendall(request)
    said = b""
    while not said.endswith(ALIVE):
        if not (got := opened.recv(2**16)):
            return False
        said += got
    return True


def post(more: bytes = b"", *, body: bytes | None = None) -> bytes:
    body = jpeg() if body is None else body
    head = b"POST /v1/embed HTTP/1.1\r\n" + HOST + b"content-type: image/jpeg\r\n" + more
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def connections(service: Running) -> float:
    with httpx2.Client(base_url=service.url, headers={"connection": "close"}) as client:
        return counted(client.get("/metrics").text, "mvmr_connections")[""]


def causes(service: Running) -> dict[str, float]:
    with httpx2.Client(base_url=service.url, headers={"connection": "close"}) as client:
        found = counted(client.get("/metrics").text, "mvmr_errors_total")
    return {name.split('"')[1]: value for name, value in found.items()}
