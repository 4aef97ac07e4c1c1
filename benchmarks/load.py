"""A load of HTTP requests in a process of its own: so many clients, each asking again when it has its answer."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import uvloop


@dataclass
class Load:
    """host, port, path, headers: of every request; bodies: taken in turn; clients: that ask at a time.

    seconds: after which no more requests are sent
    """

    host: str
    port: int
    path: str
    headers: dict[str, str]
    bodies: list[bytes]
    clients: int
    seconds: float


@dataclass
class Answers:
    """Requests answered by status, seconds of those with 200, and the seconds all took."""

    statuses: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0


class _Client(asyncio.Protocol):
    """HTTP/1.1 by hand: any client library would cost more than the service that is measured."""

    def __init__(self, requests: list[bytes], answers: Answers, number: int, end: float) -> None:
        self._requests, self._answers, self._next, self._end = requests, answers, number, end
        self._buffer, self._needed = b"", -1
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._needed < 0 and (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            self._needed, self._status = end + 4 + length, head[9:12].decode()
        if 0 <= self._needed <= len(self._buffer):
            self._buffer, self._needed = b"", -1
            self._answers.statuses[self._status] = self._answers.statuses.get(self._status, 0) + 1
            if self._status == "200":
                self._answers.latencies.append(time.perf_counter() - self._began)
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self._answers.statuses["lost"] = self._answers.statuses.get("lost", 0) + 1
            self.done.set_result(None)

    def _ask(self) -> None:
        self._began = time.perf_counter()
        if self._began >= self._end:
            self.done.set_result(None)
            self._transport.close()
            return
        self._transport.write(self._requests[self._next % len(self._requests)])  # type: ignore[attr-defined]
        self._next += 1


async def run(load: Load) -> Answers:
    """Put the load on, and count the answers."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in load.headers.items())
    requests = [
        f"POST {load.path} HTTP/1.1\r\nhost: {load.host}\r\ncontent-length: {len(body)}\r\n{lines}\r\n".encode() + body
        for body in load.bodies
    ]
    answers, began = Answers(), time.perf_counter()
    loop = asyncio.get_running_loop()
    clients = []
    for number in range(load.clients):
        _, client = await loop.create_connection(
            lambda number=number: _Client(requests, answers, number, began + load.seconds), load.host, load.port
        )
        clients.append(client)
    await asyncio.gather(*(client.done for client in clients))
    answers.seconds = time.perf_counter() - began
    return answers


def main() -> None:
    """Read a load as JSON from standard input, with `files` for bodies; write the answers as JSON."""
    asked = json.load(sys.stdin)
    asked["bodies"] = [Path(file).read_bytes() for file in asked.pop("files")]
    answers = uvloop.run(run(Load(**asked)))
    json.dump(answers.__dict__, sys.stdout)


if __name__ == "__main__":
    main()
