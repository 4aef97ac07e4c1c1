"""Connections with a running service by hand, byte by byte."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx2

from tests.serve.serving import Running, jpeg, read_metric

HOST = b"host: here\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
ALIVE = b'{"status":"ok"}'
MIB = 2**20


@contextmanager
def connect(service: Running, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", service.port), 10, (source, 0)) as opened:
        opened.settimeout(20)
        yield opened


def everything(opened: socket.socket) -> bytes:
    """All that is said until the other side ends the connection."""
    data = b""
    with suppress(ConnectionResetError):
        while got := opened.recv(2**16):
            data += got
    return data


def answers(service: Running, *pieces: bytes, half: bool = False, source: str = "127.0.0.1") -> list[httpx2.Response]:
    """The answers at a connection that is sent this and waits for its end."""
    with connect(service, source) as opened:
        for piece in pieces:
            opened.sendall(piece)
        if half:
            opened.shutdown(socket.SHUT_WR)
        return parse_answers(everything(opened))


def parse_answers(data: bytes) -> list[httpx2.Response]:
    replies = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        length = int(headers.get("content-length", 0))
        if not status.startswith("HTTP/1.1 100"):
            replies.append(httpx2.Response(int(status.split()[1]), headers=headers, content=data[:length]))
        data = data[length:]
    return replies


def is_alive(opened: socket.socket, request: bytes = GET) -> bool:
    """Whether the service answers at a connection."""
    opened.sendall(request)
    data = b""
    while not data.endswith(ALIVE):
        if not (got := opened.recv(2**16)):
            return False
        data += got
    return True


def post(more: bytes = b"", *, body: bytes | None = None) -> bytes:
    body = jpeg() if body is None else body
    head = b"POST /v1/embed HTTP/1.1\r\n" + HOST + b"content-type: image/jpeg\r\n" + more
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def connections(service: Running) -> float:
    with httpx2.Client(base_url=service.url, headers={"connection": "close"}) as client:
        return read_metric(client.get("/metrics").text, "mvmr_connections")[""]


def causes(service: Running) -> dict[str, float]:
    with httpx2.Client(base_url=service.url, headers={"connection": "close"}) as client:
        values = read_metric(client.get("/metrics").text, "mvmr_errors_total")
    return {name.split('"')[1]: value for name, value in values.items()}
