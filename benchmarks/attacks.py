"""What a stranger may do to a service, each in a process of its own: benchmarks/serve_attacks.py looks on.

An attack is a function that is called again and again until time is up, in so many threads, each with connections from
an address of its own network (127.0.0.x), as a stranger's are not those of a normal client.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import bombs
import numpy as np
from PIL import Image

_LOW_PRIORITY = 19  # a real attacker has processors of its own
_PATIENCE = 60.0
MIB = 2**20
SMALL_JSON = 15 * MIB  # below the limit


@dataclass
class Target:
    """host, port: of the service; source: address to come from; until: Unix time; sent: bytes so far."""

    host: str
    port: int
    source: str
    until: float
    sent: int = 0

    @contextlib.contextmanager
    def connection(self) -> Iterator[socket.socket]:
        """A connection that ends with the block, at once."""
        with socket.create_connection((self.host, self.port), 10.0, (self.source, 0)) as opened:
            opened.settimeout(max(0.1, min(_PATIENCE, self.until - time.time())))
            yield opened

    def send(self, opened: socket.socket, content: bytes) -> None:
        """Send all of it."""
        view = memoryview(content)
        while view:
            count = opened.send(view[:MIB])
            self.sent += count
            view = view[count:]

    def post(self, path: str, content: bytes, kind: str) -> bytes:
        """The first bytes of the answer to a request on a connection of its own."""
        with self.connection() as opened:
            self.send(opened, head(path, len(content), kind) + content)
            return opened.recv(4096)

    def hold(self) -> None:
        """Wait until time is up."""
        time.sleep(max(0.0, self.until - time.time()))


def head(path: str, length: int, kind: str, more: bytes = b"") -> bytes:
    """The head of a POST."""
    text = f"POST {path} HTTP/1.1\r\nhost: service\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n"
    return text.encode() + more + b"\r\n"


# Images


@cache
def photograph() -> bytes:
    """An image as others send them."""
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(256, size=(400, 500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, "JPEG")
    return content.getvalue()


def images(make: Callable[[], bytes], count: int = 1) -> Callable[[Target], None]:
    """An attack that sends images, so many to a request."""

    def attack(target: Target) -> None:
        content = make()
        if count == 1:
            target.post("/v1/embed", content, "application/octet-stream")
            return
        edge = b"----edge"
        part = b"--%s\r\ncontent-disposition: form-data; name=file; filename=a\r\n\r\n%s\r\n" % (edge, content)
        target.post("/v1/embed", part * count + b"--%s--\r\n" % edge, f"multipart/form-data; boundary={edge.decode()}")

    return attack


# The wire


def endless_head(target: Target) -> None:
    """120 MB of header lines."""
    with target.connection() as opened:
        target.send(opened, b"GET / HTTP/1.1\r\nhost: service\r\n")
        for _ in range(120):
            target.send(opened, b"a: b\r\n" * (MIB // 6))


def unread_pipelines(target: Target) -> None:
    """60 connections full of requests whose answers nobody reads."""
    with contextlib.ExitStack() as stack:
        asked = b"GET /openapi.json HTTP/1.1\r\nhost: service\r\n\r\n" * 2000
        for _ in range(60):
            with contextlib.suppress(OSError):
                opened = stack.enter_context(target.connection())
                opened.setblocking(False)
                target.sent += opened.send(asked)
        target.hold()


def idle_connections(target: Target) -> None:
    """As many connections as one gets, on which nothing is sent."""
    with contextlib.ExitStack() as stack:
        while time.time() < target.until:
            with contextlib.suppress(OSError):
                stack.enter_context(target.connection())
                continue
            time.sleep(0.1)


def new_connections(target: Target) -> None:
    """A connection for each request, as fast as they can be had."""
    with target.connection() as opened:
        target.send(opened, b"GET /v1/models HTTP/1.1\r\nhost: service\r\nconnection: close\r\n\r\n")
        opened.recv(4096)


def busy_connections(target: Target) -> None:
    """Four hundred connections that ask again as soon as they are answered, now and then for what takes longest."""
    asked = [
        f"GET {path} HTTP/1.1\r\nhost: service\r\n\r\n".encode() for path in ("/metrics", "/v1/models", "/openapi.json")
    ]
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for number in range(400):
            with contextlib.suppress(OSError):
                opened = stack.enter_context(target.connection())
                target.send(opened, asked[number % 3])
                selector.register(opened, selectors.EVENT_READ, asked[number % 3])
        while time.time() < target.until:
            for key, _ in selector.select(0.1):
                with contextlib.suppress(OSError):
                    if not key.fileobj.recv(2**16):  # type: ignore[union-attr]
                        selector.unregister(key.fileobj)
                        continue
                    target.send(key.fileobj, key.data)  # type: ignore[arg-type]


def slow_heads(target: Target) -> None:
    """Two hundred connections, whose second request never has a whole head."""
    with contextlib.ExitStack() as stack:
        there = []
        for _ in range(200):
            with contextlib.suppress(OSError):
                opened = stack.enter_context(target.connection())
                target.send(opened, b"GET /healthz HTTP/1.1\r\nhost: service\r\n\r\nGET /healthz HTTP/1.1\r\n")
                there.append(opened)
        while time.time() < target.until:
            for opened in there:
                with contextlib.suppress(OSError):
                    target.send(opened, b"a: b\r\n")
            time.sleep(1)


def slow_bodies(target: Target) -> None:
    """Bodies of 60 MB whose last byte never comes."""
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            with contextlib.suppress(OSError):
                opened = stack.enter_context(target.connection())
                target.send(opened, head("/v1/embed", 60 * MIB, "image/jpeg") + bytes(60 * MIB - 1))
        target.hold()


def tiny_chunks(target: Target) -> None:
    """A body in chunks of a byte."""
    with target.connection() as opened:
        start = b"POST /v1/embed HTTP/1.1\r\nhost: service\r\ntransfer-encoding: chunked\r\n\r\n"
        target.send(opened, start + b"1\r\na\r\n" * (10 * MIB))


def malformed(target: Target) -> None:
    """A thousand requests that are none."""
    for _ in range(1000):
        with target.connection() as opened:
            target.send(opened, b"\x16\x03\x01 nonsense\r\n\r\n")
            opened.recv(4096)


def unread_answers(target: Target) -> None:
    """200 connections whose large answers nobody reads."""
    with contextlib.ExitStack() as stack:
        edge = b"----edge"
        part = b"--%s\r\ncontent-disposition: form-data; name=file; filename=a\r\n\r\n%s\r\n" % (edge, bombs.png(8, 8))
        body = part * 64 + b"--%s--\r\n" % edge
        asked = head("/v1/embed", len(body), f"multipart/form-data; boundary={edge.decode()}") + body
        for _ in range(200):
            with contextlib.suppress(OSError):
                opened = stack.enter_context(target.connection())
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                target.send(opened, asked)
        target.hold()


def probes(target: Target) -> None:
    """Probes, as fast as they are answered."""
    with target.connection() as opened:
        while time.time() < target.until:
            target.send(opened, b"GET /readyz HTTP/1.1\r\nhost: service\r\n\r\n")
            if not opened.recv(4096):
                return


# JSON and forms


def json_of_lists(size: int) -> Callable[[Target], None]:
    """An attack by JSON of many small lists."""

    def attack(target: Target) -> None:
        target.post("/v1/embed", b'{"input":[' + b"[0]," * (size // 4) + b"[0]]}", "application/json")

    return attack


def json_of_numbers(target: Target) -> None:
    """A tensor of as many numbers as fit, and not one too many."""
    shape = [6, 224, 224, 3]
    data = b"1," * (int(np.prod(shape)) - 1) + b"1"
    document = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": shape, "data": [0]}]}
    body = json.dumps(document).encode().replace(b"[0]", b"[" + data + b"]")
    target.post("/v2/models/student/infer", body, "application/json")


def long_base64(target: Target) -> None:
    """A megabyte of no image at all, many times to a request."""
    target.post("/v1/embed", json.dumps({"input": ["QUFB" * (MIB // 4)] * 15}).encode(), "application/json")


def form_of_edges(target: Target) -> None:
    """60 MB in which each byte might begin the edge of a part."""
    edge = "a" * 60
    body = b"--%s\r\ncontent-disposition: form-data; name=file; filename=a\r\n\r\n" % edge.encode()
    body += b"\r\n--" * (60 * MIB // 4)
    target.post("/v1/embed", body, f"multipart/form-data; boundary={edge}")


def form_of_headers(target: Target) -> None:
    """60 MB of headers of a part."""
    body = b"--edge\r\n" + b"a: b\r\n" * (10 * MIB)
    target.post("/v1/embed", body, "multipart/form-data; boundary=edge")


def random_images(target: Target) -> None:
    """Images with bits turned over."""
    content = bytearray(photograph())
    for _ in range(20):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    target.post("/v1/embed", bytes(content), "image/jpeg")


class Attack(NamedTuple):
    """threads: that call `run` again and again; prepare: what takes long, and is done before."""

    threads: int
    run: Callable[[Target], None]
    prepare: Callable[[], object] = bytes


def _of(make: Callable[[], bytes], *, threads: int = 2, count: int = 1) -> Attack:
    return Attack(threads, images(make, count), make)


ATTACKS = {
    "gif-of-tiny-comments": _of(bombs.gif_of_tiny_comments),
    "gif-of-tiny-comments-x7": _of(bombs.gif_of_tiny_comments, count=7),
    "jpeg-of-exif": _of(bombs.jpeg_of_exif),
    "ppm-of-comments": _of(bombs.ppm_of_comments),
    "png-of-profiles": _of(bombs.png_of_profiles),
    "jpeg-of-scans": _of(bombs.jpeg_of_scans),
    "jpeg2000-x16": _of(bombs.jpeg2000, count=16),
    "fits": _of(bombs.fits, threads=4),
    "large-png-x16": _of(bombs.large_png, threads=4, count=16),
    "photographs-x64": _of(photograph, threads=4, count=64),
    "damaged-photographs": Attack(4, random_images),
    "endless-head": Attack(2, endless_head),
    "unread-pipelines": Attack(1, unread_pipelines),
    "unread-answers": Attack(1, unread_answers),
    "idle-connections": Attack(1, idle_connections),
    "new-connections": Attack(4, new_connections),
    "busy-connections": Attack(1, busy_connections),
    "slow-heads": Attack(1, slow_heads),
    "slow-bodies": Attack(1, slow_bodies),
    "tiny-chunks": Attack(2, tiny_chunks),
    "malformed": Attack(2, malformed),
    "probes": Attack(4, probes),
    "json-of-lists": Attack(3, json_of_lists(62 * MIB)),
    "json-of-lists-small": Attack(3, json_of_lists(SMALL_JSON)),
    "json-of-numbers": Attack(2, json_of_numbers),
    "long-base64": Attack(2, long_base64),
    "form-of-edges": Attack(2, form_of_edges),
    "form-of-headers": Attack(2, form_of_headers),
}


def main() -> None:
    """Attack: name, host, port, source address; the Unix time of the end comes on standard input.

    Prints a line when it is ready, and at the end the bytes sent, with the errors, as JSON.
    """
    name, host, port, source = sys.argv[1:]
    os.nice(_LOW_PRIORITY)
    if hasattr(os, "SCHED_IDLE"):  # lower still
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    attack = ATTACKS[name]
    attack.prepare()
    print("ready", flush=True)
    until = float(sys.stdin.readline())
    targets = [Target(host, int(port), source, until) for _ in range(attack.threads)]
    errors: dict[str, int] = {}

    def go(target: Target) -> None:
        while time.time() < target.until:
            try:
                attack.run(target)
            except OSError as error:
                errors[type(error).__name__] = errors.get(type(error).__name__, 0) + 1
                time.sleep(0.05)

    threads = [threading.Thread(target=go, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.1, until - time.time() + 1))
    print(json.dumps({"sent": sum(target.sent for target in targets), "errors": errors}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
