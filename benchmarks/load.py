"""A load of HTTP requests in a process of its own.

Either so many clients, each asking again when it has its answer, or, with a rate, requests at their scheduled times
whatever becomes of those before.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

_PAUSE = 0.1  # seconds of a client that was refused, before it asks again
_GAP = 0.002  # seconds between two connections: of those that come at once, one of several processes takes all


@dataclass
class Load:
    """host, port, path, headers: of every request; bodies: taken in turn; clients: connections.

    seconds: after which no more requests are sent
    rate: requests a second; None: each client asks again when it has its answer
    seed: of exponentially distributed gaps between scheduled requests; None: equal gaps
    start_at: Unix time of the first request; None: as soon as all are connected
    timeline: whether every single answer is told
    fresh: whether each request, at its scheduled time, has a connection of its own
    """

    host: str
    port: int
    path: str
    headers: dict[str, str]
    bodies: list[bytes]
    clients: int
    seconds: float
    rate: float | None = None
    seed: int | None = None
    start_at: float | None = None
    timeline: bool = False
    fresh: bool = False


@dataclass
class Answers:
    """Requests answered by status, seconds of those with 200, and the seconds all took.

    A scheduled request's seconds count from its scheduled time. late: the most that one was sent after that.
    rows: of a timeline, when each was due and answered, in Unix time, and its status.
    """

    statuses: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    late: float = 0.0
    rows: list[tuple[float, float, str]] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """HTTP/1.1 by hand: any client library would cost more than the service that is measured."""

    def __init__(self, driver: _Closed | _Open, number: int) -> None:
        self._driver, self._buffer, self._needed = driver, b"", -1
        self.number = number  # of the body that it sends next, used by the driver

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def ask(self, request: bytes, due: float) -> None:
        """Send a request; the driver is told of its answer."""
        self.due = due
        self._transport.write(request)  # type: ignore[attr-defined]

    def close(self) -> None:
        """End it; the driver hears no more of it."""
        self._driver.open.discard(self)
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._needed < 0 and (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            self._needed, self._status = end + 4 + length, head[9:12].decode()
        if 0 <= self._needed <= len(self._buffer):
            self._buffer, self._needed = b"", -1
            self._driver.count(self._status, self.due)
            self._driver.answered(self, self._status)

    def connection_lost(self, error: Exception | None) -> None:
        if self in self._driver.open:
            self._driver.open.discard(self)
            self._driver.count("lost", getattr(self, "due", time.perf_counter()))
            self._driver.lost()


class _Driver:
    """What both kinds of load share: the connections, and the count of answers."""

    def __init__(self, load: Load, requests: list[bytes]) -> None:
        self.load, self.requests, self.answers = load, requests, Answers()
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.open: set[_Connection] = set()
        self._to_unix = time.time() - time.perf_counter()

    def begin(self) -> None:
        """Note the time; all connections stand."""
        self.began = time.perf_counter()

    def count(self, status: str, due: float) -> None:
        """One more answer to a request that was due then."""
        now, answers = time.perf_counter(), self.answers
        answers.statuses[status] = answers.statuses.get(status, 0) + 1
        if status == "200":
            answers.latencies.append(now - due)
        if self.load.timeline:
            answers.rows.append((due + self._to_unix, now + self._to_unix, status))

    def finish(self) -> None:
        """Nothing more is to come."""
        if not self.done.done():
            self.done.set_result(None)
        for connection in list(self.open):
            connection.close()

    def lost(self) -> None:
        """A connection was lost; without any there is nothing to wait for."""
        if not self.open:
            self.finish()


class _Closed(_Driver):
    """Each client asks again when it has its answer."""

    def begin(self) -> None:
        super().begin()
        for connection in list(self.open):
            self._ask(connection)

    def answered(self, connection: _Connection, status: str) -> None:
        if status == "200":
            self._ask(connection)
        else:
            self.loop.call_later(_PAUSE, self._ask, connection)

    def _ask(self, connection: _Connection) -> None:
        now = time.perf_counter()
        if now < self.began + self.load.seconds:
            connection.ask(self.requests[connection.number % len(self.requests)], now)
            connection.number += 1
            return
        connection.close()
        if not self.open:
            self.finish()


class _Open(_Driver):
    """Requests at their scheduled times, over any connection that is free; those that find none wait for one."""

    def begin(self) -> None:
        super().begin()
        self._free, self._due, self._number = deque(self.open), deque[float](), 0
        self._times, self._over = self._schedule(), False
        self._next()

    def answered(self, connection: _Connection, status: str) -> None:
        self._free.append(connection)
        self._send()

    def lost(self) -> None:
        self._free = deque(connection for connection in self._free if connection in self.open)
        super().lost()
        self._send()

    def _schedule(self) -> Iterator[float]:
        assert self.load.rate is not None
        gaps = None if self.load.seed is None else random.Random(self.load.seed)
        at = 0.0
        while at < self.load.seconds:
            yield self.began + at
            at += gaps.expovariate(self.load.rate) if gaps else 1 / self.load.rate

    def _next(self) -> None:
        due = next(self._times, None)
        if due is None:
            self._over = True
            self._send()
            return
        self.loop.call_later(max(0.0, due - time.perf_counter()), self._come_due, due)

    def _come_due(self, due: float) -> None:
        self._due.append(due)
        self._send()
        self._next()

    def _send(self) -> None:
        while self._due and self._free:
            due = self._due.popleft()
            self.answers.late = max(self.answers.late, time.perf_counter() - due)
            self._free.popleft().ask(self.requests[self._number % len(self.requests)], due)
            self._number += 1
        if self._over and not self._due and len(self._free) == len(self.open):
            self.finish()


class _Fresh(_Open):
    """Requests at their scheduled times, each over a connection of its own, of which there are only so many."""

    def begin(self) -> None:
        self._left = self.load.clients
        super().begin()

    def answered(self, connection: _Connection, status: str) -> None:
        connection.close()
        self.lost()

    def lost(self) -> None:
        self._left += 1
        self._send()

    def _send(self) -> None:
        while self._due and self._left:
            self._left -= 1
            self._number += 1
            self.loop.create_task(self._ask(self._due.popleft(), self._number))
        if self._over and not self._due and self._left == self.load.clients:
            self.finish()

    async def _ask(self, due: float, number: int) -> None:
        self.answers.late = max(self.answers.late, time.perf_counter() - due)
        try:
            _, connection = await self.loop.create_connection(
                lambda: _Connection(self, number), self.load.host, self.load.port
            )
        except OSError:
            self.count("not connected", due)
            self.lost()
            return
        self.open.add(connection)
        connection.ask(self.requests[number % len(self.requests)], due)


async def run(load: Load) -> Answers:
    """Put the load on, and count the answers."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in load.headers.items())
    requests = [
        f"POST {load.path} HTTP/1.1\r\nhost: {load.host}\r\ncontent-length: {len(body)}\r\n{lines}\r\n".encode() + body
        for body in load.bodies
    ]
    kind = _Closed if load.rate is None else _Fresh if load.fresh else _Open
    driver = kind(load, requests)
    loop = asyncio.get_running_loop()
    for number in range(0 if load.fresh else load.clients):
        _, connection = await loop.create_connection(
            lambda number=number: _Connection(driver, number), load.host, load.port
        )
        driver.open.add(connection)
        await asyncio.sleep(_GAP)
    if load.start_at is not None:
        await asyncio.sleep(max(0.0, load.start_at - time.time()))
    driver.begin()
    await driver.done
    driver.answers.seconds = time.perf_counter() - driver.began
    return driver.answers


def apart(load: dict[str, Any]) -> dict[str, Any]:
    """Put a load on from a process of its own: `Load`'s fields, with `files` for bodies; `Answers`' fields."""
    done = subprocess.run([sys.executable, __file__], input=json.dumps(load), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the load failed: {done.stderr.strip()}")
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def main() -> None:
    """Read a load as JSON from standard input, with `files` for bodies; write the answers as JSON."""
    asked = json.load(sys.stdin)
    asked["bodies"] = [Path(file).read_bytes() for file in asked.pop("files")]
    answers = uvloop.run(run(Load(**asked)))
    json.dump(answers.__dict__, sys.stdout)


if __name__ == "__main__":
    main()
